"""run_detect.py on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from coco_fixtures import TINY, make_coco
from run_here import forked, on_two_ranks

import run_detect


@pytest.mark.process
def test_two_ranks_train_and_measure_as_one(tmp_path: Path) -> None:
    root, run = make_coco(tmp_path / "coco", val=5), tmp_path / "run"
    flags = (*TINY, "--data-path", root, "--output-dir", run)
    on_two_ranks(run_detect, tmp_path, *flags, "--batch-size-per-gpu", "1")
    files = [run / name for name in ("predictions.json", "results.json", "detections.png")]
    by_two = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    assert forked(run_detect, tmp_path, *flags) == [0]  # the run is complete: it measures again
    by_one = [file.read_bytes() for file in files]
    assert by_two[0] == by_one[0]
    assert by_two[2] == by_one[2]
    two, one = json.loads(by_two[1]), json.loads(by_one[1])
    assert two["results"] == one["results"]
    assert (two["processes"], one["processes"]) == (2, 1)
    pictures = ("--weights", run / "checkpoint.pth", "--device", "cpu", "--predict", root / "val2017")
    on_two_ranks(run_detect, tmp_path, *pictures, "--out", tmp_path / "out")
    predicted = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [one["bbox"] for one in predicted] == [one["bbox"] for one in json.loads(by_one[0])]
