"""run_detect.py on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from coco_fixtures import TINY, make_coco
from run_here import forked, on_two_ranks

import run_detect

pytestmark = pytest.mark.process


def test_two_ranks_train_and_measure_as_one(tmp_path: Path) -> None:
    root = make_coco(tmp_path / "coco", val=5)
    flags = (*TINY, "--data-path", root, "--output-dir", tmp_path / "run")
    on_two_ranks(run_detect, tmp_path, *flags, "--batch-size-per-gpu", "1")
    files = [tmp_path / "run" / name for name in ("predictions.json", "results.json")]
    by_two = [json.loads(file.read_text()) for file in files]
    for file in files:
        file.unlink()
    assert forked(run_detect, tmp_path, *flags) == [0]  # complete: it measures again
    by_one = [json.loads(file.read_text()) for file in files]
    assert by_two[0] == by_one[0]
    assert len(by_one[0]) > 0
    assert by_two[1]["results"] == by_one[1]["results"]
    assert (by_two[1]["processes"], by_one[1]["processes"]) == (2, 1)
    pictures = ("--weights", tmp_path / "run" / "checkpoint.pth", "--device", "cpu", "--predict", root / "val2017")
    on_two_ranks(run_detect, tmp_path, *pictures, "--out", tmp_path / "out")
    predicted = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [one["bbox"] for one in predicted] == [one["bbox"] for one in by_one[0]]
