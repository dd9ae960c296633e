"""run_detect.py: a run, its files, predictions on pictures, resuming, learning."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_fixtures import CATEGORIES, TINY, annotations_of, make_coco, write_annotations
from PIL import Image
from run_here import Here

import run_detect
from dino_xcit import safe_load
from dino_xcit.checkpoint.state import hash_content


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_coco(tmp_path_factory.mktemp("coco") / "coco")


@pytest.fixture
def trained(root: Path, tmp_path_factory: pytest.TempPathFactory, here: Here) -> Path:
    """A run of four steps, shared by the tests of this file."""
    folder = tmp_path_factory.getbasetemp() / "detector"
    if not folder.exists():
        done = here(run_detect, *TINY, "--data-path", root, "--output-dir", folder)
        assert done.code == 0, done.err
        assert "epoch 2/2" in done.out
    return folder


def test_a_run_writes_predictions_a_sheet_and_scores(trained: Path, root: Path) -> None:
    found = json.loads((trained / "predictions.json").read_text())
    assert {one["category_id"] for one in found} <= set(CATEGORIES)
    assert {one["image_id"] for one in found} <= {one["id"] for one in annotations_of(root, "val")["images"]}
    assert set(found[0]) == {"image_id", "category_id", "bbox", "score", "segmentation"}
    with Image.open(trained / "detections.png") as sheet:
        assert sheet.width > 4 * 300
    result = json.loads((trained / "results.json").read_text())
    assert result["measure"] == "detect"
    assert [one["name"] for one in result["results"]["classes"]] == list(CATEGORIES.values())
    logged = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    epochs = [one for one in logged if one["kind"] != "step" and "box_ap" in one]
    assert epochs[-1]["box_ap"] == pytest.approx(result["results"]["box_ap"])
    steps = [one for one in logged if one["kind"] == "step"]
    assert steps[-1]["loss"] == pytest.approx(sum(steps[-1][name] for name in steps[-1] if name.startswith("loss_")))
    assert {path.name for path in (trained / "checkpoints").iterdir()}


def test_a_complete_run_measures_again(trained: Path, root: Path, tmp_path: Path, here: Here) -> None:
    copied = shutil.copytree(trained, tmp_path / "run")
    for name in ("predictions.json", "detections.png", "results.json"):
        (copied / name).unlink()
    done = here(run_detect, *TINY, "--data-path", root, "--output-dir", copied)
    assert done.code == 0, done.err
    assert "already complete" in done.out
    for name in ("predictions.json", "detections.png"):
        assert (copied / name).read_bytes() == (trained / name).read_bytes()
    old, new = (json.loads((folder / "results.json").read_text()) for folder in (trained, copied))
    assert old["results"] == new["results"]


def test_a_resumed_run_is_the_same_bit_for_bit(trained: Path, root: Path, tmp_path: Path, here: Here) -> None:
    flags = (*TINY, "--data-path", root, "--output-dir", tmp_path / "run")
    for stop in ("--max-steps=1", "--max-steps=3", ""):
        assert here(run_detect, *flags, *filter(None, [stop])).code == 0
    whole, parts = (safe_load.read(folder / "checkpoint.pth") for folder in (trained, tmp_path / "run"))
    assert whole["step"] == parts["step"] == 4
    assert hash_content(whole) == hash_content(parts)
    changed = parts["network"]["rpn.head.cls_logits.weight"] + 1e-6
    assert hash_content(
        parts | {"network": parts["network"] | {"rpn.head.cls_logits.weight": changed}}
    ) != hash_content(whole)


def test_a_detector_runs_on_photographs(trained: Path, root: Path, tmp_path: Path, here: Here) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    upright = Image.open(root / "val2017" / "000.png")
    upright.save(photos / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a turn by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(photos / "b.png", exif=exif)
    (photos / "c.png").write_bytes(b"not an image")
    done = here(
        run_detect, "--weights", trained / "checkpoint.pth", "--predict", photos, root / "val2017" / "001.png",
        "--out", tmp_path / "out", "--device", "cpu", "--draw-score", "0.06",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "c.png cannot be read" in done.out
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())

    def of(name: str) -> list[Any]:
        return [
            {key: one[key] for key in ("category_id", "bbox", "score", "segmentation")}
            for one in found
            if one["file_name"].endswith(name)
        ]

    validated = json.loads((trained / "predictions.json").read_text())
    expected = [{key: one[key] for key in one if key != "image_id"} for one in validated if one["image_id"] == 100]
    assert of("a.png") == of("b.png") == expected
    assert of("001.png")
    assert not of("c.png")
    drawn = sorted(path.name for path in (tmp_path / "out" / "drawn").iterdir())
    assert drawn == ["00000-a.png", "00001-b.png", "00003-001.png"]
    assert (tmp_path / "out" / "detections.png").is_file()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data-path", "ROOT"], ["--weights"]),
        ([*TINY], ["--data-path"]),
        ([*TINY, "--data-path", "ROOT", "--val-images", "nowhere"], ["nowhere", "--val-images"]),
        ([*TINY, "--data-path", "ROOT", "--val-annotations", "nowhere"], ["nowhere"]),
        ([*TINY, "--data-path", "ROOT", "--test-side", "2000"], ["long_side", "2000"]),
        ([*TINY, "--data-path", "ROOT", "--crop-sides", "9", "3"], ["crop_sides"]),
        ([*TINY, "--data-path", "ROOT", "--model", "yolo"], ["mask-rcnn, faster-rcnn"]),
        ([*TINY, "--data-path", "ROOT", "--batch-size-per-gpu", "100"], ["--batch-size-per-gpu"]),
        (["--predict", "ROOT"], ["--weights"]),
        (["--predict", "nowhere", "--weights", "TRAINED"], ["nowhere"]),
        (["--predict", "ROOT", "--weights", "OTHER"], ["not a detector", "--data-path"]),
    ],
)
def test_wrong_commands_are_refused(
    flags: list[str], words: list[str], trained: Path, root: Path, tmp_path: Path, here: Here
) -> None:
    torch.save({"student": {}, "args": {}}, tmp_path / "other.pth")
    paths = {"ROOT": root, "TRAINED": trained / "checkpoint.pth", "OTHER": tmp_path / "other.pth"}
    if "--output-dir" not in flags and "--predict" not in flags:
        flags = [*flags, "--output-dir", str(tmp_path / "run")]
    here(run_detect, *(paths.get(flag, flag) for flag in flags)).assert_refused(*words)


def test_an_unreadable_validation_image_is_refused(root: Path, tmp_path: Path, here: Here) -> None:
    copied = shutil.copytree(root, tmp_path / "coco")
    (copied / "val2017" / "001.png").write_bytes(b"")
    done = here(run_detect, *TINY, "--data-path", copied, "--output-dir", tmp_path / "run", "--max-steps", "1")
    done.assert_refused("001.png", "empty file")


def test_resuming_with_other_classes_is_refused(trained: Path, root: Path, tmp_path: Path, here: Here) -> None:
    copied, run = shutil.copytree(root, tmp_path / "coco"), shutil.copytree(trained, tmp_path / "run")
    for part in ("train", "val"):
        content = annotations_of(copied, part)
        content["categories"][0]["name"] = "square"
        write_annotations(copied, part, content)
    flags = (*TINY, "--data-path", copied, "--output-dir", run, "--resume", "changed")
    here(run_detect, *flags).assert_refused("classes")


def test_without_the_scorer_the_command_to_install_it_is_given(
    root: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    here(run_detect, *TINY, "--data-path", root).assert_refused("pip install 'dino-xcit[downstream]'")


@pytest.mark.slow
def test_a_detector_learns(tmp_path: Path, here: Here) -> None:
    root = make_coco(tmp_path / "coco", train=48, val=16, width=64)
    flags = (
        *TINY, "--data-path", root, "--model", "faster-rcnn", "--fpn-width", "32", "--box-head-width", "64",
        "--rois", "64", "--crop-probability", "0", "--epochs", "8", "--batch-size-per-gpu", "4", "--lr", "2e-3",
        "--eval-every", "0",
    )  # fmt: skip
    scores = {}
    for name, more in (("untrained", ["--lr", "0"]), ("trained", [])):
        run = tmp_path / name
        assert here(run_detect, *flags, "--output-dir", run, *more, *(["--max-steps", "1"] if more else [])).code == 0
        scores[name] = json.loads((run / "results.json").read_text())["results"]["box_ap50"]
    assert scores["untrained"] < 10
    assert scores["trained"] > 40


def test_boxes_of_a_faster_rcnn_have_no_masks(root: Path, tmp_path: Path, here: Here) -> None:
    content = annotations_of(root, "train")
    copied = shutil.copytree(root, tmp_path / "coco")
    for row in content["annotations"]:
        row.pop("segmentation")
    write_annotations(copied, "train", content)
    flags = (*TINY, "--model", "faster-rcnn", "--data-path", copied, "--output-dir", tmp_path / "run", "--ema", "0.9")
    assert here(run_detect, *flags, "--max-steps", "1").code == 0
    found = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert "segmentation" not in found[0]
    results = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
    assert "box_ap" in results
    assert "mask_ap" not in results
    assert np.isfinite(results["box_ap"])
