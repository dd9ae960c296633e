"""python -m eval.compare on few shots and on searches."""

from __future__ import annotations

import base64
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_fixtures import image_tree, noise_source, tiny_checkpoint
from numpy.typing import NDArray
from PIL import Image
from result_fixtures import KNN, compared, hits, knn_figure, refusal, write_result

import run_retrieval
from dino_xcit.data import Subset
from dino_xcit.errors import InputError
from eval.compare.result_file import read_result
from eval.figures import Figure, few_shot_figure, query_figure

# ---- few shots


def few(top1: list[float], drawn: str = "d", seed: int = 0, takes_all: bool = False) -> Figure:
    record = {"shots": 5, "k": 20, "temperature": 0.07, "top1_draws": top1, "drawn": drawn, "takes_all": takes_all}
    return few_shot_figure("trained", record, len(top1), seed)


def test_few_shots_are_compared_draw_by_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_result(tmp_path / "a.json", few([50.0, 54.0, 46.0]))
    b = write_result(tmp_path / "b.json", few([52.0, 55.0, 49.0]))
    text, (first, second) = compared(tmp_path, capsys, a, b)
    assert (first["percent"], second["difference"]) == (50.0, 2.0)
    low, high = second["difference_interval"]
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5)), "gains 2, 1, 3: deviation 1"
    assert second["p"] == pytest.approx(0.0741799, abs=1e-6)
    assert second["only_first"] is None
    assert "Student's t over the draws" in text
    assert "McNemar" not in text
    assert "top-1 % [95%]" not in text, "the interval is no longer of images"


def test_draws_of_other_images_are_not_compared_in_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_result(tmp_path / "a.json", few([50.0, 54.0, 46.0]))
    others = {
        "rows": write_result(tmp_path / "b.json", few([52.0, 55.0, 49.0], drawn="other")),
        "order": write_result(
            tmp_path / "c.json",
            few([52.0, 55.0, 49.0]),
            train=Subset(noise_source(30, seed=1), np.arange(30)[::-1].copy()),
        ),
    }
    for path in others.values():
        _, (_, second) = compared(tmp_path, capsys, a, path)
        assert (second["difference"], second["difference_interval"], second["p"]) == (2.0, None, None)
        assert second["unknown"] == "the two files drew other images, so that they are not paired"


def test_draws_that_are_all_the_same_tell_nothing_and_are_no_test_to_correct_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def shots(number: int, top1: list[float]) -> Figure:
        one = few(top1)
        return dataclasses.replace(one, name=f"{number} a class", settings={**one.settings, "shots": number})

    third = 100 / 3
    a = write_result(tmp_path / "a.json", shots(1, [50.0, 54.0]), shots(2, [third, 40.0]), shots(9, [third] * 5))
    b = write_result(tmp_path / "b.json", shots(1, [51.0, 56.0]), shots(2, [35.1, 35.1 + 20 / 3]), shots(9, [60.1] * 5))
    text, rows = compared(tmp_path, capsys, a, b)
    varied, shifted, same = rows[1::2]
    assert varied["p"] == varied["p_holm"], "the others are no tests"
    for row in (shifted, same):
        assert (row["difference_interval"], row["p"], row["p_holm"]) == (None, None, None)
    assert shifted["interval"] is not None
    assert same["interval"] is None
    assert "Holm" not in text
    assert "no interval: all draws have the same accuracy, which does not tell how far others would be" in text
    assert "no interval: all draws differ by the same" in text


def test_where_all_images_were_taken_there_are_no_other_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_result(tmp_path / "a.json", few([50.0], takes_all=True))
    b = write_result(tmp_path / "b.json", few([60.0], takes_all=True))
    text, (_, second) = compared(tmp_path, capsys, a, b)
    assert (second["difference"], second["difference_interval"], second["p"]) == (10.0, None, None)
    assert "all training images were taken: there are no other draws" in text
    assert "--draws 5" not in text


def test_draws_of_another_seed_are_other_figures(tmp_path: Path) -> None:
    a = write_result(tmp_path / "a.json", few([50.0, 54.0]))
    b = write_result(tmp_path / "b.json", few([50.0, 54.0], seed=1))
    assert "seed 0 -> 1" in refusal(a, b)


