"""python -m eval.compare: figures by hand, and what it refuses to compare."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import result_fixtures
from eval_fixtures import SMALL, image_tree, noise_source, tiny_checkpoint
from result_fixtures import IMAGES, KNN, hits, knn_figure, larger, write_result

import run_knn
import run_linear
from dino_xcit.data import Subset
from eval.compare.__main__ import command
from eval.compare.result_file import read_result
from eval.compare.significance import mcnemar
from eval.figures import Figure, figure
from eval.protocol import KNN_PROTOCOL

Compared = Callable[..., str]


@pytest.fixture
def compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Compared:
    """What the command prints; its comparisons are in ``out.json``."""
    return lambda *words: result_fixtures.compared(tmp_path, capsys, *words)[0]


def refusal(*words: object) -> list[str]:
    """The sentences that the command refuses with."""
    return result_fixtures.refusal(*words).split("\n")


def flipped(found: np.ndarray, lost: int, won: int) -> np.ndarray:
    """Hits that lose so many images and win so many."""
    out = found.copy()
    out[np.flatnonzero(found)[:lost]] = False
    out[np.flatnonzero(~found)[:won]] = True
    return out


# ---- the figures


def test_two_results_are_compared_image_by_image(tmp_path: Path, compared: Compared) -> None:
    base = hits(300)
    a = write_result(tmp_path / "a.json", knn_figure(20, base))
    b = write_result(tmp_path / "b.json", knn_figure(20, flipped(base, lost=5, won=21)))
    text = compared(a, b)
    first, second = json.loads((tmp_path / "out.json").read_text())["comparisons"]
    assert (first["percent"], first["difference"]) == (75.0, None)
    assert (second["percent"], second["difference"]) == (79.0, 4.0)
    assert (second["only_first"], second["only_this"]) == (5, 21)
    assert second["p"] == second["p_holm"] == mcnemar(5, 21)
    low, high = second["difference_interval"]
    assert 1.4 < low < 4 < high < 6.6, "4 +- 1.96 * sqrt(26 - 16**2 / 400) / 4"
    row = next(line for line in text.splitlines() if "b.json" in line and "+4.0" in line)
    assert row.split()[-3:] == ["5", "21", "0.0025"]
    assert "McNemar" in text
    assert "Holm" not in text, "a single test needs no correction"


def test_several_results_are_each_held_against_the_first_and_corrected_for_being_several(
    tmp_path: Path, compared: Compared
) -> None:
    base = hits(300)
    a = write_result(tmp_path / "a.json", knn_figure(20, base), knn_figure(10, base))
    changes = {"b": (5, 21), "c": (10, 11)}
    others = [
        write_result(tmp_path / f"{name}.json", *(knn_figure(k, flipped(base, *change)) for k in (20, 10)))
        for name, change in changes.items()
    ]
    text = compared(a, *others)
    found = json.loads((tmp_path / "out.json").read_text())["comparisons"]
    assert [(Path(row["file"]).stem, row["figure"].split()[1]) for row in found] == [
        (name, k) for k in ("k=20", "k=10") for name in ("a", "b", "c")
    ]
    assert [row["p_holm"] for row in found if row["p"] is not None] == pytest.approx(
        [4 * mcnemar(5, 21), 1.0, 4 * mcnemar(5, 21), 1.0]
    )
    assert "corrected for the 4 tests of this table" in text
    assert "corrected for the 2 tests" in compared(a, *others, "--figure", "k=10")


def test_figures_that_only_one_result_has_are_named_and_left_out(tmp_path: Path, compared: Compared) -> None:
    a = write_result(tmp_path / "a.json", *(knn_figure(k, hits(300)) for k in (10, 20)))
    b = write_result(tmp_path / "b.json", *(knn_figure(k, hits(310)) for k in (20, 100)))
    text = compared(a, b)
    assert f"warning: only {a} has trained k=10 T=0.07 top-1" in text
    assert f"warning: only {b} has trained k=100 T=0.07 top-1" in text
    assert text.count("+2.5") == 1


def test_figures_are_chosen_by_whole_words(tmp_path: Path, compared: Compared) -> None:
    a, b = (write_result(tmp_path / f"{n}.json", *(knn_figure(k, hits(300)) for k in (20, 200))) for n in "ab")
    text = compared(a, b, "--figure", "top-1 k=20")
    assert "k=20 " in text
    assert "k=200" not in text


def test_figures_of_baselines_do_not_depend_on_the_weights_and_are_compared_on_request(
    tmp_path: Path, compared: Compared
) -> None:
    a, b = (
        write_result(tmp_path / f"{name}.json", knn_figure(20, hits(300)), knn_figure(20, hits(320), model="pixels"))
        for name in "ab"
    )
    assert "pixels" not in compared(a, b)
    assert "pixels k=20" in compared(a, b, "--figure", "pixels")


def test_the_same_weights_twice_are_told(tmp_path: Path, compared: Compared) -> None:
    a, b = (write_result(tmp_path / f"{name}.json", knn_figure(20, hits(300)), weights="f00") for name in "ab")
    assert f"warning: {b} measured the same weights as {a} (f00)" in compared(a, b)
    c = write_result(tmp_path / "c.json", knn_figure(20, hits(300)), weights="ba4")
    assert "same weights" not in compared(a, c)


def test_other_libraries_are_told(tmp_path: Path, compared: Compared) -> None:
    a, b = (write_result(tmp_path / f"{name}.json", knn_figure(20, hits(300))) for name in "ab")
    card = json.loads(b.read_text())
    card["versions"]["torch"] = "1.7"
    b.write_text(json.dumps(card))
    assert "was measured with other libraries: torch 2" in compared(a, b)


def test_a_figure_without_hits_has_neither_interval_nor_significance(tmp_path: Path, compared: Compared) -> None:
    bare = Figure("trained k=20 T=0.07 top-1", knn_figure(20, hits(300)).settings, 80.0, None)
    a, b = write_result(tmp_path / "a.json", knn_figure(20, hits(300))), write_result(tmp_path / "b.json", bare)
    text = compared(a, b)
    assert next(line for line in text.splitlines() if "+5.0" in line).split()[-4:] == ["+5.0", "-", "-", "-"]
    assert "without its hits image by image" in text


# ---- what is unlike


UNLIKE = {
    "transform": ({"transform": larger(SMALL)}, "transform: crop 8 -> 28, resize 8 -> 32"),
    "protocol": ({"protocol": KNN | {"name": "approximate"}}, f"protocol {KNN_PROTOCOL} -> approximate"),
    "search": (
        {"protocol": KNN | {"search": {"approximate": "ivf", "probes": 16}}},
        "search not set -> approximate ivf, probes 16",
    ),
    "feature": ({"protocol": KNN | {"feature": "mean"}}, "feature not set -> mean"),
    "train": ({"train": noise_source(31, seed=1)}, "other training images: 30 of 3 classes -> 31 of 3 classes"),
    "val": (
        {"val": Subset(noise_source(IMAGES + 1), np.arange(1, IMAGES + 1))},
        "other validation images (other names or labels)",
    ),
    "order": (
        {"val": Subset(noise_source(IMAGES), np.arange(IMAGES)[::-1].copy())},
        "the same validation images in another order",
    ),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_unlike_results_are_refused_by_name_and_compared_when_that_name_is_allowed(
    tmp_path: Path, compared: Compared, name: str
) -> None:
    changed, clause = UNLIKE[name]
    a = write_result(tmp_path / "a.json", knn_figure(20, hits(300)))
    b = write_result(tmp_path / "b.json", knn_figure(20, hits(320)), **changed)  # type: ignore[arg-type]
    way = f" (--allow {name} compares them all the same)"
    assert refusal(a, b) == [f"{b} cannot be compared with {a}: {clause}{way}"]
    text = compared(a, b, "--allow", name)
    assert text.splitlines()[0] == f"allowed, and unlike {a}: {b}: {clause}"
    row = next(line for line in text.splitlines() if "+5.0" in line)
    if name in ("val", "order"):
        assert row.split()[-3:] == ["-", "-", "-"], "image 5 of the one is not image 5 of the other"
        assert "the images are not paired" in text
    else:
        assert row.split()[-2] != "-"


def test_images_saved_anew_under_their_names_are_refused_too(tmp_path: Path) -> None:
    other = noise_source(IMAGES)
    other.images = other.images // 2
    a = write_result(tmp_path / "a.json", knn_figure(20, hits(300)))
    b = write_result(tmp_path / "b.json", knn_figure(20, hits(300)), val=other)
    assert "validation images of the same names, but other contents" in refusal(a, b)[0]


def test_the_same_images_under_other_names_are_compared_in_pairs(tmp_path: Path, compared: Compared) -> None:
    class Renamed(Subset):
        def name(self, index: int) -> str:
            return f"shard.tar/{index}_{super().name(index).replace('/', '%2F')}"

    packed = Renamed(noise_source(IMAGES), np.arange(IMAGES))
    a = write_result(tmp_path / "a.json", knn_figure(20, hits(300)))
    b = write_result(tmp_path / "b.json", knn_figure(20, hits(320)), val=packed)
    assert "McNemar" in compared(a, b)


def test_every_difference_of_every_file_has_a_sentence_of_its_own(tmp_path: Path) -> None:
    a = write_result(tmp_path / "a.json", knn_figure(20, hits(300)))
    b = write_result(
        tmp_path / "b.json", knn_figure(20, hits(300)), transform=larger(SMALL), train=noise_source(31, seed=1)
    )
    c = write_result(tmp_path / "c.json", figure("paper", {"classifier": "paper"}, hits(300)), measure="linear")
    sentences = refusal(a, b, c)
    assert [sentence.split(" cannot")[0] for sentence in sentences] == [str(b), str(b), str(c)]
    assert sentences[2].endswith("measure knn -> linear"), "which nothing allows"
    assert len(refusal(a, b, "--allow", "train")) == 1


def test_another_k_or_temperature_is_refused_and_compared_when_allowed(tmp_path: Path, compared: Compared) -> None:
    a = write_result(tmp_path / "a.json", knn_figure(20, hits(300)))
    b = write_result(tmp_path / "b.json", knn_figure(10, hits(320), 0.1))
    assert [sentence.split(": ")[-1] for sentence in refusal(a, b)] == [
        "T 0.07 -> 0.1 (--allow T compares them all the same)",
        "k 20 -> 10 (--allow k compares them all the same)",
    ]
    assert len(refusal(a, b, "--allow", "k")) == 1, "T still differs"
    text = compared(a, b, "--allow", "k", "T")
    assert "trained k=10 T=0.1" in text
    assert "+5.0" in text


def test_another_k_is_not_guessed_among_several(tmp_path: Path) -> None:
    a = write_result(tmp_path / "a.json", knn_figure(20, hits(300)))
    b = write_result(tmp_path / "b.json", knn_figure(10, hits(320)), knn_figure(5, hits(320)))
    assert "has several figures that differ in k: measure it with one" in refusal(a, b, "--allow", "k")[0]


# ---- mistakes in the command


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    a, b = (write_result(tmp_path / f"{name}.json", knn_figure(20, hits(300))) for name in "ab")
    cases: list[tuple[tuple[object, ...], str]] = [
        ((), "files is empty"),
        ((a,), "expected at least 2 values"),
        ((a, a), "is given more than once"),
        ((a, b, "--allow", "tranform"), "--allow tranform: no difference has that name; did you mean transform or"),
        ((a, b, "--alow", "k"), "did you mean --allow"),
        ((a, b, "--figure", "k=7"), "has no figure with 'k=7' in its name, only: trained k=20 T=0.07 top-1"),
        ((a, tmp_path / "c.json"), "c.json cannot be read: No such file or directory"),
    ]
    for words, sentence in cases:
        sentences = refusal(*words)
        assert len(sentences) == 1
        assert sentence in sentences[0]


def test_a_refusal_ends_with_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_result(tmp_path / "a.json", knn_figure(20, hits(300)))
    b = write_result(tmp_path / "b.json", knn_figure(20, hits(300)), transform=larger(SMALL))
    monkeypatch.setattr(sys, "argv", ["compare.py", str(a), str(b)])
    with pytest.raises(SystemExit) as end:
        command()
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "", "no table of what cannot be compared"
    assert captured.err.startswith(f"error: {b} cannot be compared with {a}: transform: crop 8 -> 28")


# ---- what the evaluators write


def test_what_both_evaluators_write_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compared: Compared
) -> None:
    """Two seeds of one network, by k-NN with few shots and by linear probe."""
    tree = image_tree(tmp_path / "photos")
    probe = ["--epochs", "2", "--batch-size", "4", "--holdout", "0.25", "--lrs", "0.5", "--num-workers", "0"]
    for seed in (0, 1):
        weights = tiny_checkpoint(tmp_path / str(seed), tree, seed)
        for runner, words in (
            (run_knn, ["--few-shot", "1", "2", "--ks", "1", "3", "--draws", "3"]),
            (run_linear, probe),
        ):
            json_file = tmp_path / f"{runner.__name__}-{seed}.json"
            words = ["--weights", str(weights), "--json", str(json_file), *words]
            monkeypatch.setattr(sys, "argv", [f"{runner.__name__}.py", *words])
            runner.main()

    def rows() -> list[dict[str, Any]]:
        return json.loads((tmp_path / "out.json").read_text())["comparisons"]

    knn = [tmp_path / f"run_knn-{seed}.json" for seed in (0, 1)]
    for path in knn:
        card, figures = json.loads(path.read_text()), read_result(str(path)).figures
        by_k = {row["k"]: row["top1"] for row in card["results"]}
        assert {one.settings["k"]: one.percent for one in figures if one.unit == "image"} == by_k
        assert [one.percent for one in figures if one.unit == "draw"] == [
            row["top1"] for row in card["few_shot"]["results"]
        ]
    assert "trained k=3 T=0.07 top-1" in compared(*knn)
    drawn = [row for row in rows() if row["unit"] == "draw"]
    assert {row["units"] for row in drawn} == {3}
    assert all(row["p"] is not None for row in drawn[1::2])
    probes = [tmp_path / f"run_linear-{seed}.json" for seed in (0, 1)]
    text = compared(*probes)
    for name in ("paper, last epoch", "paper, best epoch", "grid, last epoch"):
        assert name in text
    best = [row for row in rows() if row["figure"].startswith("paper, best")]
    assert best[1]["p"] is not None
    history = json.loads(probes[0].read_text())["history"]
    assert best[0]["percent"] == max(record["top1"] for record in history)
    assert refusal(knn[0], probes[0]) == [f"{probes[0]} cannot be compared with {knn[0]}: measure knn -> linear"]
    changed = json.loads(probes[1].read_text())
    changed["protocol"]["epochs"] = 3
    probes[1].write_text(json.dumps(changed))
    assert "epochs 2 -> 3 (--allow epochs" in refusal(*probes)[0]
