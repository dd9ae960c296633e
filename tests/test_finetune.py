"""run_finetune.py: training, resuming, results, the classifier, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_fixtures import image_tree, noise_source, tiny_checkpoint
from PIL import Image
from run_here import Here, Outcome, on_two_ranks

import run_finetune
from dino_xcit import safe_load
from dino_xcit.checkpoint.state import hash_content
from dino_xcit.errors import InputError
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import load_backbone
from eval.compare import main as compare_main
from supervised.classification import ClassificationDataset, Classifier, stratified_subset
from supervised.finetune_config import RECIPES, FinetuneConfig

QUICK = ("--device", "cpu", "--num-workers", 0, "--batch-size-per-gpu", 8, "--epochs", 2, "--warmup-epochs", 0)
"""84 images: 10 steps an epoch."""


@pytest.fixture(autouse=True)
def _keep_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of kernels would affect all later tests."""
    monkeypatch.setattr("supervised.method.set_numerics", lambda *_: None)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and its data set: three classes, 84 training and 15 validation images of 40 x 32 pixels."""
    folder = tmp_path_factory.mktemp("finetune")
    return tiny_checkpoint(folder / "run", image_tree(folder / "photos", train=28, val=5))


def finetune(here: Here, *words: object) -> Outcome:
    done = here(run_finetune, *QUICK, *words)
    assert done.code == 0, done.err
    return done


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_posterize_keeps_a_bit() -> None:
    """timm's magnitude 10 asks for 0 bits, which Pillow 13 refuses."""
    source = noise_source(1)
    dataset = ClassificationDataset(source, FinetuneConfig(weights="x", auto_augment="rand-m10-inc1"), EvalTransform())
    (policy,) = (one for one in dataset._transform.transforms if hasattr(one, "ops"))
    (posterize,) = (one for one in policy.ops if one.name.startswith("Posterize"))
    posterize.prob = 1.0
    pixels = np.asarray(posterize(Image.fromarray(np.full((8, 8, 3), 200, dtype=np.uint8))))
    assert np.unique(pixels).tolist() == [128]


