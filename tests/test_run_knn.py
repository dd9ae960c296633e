"""run_knn.py beyond the plain figures: few shots, classes, approximate search, several processes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from eval_fixtures import CLASSES, image_tree, tiny_checkpoint
from PIL import Image

import run_knn

ROOT = Path(run_knn.__file__).parent


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint trained on 1,020 pictures of three classes, with 15 to validate on."""
    folder = tmp_path_factory.mktemp("knn")
    return tiny_checkpoint(folder / "run", image_tree(folder / "photos", train=340, val=5))


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["run_knn.py", *map(str, words), "--num-workers", "0", "--device", "cpu"])
    run_knn.command()


def test_everything_at_once_is_printed_and_written(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        monkeypatch, "--weights", weights, "--ks", 20, 3, "--few-shot", 1, 5, 900, "--draws", 3, "--seed", 2,
        "--per-class", tmp_path / "classes.csv", "--confusion", tmp_path / "classes.png", "--approximate", "ivf",
        "--baselines", "--json", tmp_path / "knn.json",
    )  # fmt: skip
    out = capsys.readouterr().out
    card = json.loads((tmp_path / "knn.json").read_text())

    models = ["trained", "untrained", "pixels", "pixels_normalised"]
    assert [(row["model"], row["k"]) for row in card["results"]] == [(model, k) for model in models for k in (3, 20)]
    assert "recall@k %" in out
    assert card["approximate"]["trained"]["index"] == "IVF64,Flat"
    for row in card["results"]:
        measured = card["approximate"][row["model"]]
        assert row["recall"] == measured["recall_percent"][str(row["k"])] > 50
        assert measured["recall_queries"] == 15
    assert "approximate search" in card["protocol"]["name"]
    assert card["protocol"]["search"] == {"approximate": "ivf", "probes": 16}, "as they were used, none was asked for"

    few = card["few_shot"]
    assert (few["draws"], few["seed"]) == (3, 2)
    trained = {(row["shots"], row["k"]): row for row in few["results"] if row["model"] == "trained"}
    assert list(trained) == [(1, 3), (5, 3), (5, 15), (900, 3), (900, 20)]
    assert [len(row["top1_draws"]) for row in trained.values()] == [3, 3, 3, 1, 1], "900 are all"
    assert "±" in out
    assert "fewer than 900 training images" in out
    assert len({row["model"] for row in few["results"]}) == 4

    with open(tmp_path / "classes.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["class"] for row in table] == list(CLASSES)
    first = card["results"][1]  # k = 20, the first of --ks as it was typed
    assert sum(float(row["top1"]) for row in table) / 3 == pytest.approx(first["top1"], abs=0.01)
    with Image.open(tmp_path / "classes.png") as picture:
        assert min(picture.size) > 300


def test_files_may_be_named_from_the_home_folder(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "--weights", weights, "--json=~/k.json", "--per-class=~/c.csv", "--confusion=~/c.png")
    assert {path.name for path in tmp_path.iterdir()} >= {"k.json", "c.csv", "c.png"}
    assert not (tmp_path / "~").exists()


def figures(card: dict[str, Any]) -> Any:
    return card["results"], card["few_shot"]


def test_two_processes_share_the_extraction_and_report_once_what_one_reports(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--weights", weights, "--no-cache", "--few-shot", 2, "--per-class", "classes.csv"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(ROOT / "run_knn.py"), *map(str, words), "--num-workers", "0", "--json", "two.json"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("top-1 % [95% interval]") == 1
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["processes"] == 2
    assert (tmp_path / "classes.csv").is_file()
    run(monkeypatch, *words[:-1], tmp_path / "one.csv", "--json", tmp_path / "one.json")
    assert figures(two) == figures(json.loads((tmp_path / "one.json").read_text()))
