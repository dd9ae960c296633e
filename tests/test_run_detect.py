"""run_detect.py: a run, its files, resuming, pictures, wrong commands, learning."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_fixtures import CATEGORIES, TINY, Content, change, make_coco
from PIL import Image
from run_here import Here

import run_detect
from dino_xcit import safe_load
from dino_xcit.checkpoint.state import hash_content
from eval import compare


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory, here: Here) -> Path:
    """Folder with data, ``coco``, and a run of four steps, ``run``; both are shared."""
    folder = tmp_path_factory.getbasetemp() / "detector"
    if not folder.exists():
        make_coco(folder / "coco")
        done = here(run_detect, *TINY, "--data-path", folder / "coco", "--output-dir", folder / "run")
        assert done.code == 0, done.err
    return folder


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def test_a_run_writes_predictions_a_sheet_and_scores(base: Path) -> None:
    run = base / "run"
    found = read(run / "predictions.json")
    assert {one["category_id"] for one in found} <= set(CATEGORIES)
    assert {one["image_id"] for one in found} == {100, 107, 114}
    assert set(found[0]) == {"image_id", "category_id", "bbox", "score", "segmentation"}
    with Image.open(run / "detections.png") as sheet:
        assert sheet.width > 4 * 300
    results = read(run / "results.json")["results"]
    assert [one["name"] for one in results["classes"]] == list(CATEGORIES.values())
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [one["box_ap"] for one in logged if "box_ap" in one][-1] == pytest.approx(results["box_ap"])
    assert "loss_rpn_box_reg" in logged[1]  # after the start of the run
    assert (run / "best.pth").exists()


def test_a_resumed_run_is_the_same_bit_for_bit(base: Path, tmp_path: Path, here: Here) -> None:
    for stop in (["--max-steps", "1"], ["--max-steps", "3"], []):
        assert here(run_detect, *TINY, "--data-path", base / "coco", "--output-dir", tmp_path / "run", *stop).code == 0
    whole, parts = (safe_load.read(folder / "run" / "checkpoint.pth") for folder in (base, tmp_path))
    assert whole["step"] == parts["step"] == 4
    assert hash_content(whole) == hash_content(parts)
    assert (tmp_path / "run" / "predictions.json").read_bytes() == (base / "run" / "predictions.json").read_bytes()
    compared = here(compare, *(folder / "run" / "results.json" for folder in (base, tmp_path)))
    assert compared.code == 0, compared.err
    assert all(word in compared.out for word in ("box AP", "mask AP", "+0.0", "not paired"))


def test_a_detector_runs_on_photographs(base: Path, tmp_path: Path, here: Here) -> None:
    photos, images = tmp_path / "photos", base / "coco" / "val2017"
    photos.mkdir()
    shutil.copy(images / "000.png", photos / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a turn by 90 degrees clockwise
    Image.open(images / "000.png").transpose(Image.Transpose.ROTATE_90).save(photos / "b.png", exif=exif)
    (photos / "c.png").write_bytes(b"not an image")
    Image.new("RGB", (300, 1)).save(photos / "d.png")
    flags = ("--weights", base / "run" / "checkpoint.pth", "--device", "cpu", "--draw-score", "0.06")
    done = here(run_detect, *flags, "--predict", photos, images / "001.png", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "c.png cannot be read" in done.out
    found = read(tmp_path / "out" / "predictions.json")

    def of(key: str, value: object, rows: list[Content]) -> list[Content]:
        left_out = ("file_name", "image_id", "category")
        chosen = [one for one in rows if one[key] == value]
        return [{name: one[name] for name in one if name not in left_out} for one in chosen]

    expected = of("image_id", 100, read(base / "run" / "predictions.json"))
    assert expected == of("file_name", str(photos / "a.png"), found) == of("file_name", str(photos / "b.png"), found)
    assert of("file_name", str(images / "001.png"), found)
    drawn = sorted(path.name for path in (tmp_path / "out" / "drawn").iterdir())
    assert drawn == ["00000-a.png", "00001-b.png", "00003-d.png", "00004-001.png"]
    assert (tmp_path / "out" / "detections.png").is_file()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data-path", "DATA"], ["--weights"]),
        ([*TINY], ["--data-path"]),
        ([*TINY, "--data-path", "DATA", "--val-images", "nowhere"], ["nowhere", "--val-images"]),
        ([*TINY, "--data-path", "DATA", "--test-side", "2000"], ["long_side", "2000"]),
        ([*TINY, "--data-path", "DATA", "--crop-sides", "60", "30"], ["crop_sides", "60 30"]),
        ([*TINY, "--data-path", "BROKEN"], ["001.png", "empty file"]),
        (["--predict", "DATA"], ["--weights"]),
        (["--predict", "nowhere", "--weights", "DETECTOR"], ["nowhere"]),
        (["--predict", "DATA", "--weights", "OTHER"], ["OTHER is not a detector", "--data-path"]),
        (["--predict", "DATA", "--weights", "DAMAGED"], ["DAMAGED is not a detector", "Missing key"]),
    ],
)
def test_wrong_commands_are_refused(base: Path, flags: list[str], words: list[str], tmp_path: Path, here: Here) -> None:
    torch.save({"student": {}, "args": {}}, tmp_path / "OTHER")
    paths = {"DATA": base / "coco", "DETECTOR": base / "run" / "checkpoint.pth"}
    torch.save(safe_load.read(paths["DETECTOR"]) | {"network": {}}, tmp_path / "DAMAGED")
    paths |= {name: tmp_path / name for name in ("BROKEN", "OTHER", "DAMAGED")}
    if "BROKEN" in flags:
        shutil.copytree(base / "coco", paths["BROKEN"])
        (paths["BROKEN"] / "val2017" / "001.png").write_bytes(b"")
    first = ("--output-dir", tmp_path / "new", "--out", tmp_path / "out")
    here(run_detect, *first, *(paths.get(flag, flag) for flag in flags)).assert_refused(*words)


def test_without_the_scorer_the_command_to_install_it_is_given(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    here(run_detect, *TINY).assert_refused("pip install 'dino-xcit[downstream]'")


@pytest.mark.slow
def test_a_detector_of_boxes_learns(tmp_path: Path, here: Here) -> None:
    root = make_coco(tmp_path / "coco", train=48, val=16, width=64)
    change(root, annotations=lambda rows: [{k: v for k, v in row.items() if k != "segmentation"} for row in rows])
    flags = (
        *TINY, "--data-path", root, "--model", "faster-rcnn", "--fpn-width", "32", "--box-head-width", "64", "--rois",
        "64", "--crop-probability", "0", "--epochs", "8", "--batch-size-per-gpu", "4", "--eval-every", "0",
    )  # fmt: skip
    scores = []
    for lr, more in (("0", ["--max-steps", "1"]), ("2e-3", ["--ema", "0.9"])):
        assert here(run_detect, *flags, "--output-dir", tmp_path / lr, "--lr", lr, *more).code == 0
        scores.append(read(tmp_path / lr / "results.json")["results"]["box_ap50"])
    assert scores[1] > scores[0] + 30
    assert "segmentation" not in read(tmp_path / "2e-3" / "predictions.json")[0]