def test_pretrained_backbone_learns_its_data_and_two_results_compare(
    weights: Path, tmp_path: Path, here: Here, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--weights", weights, "--recipe", "own-data", "--lr", 0.02, "--crop-scale", 0.6, 1, "--auto-augment", "")
    flags = (*flags, "--erasing", 0, "--layer-decay", 0.9, "--epochs", 4)
    done = finetune(here, *flags, "--output-dir", tmp_path / "a")
    assert "the classifier is new" in done.out
    result = result_of(tmp_path / "a")
    assert result["results"]["top1"] == result["metrics"][0]["top1"] > 60, "chance is 33"
    assert result["results"]["top5"] is None
    assert result["weights"]["arch"] == "xcit_pico_4_p4"
    assert (result["data"]["train"]["images"], result["data"]["val"]["images"]) == (84, 15)
    loaded = load_backbone(tmp_path / "a" / "checkpoint.pth")
    assert (loaded.arch, loaded.transform.crop) == ("xcit_pico_4_p4", result["transform"]["crop"])
    assert loaded.hash == load_backbone(tmp_path / "a" / "backbone.pth").hash != result["weights"]["hash"]

    again = finetune(here, *flags, "--output-dir", tmp_path / "a")
    assert "already complete" in again.out
    assert result_of(tmp_path / "a")["results"] == result["results"]
    finetune(here, *flags, "--seed", 1, "--max-steps", 2, "--output-dir", tmp_path / "b")
    capsys.readouterr()
    files = [str(tmp_path / name / "results.json") for name in "ab"]
    with pytest.raises(InputError, match="seed"):
        compare_main(files)
    compare_main([*files, "--allow", "seed", "completed_steps"])
    assert "finetuned, top-1" in capsys.readouterr().out


def test_resumed_run_equals_uninterrupted_run(weights: Path, tmp_path: Path, here: Here) -> None:
    """Mixup, cutmix, erasing, the augmentation policy and drop path draw from four generators."""
    flags = ("--weights", weights, "--erasing", 0.5, "--drop-path-rate", 0.3, "--ema", 0.9, "--accumulation-steps", 2)
    flags = (*flags, "--repeated-augmentation", 3)
    finetune(here, *flags, "--max-steps", 7, "--output-dir", tmp_path / "straight")
    finetune(here, *flags, "--max-steps", 3, "--output-dir", tmp_path / "resumed")
    assert "resuming after step 3" in finetune(here, *flags, "--max-steps", 7, "--output-dir", tmp_path / "resumed").out
    contents = [safe_load.read(tmp_path / name / "checkpoint.pth") for name in ("straight", "resumed")]
    assert hash_content(contents[0]) == hash_content(contents[1])
    other = finetune(here, *flags, "--max-steps", 7, "--seed", 1, "--output-dir", tmp_path / "other")
    assert other.code == 0
    assert hash_content(safe_load.read(tmp_path / "other" / "checkpoint.pth")) != hash_content(contents[0])


@pytest.mark.process
def test_two_ranks_agree_with_one(weights: Path, tmp_path: Path, here: Here) -> None:
    """Without mixup, which pairs the images of a rank, and without BatchNorm, whose statistics the ranks share."""
    data = weights.parent.parent / "photos"
    flags = ("--weights", "none", "--arch", "vit_tiny_2_p16", "--data-path", data, "--image-size", 32)
    flags = (*flags, "--mixup", 0, "--cutmix", 0, "--drop-path-rate", 0, "--max-steps", 3)
    on_two_ranks(run_finetune, tmp_path, *QUICK, *flags, "--output-dir", tmp_path / "two")
    finetune(here, *flags, "--accumulation-steps", 2, "--output-dir", tmp_path / "one")
    one, two = (safe_load.read(tmp_path / name / "checkpoint.pth")["network"] for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=1e-4, rtol=1e-3)
    assert result_of(tmp_path / "two")["data"] == result_of(tmp_path / "one")["data"]


def test_unreadable_images_are_replaced_and_listed(weights: Path, tmp_path: Path, here: Here) -> None:
    data = shutil.copytree(weights.parent.parent / "photos", tmp_path / "photos")
    broken = sorted((data / "train" / "dots").iterdir())[0]
    broken.write_bytes(b"no image")
    flags = ("--weights", weights, "--data-path", data, "--epochs", 1, "--output-dir", tmp_path / "run")
    finetune(here, *flags)
    (line,) = (tmp_path / "run" / "unreadable_images.jsonl").read_text().splitlines()
    assert json.loads(line)["name"].endswith(broken.name)


def test_classifier_of_a_finetuned_checkpoint_is_kept(weights: Path, tmp_path: Path, here: Here) -> None:
    finetune(here, "--weights", weights, "--max-steps", 2, "--output-dir", tmp_path / "small")
    flags = ("--weights", tmp_path / "small" / "checkpoint.pth", "--recipe", "finetune-384", "--image-size", 32)
    done = finetune(
        here,
        *flags,
        "--mixup",
        0,
        "--cutmix",
        0,
        "--lr",
        0,
        "--min-lr",
        0,
        "--max-steps",
        1,
        "--output-dir",
        tmp_path / "a",
    )
    assert "the classifier is loaded" in done.out
    small, large = (safe_load.read(tmp_path / name / "checkpoint.pth") for name in ("small", "a"))
    assert torch.equal(small["network"]["classifier.weight"], large["network"]["classifier.weight"])
    assert large["eval_transform"]["crop"] == large["eval_transform"]["resize"] == 32
    network = Classifier(load_backbone(weights).backbone, classes=3)
    checkpoint = str(tmp_path / "small" / "checkpoint.pth")
    assert network.load_classifier(checkpoint, ("bars", "dots", "waves"))
    assert not network.load_classifier(checkpoint, ("bars", "dots", "stars"))
    assert not network.load_classifier(str(weights), ("bars", "dots", "waves"))


def test_share_of_the_images_is_balanced_and_keeps_every_class() -> None:
    source = noise_source(90, classes=3)
    chosen = stratified_subset(source, 0.2, seed=0)
    assert np.bincount(np.asarray(chosen.labels)).tolist() == [6, 6, 6]
    names = [chosen.name(index) for index in range(18)]
    assert names == [stratified_subset(source, 0.2, seed=0).name(index) for index in range(18)]
    assert names != [stratified_subset(source, 0.2, seed=1).name(index) for index in range(18)]
    assert len(stratified_subset(source, 0.001, seed=0)) == 3
    assert stratified_subset(source, 1.0, seed=0) is source


@pytest.mark.parametrize("arch", ["vit_tiny_2_p16", "timm:resnet18"])
def test_other_backbones_train_from_scratch(weights: Path, tmp_path: Path, here: Here, arch: str) -> None:
    data = weights.parent.parent / "photos"
    flags = ("--weights", "none", "--arch", arch, "--data-path", data, "--image-size", 32, "--max-steps", 1)
    finetune(here, *flags, "--output-dir", tmp_path / "run")
    assert load_backbone(tmp_path / "run" / "checkpoint.pth", arch=arch).arch == arch


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        ([], "no weights"),
        (["--weights", "none"], "--arch"),
        (["--weights", "none", "--arch", "xcit_pico_4_p4"], "--data-path"),
        (["--weights", "none", "--arch", "xcit_pico_4_p4", "--data-path", "sample:scenes"], "labels"),
        (["--weights", "WEIGHTS", "--batch-size-per-gpu", "7"], "--mixup 0"),
        (["--weights", "WEIGHTS", "--recipe", "finetune"], "finetune-100ep"),
        (["--weights", "WEIGHTS", "--crop-scale", "1", "0.5"], "crop_scale"),
        (["--weights", "WEIGHTS", "--auto-augment", "rand-z9"], "auto_augment"),
        (["--weights", "WEIGHTS", "--train-share", "0.04"], "--batch-size-per-gpu"),
        (["--weights", "WEIGHTS", "--arch", "xcit_pico_4_p8"], "xcit_pico_4_p4"),
    ],
)
def test_invalid_settings_are_refused(
    weights: Path, tmp_path: Path, here: Here, words: list[str], refusal: str
) -> None:
    given = [str(weights) if word == "WEIGHTS" else word for word in words]
    flags = (*QUICK, *given) if "--batch-size-per-gpu" not in given else given
    here(run_finetune, *flags, "--output-dir", tmp_path / "run").assert_refused(refusal)


def test_recipes_are_valid_and_the_supervised_one_is_the_papers() -> None:
    for recipe in RECIPES.values():
        FinetuneConfig(**recipe.settings)  # type: ignore[arg-type]
    paper = FinetuneConfig(**RECIPES["xcit-supervised-400ep"].settings)  # type: ignore[arg-type]
    assert (paper.lr, paper.lr_reference_batch, paper.epochs, paper.repeated_augmentation) == (5e-4, 512, 400, 3)
    assert (paper.mixup, paper.cutmix, paper.erasing, paper.label_smoothing) == (0.8, 1.0, 0.25, 0.1)