def test_one_draw_has_neither_interval_nor_p(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (write_result(tmp_path / f"{name}.json", few([value])) for name, value in (("a", 50.0), ("b", 51.0)))
    text, (_, second) = compared(tmp_path, capsys, a, b)
    assert (second["difference"], second["difference_interval"], second["p"]) == (1.0, None, None)
    assert "there is one draw" in text


def test_a_figure_s_full_name_and_whole_words_choose_baselines_only_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = (knn_figure(20, hits(300)), few([50.0, 51.0]), knn_figure(20, hits(310), model="pixels"))
    a, b = (write_result(tmp_path / f"{name}.json", *figures) for name in "ab")
    for words, count in (("k=20", 2), ("trained k=20 T=0.07 top-1", 1), ("pixels k=20", 1)):
        _, rows = compared(tmp_path, capsys, a, b, "--figure", words)
        assert len(rows) == 2 * count, words


# ---- searches


def searched(path: Path, found: NDArray[Any], rows: NDArray[np.int64] | None = None, **changed: object) -> Path:
    """A result as run_retrieval.py folder writes it."""
    asked = np.arange(len(found)) if rows is None else rows
    one = query_figure("mAP@R", {"figure": "mAP@R"}, found, asked)
    protocol: Mapping[str, object] = {"name": "leave-one-out", "whitening": None, **changed}
    return write_result(path, one, measure="retrieval folder", protocol=protocol)


APS = np.random.default_rng(0).uniform(0, 100, 60)


def test_searches_are_compared_query_by_query(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gains = np.random.default_rng(1).normal(1, 2, 60)
    a, b = searched(tmp_path / "a.json", APS), searched(tmp_path / "b.json", np.clip(APS + gains, 0, 100))
    text, (first, second) = compared(tmp_path, capsys, a, b)
    assert first["percent"] == pytest.approx(APS.mean())
    low, high = second["difference_interval"]
    assert low < second["difference"] < high
    assert high - low < 1.5, "in pairs: each mean alone is known to +- 7"
    assert second["p"] < 0.01
    assert second["units"] == 60
    assert "randomisation" in text
    assert "retrieval folder" in text


def test_other_queries_are_not_paired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = searched(tmp_path / "a.json", APS), searched(tmp_path / "b.json", APS, np.arange(60) + 1)
    _, (_, second) = compared(tmp_path, capsys, a, b)
    low, high = second["difference_interval"]
    assert low < -5 < 5 < high
    assert second["p"] is None


def test_a_whitening_belongs_to_its_weights_and_what_it_was_learned_on_has_to_be_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [
        searched(tmp_path / f"{name}.json", APS, whitening={"hash": name, "learned_on": {"url": learned_on}})
        for name, learned_on in (("a", "photos"), ("b", "photos"), ("c", "paintings"))
    ]
    compared(tmp_path, capsys, *paths[:2])
    assert "--allow whitening" in refusal(paths[0], paths[2])


def picture(seed: int, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(blocks.repeat(8, axis=0).repeat(8, axis=1)).save(path)


def copydays(folder: Path) -> Path:
    for number in range(5):
        picture(number, folder / f"original/{200000 + 100 * number}.jpg")
        picture(number + 50 * (number > 2), folder / f"strong/{200001 + 100 * number}.jpg")
    return folder


def oxford(folder: Path) -> Path:
    names = [f"oxford_{number}" for number in range(4)]
    for number, name in enumerate([*names, "query_0", "query_1"]):
        picture(number % 4, folder / f"jpg/{name}.jpg")
    truth = [{"bbx": [0, 0, 40, 32], "junk": [2], "easy": [number], "hard": [3] if number else []} for number in (0, 1)]
    content = {"imlist": names, "qimlist": ["query_0", "query_1"], "gnd": truth}
    (folder / "gnd_roxford5k.json").write_text(json.dumps(content))
    return folder


def test_what_run_retrieval_writes_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two seeds of one network, by three protocols."""
    tree = image_tree(tmp_path / "photos")
    weights = [tiny_checkpoint(tmp_path / str(seed), tree, seed) for seed in (0, 1)]
    figures = {
        "folder": {"recall@1", "recall@8", "R-precision", "mAP@R"},
        "copydays": {"strong -> original mAP", "original -> strong mAP"},
        "oxford": {"easy mAP", "medium mAP", "hard mAP"},
    }
    places = {
        "folder": tree / "val", "copydays": copydays(tmp_path / "copydays"), "oxford": oxford(tmp_path / "oxford"),
    }  # fmt: skip
    for protocol, place in places.items():
        written = [tmp_path / f"{protocol}-{seed}.json" for seed in (0, 1)]
        for one, path in zip(weights, written, strict=True):
            words = [protocol, "--weights", one, "--data-path", place, "--no-cache", "--json", path]
            if protocol != "folder":
                words += ["--image-size", 32]
            monkeypatch.setattr(sys, "argv", ["run_retrieval.py", *map(str, words)])
            run_retrieval.main()
        _, rows = compared(tmp_path, capsys, *written)
        assert figures[protocol] <= {row["figure"] for row in rows}
        assert all(row["p"] is not None for row in rows[1::2]), "all in pairs"
        stated = json.loads(written[0].read_text())["results"]
        key = {"folder": "map@r"}.get(protocol, "map")
        assert rows[-2]["percent"] == pytest.approx(stated[-1][key])
    assert "measure retrieval folder -> retrieval copydays" in refusal(
        tmp_path / "folder-0.json", tmp_path / "copydays-1.json"
    )


# ---- nothing is believed


WRONG: list[tuple[str, object, str]] = [
    ("unit", "pixel", "unit is pixel, expected image, query, draw"),
    ("count", 0, "count is 0, expected a count"),
    ("count", 59, "240 bytes for 59 values"),
    ("values", "AAAA" * 80, "its hits make 0.0000, but it says"),
    ("values", base64.b64encode(np.full(60, np.nan, dtype="<f4")).decode(), "a value is no percentage"),
    ("values", "?", "no base64"),
    ("values", "é", "no base64"),
    ("percent", -1, "percent is -1, expected percent"),
    ("which", 3, "which is 3, expected a word"),
    ("which", "\x1b[2J", "expected a word"),
]


@pytest.mark.parametrize(("key", "value", "sentence"), WRONG)
def test_a_damaged_figure_of_queries_is_refused_in_a_sentence(
    tmp_path: Path, key: str, value: object, sentence: str
) -> None:
    path = searched(tmp_path / "a.json", APS)
    card = json.loads(path.read_text())
    card["figures"][0][key] = value
    path.write_text(json.dumps(card))
    with pytest.raises(InputError) as error:
        read_result(str(path))
    assert sentence in str(error.value)


def test_a_result_without_what_its_figures_are_means_of_says_what_to_do(tmp_path: Path) -> None:
    path = write_result(tmp_path / "a.json", measure="retrieval duplicates", protocol=KNN)
    with pytest.raises(InputError, match="without figures image by image or query by query: either there are none"):
        read_result(str(path))
