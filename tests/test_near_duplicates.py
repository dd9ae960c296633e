"""Near duplicates: pairs above the threshold, search in chunks, identical files, the table and the sheet."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from eval_fixtures import unit
from numpy.typing import NDArray
from PIL import Image

import eval.retrieval.benchmarks
from dino_xcit.data import ArraySource, open_source
from dino_xcit.errors import InputError
from eval.retrieval.benchmarks import IDENTICAL, NEAR, Pairs, draw_pairs, find_pairs, kinds_of, write_pairs
from eval.sheet import TILE


def points(count: int, seed: int) -> NDArray[np.float32]:
    return (5 * np.random.default_rng(seed).normal(size=(count, 3))).astype(np.float32)


@pytest.fixture(params=[(1024, 16_384), (7, 10)])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval.retrieval.benchmarks, "_QUERIES_AT_ONCE", request.param[0])
    monkeypatch.setattr(eval.retrieval.benchmarks, "_ROWS_AT_ONCE", request.param[1])


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("within_one_set", [False, True])
def test_find_pairs_returns_exactly_pairs_above_threshold_best_first(within_one_set: bool) -> None:
    """Within one set, each pair appears once and no image is paired with itself."""
    first, second = points(45, 0), None if within_one_set else points(38, 1)
    cosine = unit(first) @ unit(first if second is None else second).T
    expected = np.argwhere(np.triu(cosine, k=1) >= 0.9 if within_one_set else cosine >= 0.9)
    pairs = find_pairs(first, second, 0.9, 10_000)
    assert 0 < len(expected) < cosine.size / 4
    assert sorted(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)) == [tuple(pair) for pair in expected]
    assert pairs.similarity == pytest.approx(cosine[pairs.first, pairs.second], abs=1e-6)
    assert (np.diff(pairs.similarity) <= 0).all()


def test_find_pairs_accepts_no_pairs_and_refuses_too_many() -> None:
    first = points(30, 0)
    none = find_pairs(first, -first[:1], 1.0, 10)
    assert len(none) == 0
    assert none.first.dtype == np.int64
    with pytest.raises(InputError, match="more than 29 pairs"):
        find_pairs(first, first, -1.0, 29)


def pairs_of(*found: tuple[int, int, float]) -> Pairs:
    first, second, similarity = (np.array(column) for column in zip(*found, strict=True))
    return Pairs(first, second, similarity.astype(np.float32))


def test_kinds_of_distinguishes_identical_files_from_near_duplicates(tmp_path: Path, photo: Image.Image) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    photo.save(tmp_path / "first/a.png")
    photo.save(tmp_path / "first/b.jpg")
    (tmp_path / "second/copy of a.png").write_bytes((tmp_path / "first/a.png").read_bytes())
    photo.save(tmp_path / "second/the same pixels.bmp")
    first, second = open_source(str(tmp_path / "first")), open_source(str(tmp_path / "second"))
    found = kinds_of(pairs_of((0, 0, 1.0), (0, 1, 1.0), (1, 0, 0.99), (1, 1, 0.99)), first, second)
    assert found == [IDENTICAL, NEAR, NEAR, NEAR]


class Named(ArraySource):
    """Array source with chosen image names."""

    names: tuple[str, ...] = ()

    def name(self, index: int) -> str:
        return self.names[index]


def coloured(count: int, colour: tuple[int, int, int], *names: str) -> Named:
    pixels = np.zeros((count, 30, 30, 3), dtype=np.uint8) + np.array(colour, dtype=np.uint8)
    source = Named("made-up:1", pixels, np.zeros(count, dtype=np.int64), ("one",))
    source.names = names or tuple(map(str, range(count)))
    return source


def test_pairs_csv_preserves_any_image_name(tmp_path: Path) -> None:
    first = coloured(2, (0, 0, 0), "a,b.jpg", 'say "x"\n.jpg')
    second = coloured(2, (0, 0, 0), "ümlaut.jpg", "raw\udcff.jpg")
    write_pairs(tmp_path / "pairs.csv", pairs_of((1, 0, 1.0), (0, 1, 0.9512345)), [IDENTICAL, NEAR], first, second)
    with open(tmp_path / "pairs.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["first", "second", "similarity", "kind"],
        ['say "x"\n.jpg', "ümlaut.jpg", "1.000000", "identical file"],
        ["a,b.jpg", "raw\udcff.jpg", "0.951235", "near"],
    ]


def test_pairs_sheet_shows_at_most_five_matches_per_second_image(tmp_path: Path) -> None:
    pairs = pairs_of(*((row, 3, 1.0 - row / 100) for row in range(7)), (9, 4, 0.9))
    draw_pairs(tmp_path / "p.png", pairs, [NEAR] * 8, coloured(10, (0, 0, 255)), coloured(5, (255, 0, 0)))
    with Image.open(tmp_path / "p.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    tile = TILE**2
    assert int((pixels == (255, 0, 0)).all(axis=-1).sum()) == 2 * tile, "expected 2 images of the second set"
    assert int((pixels == (0, 0, 255)).all(axis=-1).sum()) == 6 * tile, "expected 5 + 1 of the 7 + 1 matches"


def test_find_pairs_finds_copies_at_threshold_one() -> None:
    features = np.random.default_rng(0).normal(size=(200, 64)).astype(np.float32)
    pairs = find_pairs(features, features.copy(), 1.0, 1000)
    assert sorted(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)) == [(i, i) for i in range(200)]
