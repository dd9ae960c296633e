"""Real files in the layouts of COCO, VOC and a video: Debian's package labelme-examples, where it is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from eval_fixtures import image_tree, tiny_checkpoint
from run_here import Here

import run_detect
import run_segment
from eval.dense import video

EXAMPLES = Path("/usr/share/doc/labelme-examples/examples")
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs Debian's package labelme-examples")
SCRATCH = ("--weights", "none", "--arch", "xcit_pico_4_p8", "--device", "cpu", "--num-workers", 0)


@pytest.fixture(autouse=True)
def _keep_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of kernels would affect all later tests."""
    monkeypatch.setattr("supervised.method.set_numerics", lambda *_: None)


def test_detector_reads_coco_annotations(here: Here, tmp_path: Path) -> None:
    folder = EXAMPLES / "instance_segmentation" / "data_dataset_coco"
    parts = [word for part in ("train", "val") for word in (
        f"--{part}-annotations", folder / "annotations.json", f"--{part}-images", folder)]  # fmt: skip
    sizes = ("--short-sides", 64, "--long-side", 96, "--test-side", 64, "--crop-probability", 0)
    small = ("--fpn-width", 16, "--box-head-width", 16, "--rois", 16, "--proposals", 20, "--batch-size-per-gpu", 3)
    done = here(run_detect, *SCRATCH, *parts, *sizes, *small, "--max-steps", 1, "--output-dir", tmp_path)
    assert done.code == 0, done.err
    assert "3 images" in done.out
    assert json.loads((tmp_path / "results.json").read_text())["data"]["train"]["images"] == 3


def test_segmenter_reads_voc_masks(here: Here, tmp_path: Path) -> None:
    folder = EXAMPLES / "semantic_segmentation" / "data_dataset_voc"
    voc = tmp_path / "VOC2012"
    (voc / "ImageSets" / "Segmentation").mkdir(parents=True)
    (voc / "JPEGImages").symlink_to(folder / "JPEGImages")
    (voc / "SegmentationClass").symlink_to(folder / "SegmentationClassPNG")
    for part, names in (("train", "2011_000003\n2011_000006\n"), ("val", "2011_000025\n")):
        (voc / "ImageSets" / "Segmentation" / f"{part}.txt").write_text(names)
    sizes = ("--short-side", 64, "--crop-size", 64, "--head-width", 16, "--batch-size-per-gpu", 2)
    done = here(run_segment, *SCRATCH, "--data-path", voc, *sizes, "--max-steps", 1, "--output-dir", tmp_path / "run")
    assert done.code == 0, done.err
    results = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
    assert len(results["classes"]) == 21
    assert 0 <= results["miou"] <= 100


def test_objects_are_followed_through_a_video(here: Here, tmp_path: Path) -> None:
    folder = EXAMPLES / "video_annotation" / "data_dataset_voc"
    clip = tmp_path / "clip"
    clip.mkdir()
    for frame in (folder / "JPEGImages").iterdir():
        (clip / frame.name).symlink_to(frame)
    (clip / "masks").symlink_to(folder / "SegmentationClassPNG")
    weights = tiny_checkpoint(tmp_path / "run", image_tree(tmp_path / "photos", train=3, val=1))
    out, file = tmp_path / "out", tmp_path / "video.json"
    done = here(video, "--weights", weights, "--data-path", clip, "--size", 64, "--out", out, "--json", file)
    assert done.code == 0, done.err
    results = json.loads(file.read_text())["results"]
    assert results["J&F"] == pytest.approx((results["J"] + results["F"]) / 2)
    assert results["J"] > 10, "the objects hardly move"
    assert (out / "clip.webp").is_file()
