"""python -m eval.compare on linear probes: each kind of classifier by itself, and one kind against another."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from eval_fixtures import image_tree, tiny_checkpoint
from result_fixtures import compared, hits, refusal, write_result

import run_linear
from eval.figures import Figure, figure
from eval.linear.probe import GRID, SGD

PROBE = {"name": "SGD", "epochs": 8, "holdout": 0.1, "seed": 0}
REGRESSION = {"name": "L-BFGS", "cs": [1.0], "iterations": 100}


def classifier(name: str, right: int) -> Figure:
    return figure(f"{name}, top-1", {"classifier": name}, hits(right))


def test_a_grid_is_held_against_a_logistic_regression_only_when_that_is_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_result(tmp_path / "a.json", classifier("grid", 300), measure="linear", protocol=PROBE)
    alone = {**REGRESSION, "holdout": 0.1, "seed": 0}
    b = write_result(tmp_path / "b.json", classifier("logreg", 320), measure="linear", protocol=alone)
    clause = f"{b} cannot be compared with {a}: classifier grid -> logreg, each trained by its own rules"
    assert refusal(a, b) == f"{clause} (--allow classifier compares them all the same)", "and of no setting of either"
    text, (_, second) = compared(tmp_path, capsys, a, b, "--allow", "classifier")
    assert text.startswith(f"allowed, and unlike {a}: {b}: classifier grid -> logreg")
    assert second["difference"] == 5.0
    assert second["p"] is not None
    c = write_result(
        tmp_path / "c.json", classifier("logreg", 320), measure="linear", protocol={**alone, "holdout": 0.2}
    )
    assert "holdout 0.1 -> 0.2" in refusal(a, c, "--allow", "classifier"), "which both have"


def test_two_classifiers_of_one_file_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = classifier("paper", 290), classifier("grid", 300), classifier("logreg", 320)
    a = write_result(tmp_path / "a.json", *figures, measure="linear", protocol=PROBE | {"logreg": REGRESSION})
    words = (a, a, "--figure", "grid", "logreg", "--allow", "classifier")
    text, rows = compared(tmp_path, capsys, *words)
    assert [(row["figure"], row["difference"]) for row in rows] == [("grid, top-1", None), ("logreg, top-1", 5.0)]
    assert "same weights" not in text
    assert "given more than once" in refusal(a, a)
    assert "given more than once" in refusal(a, a, "--figure", "grid", "grid")


def test_a_regression_beside_a_probe_does_not_make_the_probes_unlike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_result(tmp_path / "a.json", classifier("grid", 300), measure="linear", protocol=PROBE)
    both = PROBE | {"logreg": REGRESSION}
    grid, regression = classifier("grid", 310), classifier("logreg", 320)
    b = write_result(tmp_path / "b.json", grid, regression, measure="linear", protocol=both)
    text, (_, second) = compared(tmp_path, capsys, a, b)
    assert second["difference"] == 2.5
    assert f"only {b} has logreg, top-1" in text
    alone = {**REGRESSION, "holdout": 0.1, "seed": 0}
    c = write_result(tmp_path / "c.json", classifier("logreg", 330), measure="linear", protocol=alone)
    assert compared(tmp_path, capsys, b, c)[1][1]["difference"] == 2.5


def test_each_kind_of_classifier_is_held_to_its_own_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of a kind that only one of the two has, or that was not asked for, decide nothing."""
    probe = PROBE | {"name": SGD + GRID, "lr": 0.001, "lrs": [0.1, 1.0], "logreg": REGRESSION}
    kinds = [classifier(kind, 300) for kind in ("paper", "grid", "logreg")]
    a = write_result(tmp_path / "a.json", *kinds, measure="linear", protocol=probe)
    cases: list[tuple[list[int], dict[str, object], str, str]] = [
        ([0], {"name": SGD, "lrs": [], "holdout": 0, "features": ["last4"]}, "paper", ""),
        ([1], {"lr": 0.5}, "grid", ""),
        ([0, 1], {"logreg": REGRESSION | {"cs": [1.0, 10.0]}}, "grid", ""),
        ([2], {"lr": 0.5, "lrs": [3.0], "epochs": 9, "name": SGD}, "logreg", ""),
        ([0, 1, 2], {"lr": 0.5}, "paper", "lr 0.001 -> 0.5 (--allow lr"),
        ([1], {"lrs": [0.1]}, "grid", "lrs 0.1 1 -> 0.1 (--allow lrs"),
        ([1], {"holdout": 0.2}, "grid", "holdout 0.1 -> 0.2"),
        ([0], {"epochs": 9}, "paper", "epochs 8 -> 9"),
        ([2], {"logreg": REGRESSION | {"cs": [1.0, 10.0]}}, "logreg", "cs 1 -> 1 10 (--allow cs"),
        (
            [1, 2], {"logreg": REGRESSION | {"cs": [1.0, 10.0]}}, "top-1",
            "cannot be compared with A: logreg: cs 1 -> 1 10 (--allow logreg",
        ),
    ]  # fmt: skip
    for number, (chosen, settings, words, clause) in enumerate(cases):
        figures = [kinds[place] for place in chosen]
        b = write_result(tmp_path / f"{number}.json", *figures, measure="linear", protocol=probe | settings)
        if clause:
            assert clause in refusal(a, b, "--figure", words).replace(str(a), "A"), number
        else:
            compared(tmp_path, capsys, a, b, "--figure", words)


def test_regressions_of_other_c_are_compared_when_that_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = image_tree(tmp_path / "photos")
    weights = tiny_checkpoint(tmp_path / "w", tree)
    written = []
    for c, features in (("1", "cls"), ("10", "cls"), ("1", "cls+mean")):
        written.append(tmp_path / f"{c}-{features}.json")
        words = ["--weights", weights, "--output-dir", written[-1].with_suffix(""), "--json", written[-1]]
        words += ["--no-sgd", "--logreg", "--logreg-cs", c, "--features", features, "--holdout", "0.25"]
        words += ["--batch-size-per-gpu", "4"]
        monkeypatch.setattr(sys, "argv", ["run_linear.py", *map(str, words)])
        run_linear.main()
    unlike = ("cs", "cs 1 -> 10"), ("features", "features not set -> cls+mean")
    for other, (name, clause) in zip(written[1:], unlike, strict=True):
        sentence = f"{other} cannot be compared with {written[0]}: {clause} (--allow {name} compares them all the same)"
        assert refusal(written[0], other) == sentence
        _, rows = compared(tmp_path, capsys, written[0], other, "--allow", name)
        assert [row["figure"] for row in rows] == ["logreg, top-1"] * 2
