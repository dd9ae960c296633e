"""run_segment.py: learning, results, pictures, resuming, two ranks, and commands that are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mask_fixtures import NAMES, save_mask, shapes
from PIL import Image
from run_here import Here, forked, on_two_ranks

import run_segment
from dino_xcit import safe_load
from dino_xcit.checkpoint.state import hash_content
from dino_xcit.data.decode import UndecodableImage
from dino_xcit.data.masks import open_masks
from dino_xcit.transform import EvalTransform
from eval import compare
from eval.miou import confusion, mean_iou
from supervised.segment_config import RECIPES, SegmentConfig
from supervised.segmentation import SegmentationDataset

NEW = ("--weights", "none", "--arch", "xcit_pico_4_p8")
SMALL = (
    "--recipe", "own-data", "--short-side", 48, "--crop-size", 48, "--batch-size-per-gpu", 4, "--num-workers", 0,
    "--device", "cpu", "--drop-path-rate", 0, "--warmup-epochs", 0, "--epochs", 2, "--log-every", 1,
)  # fmt: skip
TINY = ("--head-width", 8, "--fpn-width", 8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes(tmp_path_factory.mktemp("shapes"), train=8, val=5, side=48)


def hash_of(folder: Path) -> str:
    return hash_content(safe_load.read(folder / "checkpoint.pth"))


def test_shapes_are_learnt_and_pictures_segmented(tmp_path: Path, here: Here) -> None:
    data, run = shapes(tmp_path / "data", train=40, val=8, side=48), tmp_path / "run"
    words = (*NEW, *SMALL, "--head-width", 32, "--fpn-width", 32, "--data-path", data, "--output-dir", run,
             "--epochs", 8, "--lr", 6e-3, "--eval-every", 0, "--masks-out", tmp_path / "masks")  # fmt: skip
    done = here(run_segment, *words)
    assert done.code == 0, done.err
    result = json.loads((run / "results.json").read_text())
    found = result["results"]
    assert found["classes"] == list(NAMES)
    assert found["miou"] == pytest.approx(np.mean(found["iou"]))
    assert found["miou"] > 40  # 19 for ground everywhere
    assert f"mIoU {found['miou']:.1f} %" in done.out
    with Image.open(run / "overlays.png") as sheet:
        assert sheet.width > 3 * 320
    assert result["measure"] == "segment"
    # The predicted masks give the same score, also those of --predict; a complete run is only evaluated.
    weights = run / "checkpoint.pth"
    assert here(run_segment, "--predict", data / "images" / "val", "--weights", weights).code == 0
    _, val = open_masks(SegmentConfig(data_path=str(data), num_workers=0))
    matrix = np.zeros((4, 4), dtype=np.int64)
    for index, name in enumerate(val.names):
        predicted = np.asarray(Image.open(tmp_path / "masks" / f"{name}.png"))
        own = run / "predictions" / "masks" / f"{index:05d}-{name}.png"
        np.testing.assert_array_equal(np.asarray(Image.open(own)), predicted)
        matrix += confusion(predicted, val.mask(index, predicted.shape), 4)
    assert mean_iou(matrix) == pytest.approx(found["miou"])
    before = hash_of(run)
    again = here(run_segment, *words, "--test", "slide", "--test-stride", 16, "--json", tmp_path / "slide.json")
    assert "already complete" in again.out
    assert hash_of(run) == before
    assert abs(json.loads((tmp_path / "slide.json").read_text())["results"]["miou"] - found["miou"]) < 15


@pytest.mark.parametrize("head", [("--head", "upernet", "--head-width", 8), ("--frozen",)])
def test_a_resumed_run_equals_one_without_interruption(
    data: Path, tmp_path: Path, here: Here, head: tuple[object, ...]
) -> None:
    words = (
        *NEW,
        *SMALL,
        *head,
        "--data-path",
        data,
        "--drop-path-rate",
        0.2,
        "--eval-every",
        0,
        "--precision",
        "bf16",
    )
    assert here(run_segment, *words, "--output-dir", tmp_path / "whole").code == 0
    for steps in (2, 0):
        assert here(run_segment, *words, "--output-dir", tmp_path / "parts", "--max-steps", steps).code == 0
    assert safe_load.read(tmp_path / "whole" / "checkpoint.pth")["step"] == 4
    assert hash_of(tmp_path / "whole") == hash_of(tmp_path / "parts")


def test_two_ranks_measure_what_one_rank_measures(data: Path, tmp_path: Path, here: Here) -> None:
    words = (*NEW, *SMALL, *TINY, "--data-path", data, "--output-dir", tmp_path / "run", "--batch-size-per-gpu", 2)
    on_two_ranks(run_segment, tmp_path, *words, "--json", tmp_path / "two.json")
    assert forked(run_segment, tmp_path, *words, "--json", tmp_path / "one.json") == [0]
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["results"] == two["results"]
    assert (one["processes"], two["processes"]) == (1, 2)
    compared = here(compare, tmp_path / "one.json", tmp_path / "two.json").out
    assert compared.count(f"{one['results']['miou']:.1f}") == 2
    assert "not paired" in compared


def test_a_head_of_other_classes_is_refused_and_one_of_the_same_kept(data: Path, tmp_path: Path, here: Here) -> None:
    words = (*SMALL, *TINY, "--epochs", 1, "--max-steps", 1, "--data-path", data)
    assert here(run_segment, *NEW, *words, "--output-dir", tmp_path / "a").code == 0
    weights = tmp_path / "a" / "checkpoint.pth"
    assert "the head is loaded" in here(run_segment, "--weights", weights, *words, "--output-dir", tmp_path / "b").out
    other = shapes(tmp_path / "voc", "voc", train=4, val=1)
    words = (*words, "--output-dir", tmp_path / "c", "--data-path", other)
    here(run_segment, "--weights", weights, *words).assert_refused("classes 4", "21", "backbone.pth")
    kept = here(run_segment, "--weights", tmp_path / "a" / "backbone.pth", *words)
    assert "the head is new" in kept.out
    here(run_segment, "--predict", data, "--weights", tmp_path / "a" / "backbone.pth").assert_refused("no head")


REFUSED: dict[str, tuple[object, ...]] = {
    "--head linear": ("--frozen", "--head", "upernet"), "--frozen": ("--head", "linear"),
    "least <= most": ("--scale", 2, 1), "at most crop_size": ("--test-stride", 100),
    "--predict": ("--out", "x"), "head_width": ("--frozen", "--head-width", 8), "no data given": (),
}  # fmt: skip


@pytest.mark.parametrize("word", REFUSED)
def test_settings_are_refused(here: Here, word: str) -> None:
    here(run_segment, *NEW, *SMALL, *REFUSED[word]).assert_refused(word)


def test_upernet_needs_two_images_of_all_ranks(data: Path, tmp_path: Path, here: Here) -> None:
    words = (
        *NEW,
        *SMALL,
        "--head",
        "upernet",
        "--batch-size-per-gpu",
        1,
        "--data-path",
        data,
        "--output-dir",
        tmp_path,
    )
    here(run_segment, *words).assert_refused("at least 2 images", "--batch-size-per-gpu")


def test_pictures_are_segmented_with_the_head_sizes_and_test_mode_of_the_checkpoint(
    data: Path, tmp_path: Path, here: Here
) -> None:
    run, photos, val = tmp_path / "run", tmp_path / "photos", data / "images" / "val"
    words = (*NEW, *SMALL, "--frozen", "--test", "slide", "--test-stride", 16, "--crop-size", 32, "--short-side", 40)
    words = (*words, "--data-path", data, "--output-dir", run, "--masks-out", tmp_path / "masks", "--ema", 0.5)
    assert here(run_segment, *words).code == 0
    (photos / "more").mkdir(parents=True)
    (name, *_) = names = sorted(path.name for path in val.iterdir())
    shutil.copy(val / name, photos)
    shutil.copy(val / names[1], photos / "more" / name)  # of the same name
    (photos / "z.png").write_bytes(b"not an image")
    flags = ("--weights", run / "checkpoint.pth", "--device", "cpu", "--out", tmp_path / "out")
    done = here(run_segment, *flags, "--head", "upernet", "--predict", photos, val / name)  # the checkpoint's head
    assert done.code == 0, done.err
    assert "z.png cannot be read" in done.out
    assert "3 images segmented" in done.out
    stem = Path(name).stem
    for folder in ("masks", "overlays"):
        written = sorted(path.name for path in (tmp_path / "out" / folder).iterdir())
        assert written == [f"{index:05d}-{stem}.png" for index in (0, 1, 3)]
    for index, own in ((0, Path(names[1]).stem), (1, stem), (3, stem)):
        found, expected = (
            np.asarray(Image.open(tmp_path / file))
            for file in (f"out/masks/{index:05d}-{stem}.png", f"masks/{own}.png")
        )
        np.testing.assert_array_equal(found, expected)
    (tmp_path / "file").write_text("")
    here(run_segment, *flags, "--predict", photos, "--out", tmp_path / "file").assert_refused("out is", "cannot be")
    here(run_segment, *flags, "--predict", "nowhere").assert_refused("nowhere")
    content = safe_load.read(run / "checkpoint.pth")
    for damage in ({"args": {}}, {"ema": {}}):
        torch.save(content | damage, tmp_path / "damaged.pth")
        here(run_segment, *flags, "--weights", tmp_path / "damaged.pth", "--predict", photos).assert_refused(
            "damaged.pth"
        )


def test_a_mask_that_turned_bad_ends_the_run_without_traceback(data: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(data, tmp_path / "data"))
    config = SegmentConfig(data_path=str(root), num_workers=0, classes=4)
    train, _ = open_masks(config)
    save_mask(Path(train.masks[3]), np.full((9, 9), 1, dtype=np.uint8))
    found = SegmentationDataset(train, config, EvalTransform()).__getitems__([(0, 2), (0, 3)])
    assert isinstance(found, UndecodableImage)
    assert "train_003.png has 9 x 9 pixels" in str(found)


def test_recipes_have_valid_settings() -> None:
    for recipe in RECIPES.values():
        SegmentConfig(**recipe.settings)  # type: ignore[arg-type]
