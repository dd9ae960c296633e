"""Collections: written whole or not at all, searched exactly, shown as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_fixtures import unit
from numpy.typing import NDArray
from PIL import Image

from dino_xcit.errors import InputError
from dino_xcit.transform import EvalTransform
from eval.collection.contact_sheet import TILE, Tile, draw_sheet
from eval.collection.paths_file import escape, read_names, unescape
from eval.collection.store import FILES, Collection, existing, finish_renaming, open_collection, write_collection
from eval.collection.whitening import Whitening, learn, save
from eval.pooling import CLASS_TOKEN, Descriptor

NAMES = ["a.jpg", "with space.jpg", "line\nfeed.png", "back\\slash\\n.png", "ümlaut\u2028.png", "raw\udcff.png", "\r"]


def card_of(count: int, normalised: bool = True, **changes: Any) -> dict[str, Any]:
    return {
        "format": "dino-xcit-vectors-1",
        "count": count,
        "normalised": normalised,
        "weights": {"hash": "w", "path": "/weights.pth"},
        "data": {"fingerprint": "d", "url": "photos", "images": count},
        "transform": EvalTransform().to_dict(),
        "date": "today",
    } | changes


def rows_of(count: int, seed: int = 0, dim: int = 5) -> NDArray[np.float32]:
    return (3 * np.random.default_rng(seed).normal(size=(count, dim))).astype(np.float32)


def write(folder: Path, rows: NDArray[np.float32], normalised: bool = True, **changes: Any) -> Collection:
    pieces = iter([rows[:4], rows[4:]])
    write_collection(folder, pieces, NAMES[: len(rows)], rows.shape, card_of(len(rows), normalised, **changes))
    return open_collection(folder)


def test_vectors_names_index_and_card_belong_row_by_row(tmp_path: Path) -> None:
    rows = rows_of(7)
    collection = write(tmp_path / "new" / "vectors", rows)
    vectors = np.load(tmp_path / "new" / "vectors" / "vectors.npy")
    assert vectors.dtype == np.float32
    assert vectors == pytest.approx(unit(rows), abs=1e-6)
    assert collection.names == NAMES
    assert collection.index.reconstruct_n(0, 7) == pytest.approx(vectors)
    assert sorted(path.name for path in (tmp_path / "new" / "vectors").iterdir()) == sorted(FILES)


def test_search_is_exact_and_takes_queries_as_the_backbone_gives_them(tmp_path: Path) -> None:
    rows, queries = rows_of(7), rows_of(3, seed=1)
    for normalised in (True, False):
        collection = write(tmp_path / str(normalised), rows, normalised)
        products = unit(queries) @ unit(rows).T if normalised else queries @ rows.T
        scores, found = collection.search(queries, 4)
        assert (found == np.argsort(-products, axis=1)[:, :4]).all()
        assert scores == pytest.approx(-np.sort(-products, axis=1)[:, :4], rel=1e-5)
        assert collection.search(queries, 100)[1].shape == (3, 7)


@pytest.mark.parametrize("name", [*NAMES, "\\", "\\\\n", "\\\n", "a\\\\\r\nb"])
def test_any_name_survives_on_one_line(name: str) -> None:
    assert "\n" not in escape(name)
    assert unescape(escape(name)) == name


def test_plain_names_are_written_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "paths.txt").write_bytes("photos/é 1.jpg\nb\x85c\n".encode())
    assert read_names(tmp_path / "paths.txt") == ["photos/é 1.jpg", "b\x85c"]
    assert escape("photos/é 1.jpg") == "photos/é 1.jpg"


def test_a_folder_is_the_same_extraction_only_if_weights_data_and_preparation_are(tmp_path: Path) -> None:
    assert existing(tmp_path / "none", card_of(7)) is None
    write(tmp_path, rows_of(7))
    (tmp_path / "notes.md").write_text("not ours")
    assert existing(tmp_path, card_of(7, date="tomorrow")) == "same"
    for other in (
        {"weights": {"hash": "x"}},
        {"data": {"fingerprint": "x"}},
        {"transform": EvalTransform(crop=200).to_dict()},
        {"normalised": False},
    ):
        assert existing(tmp_path, card_of(7) | other) == "other"
    (tmp_path / "index.faiss").unlink()
    assert existing(tmp_path, card_of(7)) == "other"
    with pytest.raises(InputError, match="no folder to write to"):
        existing(tmp_path / "notes.md", card_of(7))


def test_an_extraction_that_breaks_off_leaves_the_old_one_whole(tmp_path: Path) -> None:
    rows = rows_of(7)
    write(tmp_path, rows)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def breaking() -> Iterator[NDArray[np.float32]]:
        yield rows[:4]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        write_collection(tmp_path, breaking(), NAMES, (7, 5), card_of(7))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_that_are_missing_damaged_or_of_two_extractions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"lacks vectors\.npy, paths\.txt, index\.faiss, card\.json"):
        open_collection(tmp_path)
    write(tmp_path, rows_of(7))
    (tmp_path / "paths.txt").write_text("one\n")
    with pytest.raises(InputError, match="7 in the card, 1 in the paths, 7 in the index"):
        open_collection(tmp_path)
    write(tmp_path, rows_of(7))
    (tmp_path / "index.faiss").write_bytes(b"IxF")
    with pytest.raises(InputError, match="is damaged"):
        open_collection(tmp_path)


def test_the_contact_sheet_shows_queries_beside_their_results(tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (90, 30), "#ff0000"), Image.new("RGB", (28, 28), "#0000ff")
    results = [Tile(blue if place % 2 else None, f"{place}  0.9", "a rather long name " * 4) for place in range(7)]
    draw_sheet([(Tile(red, "query", "q\n.png"), results), (Tile(blue, "query", "r"), results[:1])], tmp_path / "s.png")
    with Image.open(tmp_path / "s.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert pixels.shape[1] > 6 * TILE, "a query and five results in a row"
    count = {
        name: int((pixels == colour).all(axis=-1).sum())
        for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255)))
    }
    assert count["red"] == 168 * 56, "the whole picture, in its own shape"
    assert count["blue"] == 4 * 168 * 168, "three results of the first query, and the second query"
    assert [path.name for path in tmp_path.iterdir()] == ["s.png"]


# ---- what came with the second format


def test_a_folder_of_the_first_format_still_opens_and_counts_as_the_class_token(tmp_path: Path) -> None:
    collection = write(tmp_path, rows_of(7))
    card = json.loads((tmp_path / "card.json").read_text())
    for name in ("index", "dtype", "descriptor", "whitening", "added"):
        card.pop(name, None)
    (tmp_path / "card.json").write_text(json.dumps(card | {"format": "dino-xcit-vectors-1"}))
    old = open_collection(tmp_path)
    assert old.descriptor == CLASS_TOKEN
    assert (old.search(rows_of(3, seed=1), 4)[1] == collection.search(rows_of(3, seed=1), 4)[1]).all()
    assert existing(tmp_path, card_of(7, format="dino-xcit-vectors-2", dtype="fp32", added=[])) == "same"
    assert existing(tmp_path, card_of(7, dtype="fp16")) == "other"
    assert existing(tmp_path, card_of(7, descriptor=Descriptor("gem").to_dict())) == "other"
    (tmp_path / "card.json").write_text(json.dumps(card | {"format": "dino-xcit-vectors-9"}))
    with pytest.raises(InputError, match="its format is 'dino-xcit-vectors-9', expected one of"):
        open_collection(tmp_path)


def test_vectors_are_there_as_they_are_kept_and_never_copied_whole(tmp_path: Path) -> None:
    collection = write(tmp_path, rows_of(7), dtype="fp16")
    assert isinstance(collection.vectors, np.memmap)
    assert collection.vectors.dtype == np.float16
    assert collection.vectors == pytest.approx(unit(rows_of(7)), abs=1e-3)


def test_an_image_is_as_near_to_itself_as_a_cosine_can_be_in_half_precision_too(tmp_path: Path) -> None:
    # Rounded to half precision some of these rows are longer than 1: their product with themselves was 1.00002.
    rows = rows_of(7, seed=3)
    collection = write(tmp_path, rows, dtype="fp16")
    lengths = np.linalg.norm(collection.vectors.astype(np.float64), axis=1)
    assert lengths.max() > 1 + 1e-5
    scores, found = collection.search(rows, 1)
    assert found[:, 0].tolist() == list(range(7))
    assert scores.max() == 1


def test_numbers_too_large_for_half_precision_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    rows = 1e5 * rows_of(7)
    with pytest.raises(InputError, match="float16 ends at 65,504: use --dtype fp32"):
        write(tmp_path, rows, normalised=False, dtype="fp16")
    assert list(tmp_path.iterdir()) == []
    assert write(tmp_path, rows, dtype="fp16").vectors.dtype == np.float16
    rows[3, 2] = np.nan
    for normalised in (True, False):
        with pytest.raises(InputError, match="not finite numbers"):
            write(tmp_path / "nan", rows, normalised)


def whitened(folder: Path, normalised: bool) -> tuple[Collection, Whitening]:
    whitening = learn(unit(rows_of(40, seed=2)).astype(np.float32), 3, {}, {})
    card = card_of(7, normalised, whitening={"hash": whitening.hash})
    write_collection(folder, iter([rows_of(7)]), NAMES, (7, 3), card, whitening)
    return open_collection(folder), whitening


def test_whitened_vectors_are_normalised_before_and_after_and_so_are_queries(tmp_path: Path) -> None:
    collection, whitening = whitened(tmp_path / "unit", True)
    rows = unit(rows_of(7)).astype(np.float32)
    assert collection.vectors == pytest.approx(unit((rows - whitening.mean) @ whitening.projection), abs=1e-5)
    scores, found = collection.search(rows_of(7), 1)
    assert (found[:, 0] == np.arange(7)).all()
    assert scores == pytest.approx(np.ones((7, 1)), abs=1e-5)
    plain, whitening = whitened(tmp_path / "plain", False)
    assert plain.vectors == pytest.approx((rows_of(7) - whitening.mean) @ whitening.projection, rel=1e-4)


def test_a_collection_keeps_its_own_whitening_and_refuses_another(tmp_path: Path) -> None:
    whitened(tmp_path, True)
    save(learn(rows_of(40, seed=3), 3, {}, {}), tmp_path / "whitening.npz")
    with pytest.raises(InputError, match=r"whitening\.npz is another than the card names"):
        open_collection(tmp_path)
    (tmp_path / "whitening.npz").unlink()
    with pytest.raises(InputError, match="is damaged"):
        open_collection(tmp_path)
    write(tmp_path, rows_of(7))
    whitened(tmp_path, True)
    assert write(tmp_path, rows_of(7)).whitening is None
    assert not (tmp_path / "whitening.npz").exists(), "that of the collection before"


def test_files_of_one_collection_under_the_card_of_another_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", rows_of(7))
    write(tmp_path / "b", rows_of(7, dim=6), dtype="fp16")
    for name in ("vectors.npy", "index.faiss", "card.json"):
        whole = (tmp_path / "a" / name).read_bytes()
        (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
        with pytest.raises(InputError, match="is damaged"):
            open_collection(tmp_path / "a")
        (tmp_path / "a" / name).write_bytes(whole)
    assert open_collection(tmp_path / "a").names == NAMES


def test_files_that_a_killed_process_did_not_name_are_said_and_named_later(tmp_path: Path) -> None:
    write(tmp_path / "old", rows_of(5, seed=4))
    write(tmp_path / "whole", rows_of(7))
    new = tmp_path / "old" / ".new"
    new.mkdir()
    for name in FILES:
        (new / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    (tmp_path / "old" / "card.json").unlink()
    (new / "vectors.npy").rename(tmp_path / "old" / "vectors.npy")
    with pytest.raises(InputError, match=r"run the run_extract\.py command that wrote it again"):
        open_collection(tmp_path / "old")
    finish_renaming(tmp_path / "old")
    assert open_collection(tmp_path / "old").names == NAMES
    assert sorted(path.name for path in (tmp_path / "old").iterdir()) == sorted(FILES)
