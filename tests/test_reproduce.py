"""python -m eval.reproduce on small data in ImageNet's layout: accuracies, pass and fail, and refusals.

The published weights and ImageNet are not available, so accuracies of the small data replace the published ones.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_fixtures import CLASSES, image_tree
from PIL import Image
from torchvision import transforms

import eval.reproduce
from dino_xcit.cli import parse
from dino_xcit.errors import InputError, run_main
from dino_xcit.models import build_backbone
from eval.reproduce import ReproduceConfig, read_head, reproduce

ARCH = "xcit_pico_4_p8"


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TRAIN": 24, "VAL": 18, "CLASSES": 3}.items():
        monkeypatch.setattr(eval.reproduce, name, value)
    publish(monkeypatch, 76.0, 77.8)


def publish(monkeypatch: pytest.MonkeyPatch, knn: float, linear: float) -> None:
    monkeypatch.setattr(eval.reproduce, "PUBLISHED", {ARCH: {"knn": knn, "linear": linear}})


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """{train,val}/CLASS/: eight training and six validation images for each of three classes."""
    return image_tree(tmp_path_factory.mktemp("imagenet"), train=8, val=6)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the format of DINO's trainer; student and teacher have different weights."""
    torch.manual_seed(1)
    teacher, student = (build_backbone(ARCH).state_dict() for _ in range(2))
    networks = {
        name: {f"module.backbone.{key}": value for key, value in state.items()}
        for name, state in (("teacher", teacher), ("student", student))
    }
    path = tmp_path_factory.mktemp("full") / "dino_full_checkpoint.pth"
    torch.save(networks | {"optimizer": {"state": {}, "param_groups": []}, "epoch": 300}, path)
    return path


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head in DINO's published format; it is untrained, so some predictions are wrong."""
    path = tmp_path_factory.mktemp("linear") / "dino_linearweights.pth"
    state = {"module.linear.weight": torch.randn(3, 64) / 8, "module.linear.bias": torch.tensor([0.1, -0.1, 0.0])}
    torch.save({"epoch": 100, "state_dict": state, "optimizer": {}, "scheduler": {}, "best_acc": 77.8}, path)
    return path


def config_of(weights: Path, data: Path, *flags: object) -> ReproduceConfig:
    words = ["--weights", weights, "--data-path", data, "--device", "cpu", "--num-workers", "0", "--no-cache", *flags]
    return parse(ReproduceConfig, list(map(str, words)), "reproduce")


@pytest.fixture(scope="module")
def measured(imagenet: Path, weights: Path, linear: Path) -> tuple[float, float]:
    """k-NN and linear top-1 in percent by definition, one image at a time, with torchvision's transforms."""
    network = build_backbone(ARCH).eval()
    teacher = torch.load(weights, weights_only=True)["teacher"]
    network.load_state_dict({name.removeprefix("module.backbone."): value for name, value in teacher.items()})
    prepare = transforms.Compose([
        transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224),
        transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    head = torch.load(linear, weights_only=True)["state_dict"]

    def features(part: str) -> list[tuple[torch.Tensor, int]]:
        found = []
        for label, name in enumerate(CLASSES):
            for path in sorted((imagenet / part / name).iterdir()):
                with torch.inference_mode():
                    image = prepare(Image.open(path).convert("RGB"))
                    found.append((network(image[None]).cls_token[0].double(), label))
        return found

    known, right = features("train"), {"knn": 0, "linear": 0}
    asked = features("val")
    for query, label in asked:
        near = sorted(
            ((float(torch.cosine_similarity(query, row, dim=0)), voter) for row, voter in known), reverse=True
        )
        votes = [sum(math.exp(cosine / 0.07) for cosine, voter in near[:20] if voter == each) for each in range(3)]
        right["knn"] += votes.index(max(votes)) == label
        logits = head["module.linear.weight"].double() @ query + head["module.linear.bias"].double()
        right["linear"] += int(logits.argmax()) == label
    return 100 * right["knn"] / len(asked), 100 * right["linear"] / len(asked)


def test_reproduce_accuracies_match_reference_implementation(
    imagenet: Path, weights: Path, linear: Path, measured: tuple[float, float], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert len({0.0, 100.0, *measured}) == 4  # trivial or equal accuracies would prove nothing
    publish(monkeypatch, measured[0] + 0.3, measured[1] - 0.4)
    verdicts = reproduce(config_of(weights, imagenet, "--linear", linear, "--json", tmp_path / "out.json"))
    assert [one["measure"] for one in verdicts] == ["k-NN", "linear"]
    assert [one["top1"] for one in verdicts] == pytest.approx(list(measured))
    assert [one["passed"] for one in verdicts] == [True, False]
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["measure"], result["transform"]["resize"], result["protocol"]["k"]) == ("reproduce", 256, 20)
    assert result["results"][0] == verdicts[0] | {"interval": list(verdicts[0]["interval"])}


@pytest.mark.parametrize(
    ("off", "code", "said"), [(0.3, 0, "pass"), (0.4, 1, "fail: k-NN of"), (-9.0, 1, "fail: k-NN of")]
)
def test_reproduce_exit_code_is_1_if_accuracy_is_outside_tolerance(
    imagenet: Path, weights: Path, measured: tuple[float, float], off: float, code: int, said: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    publish(monkeypatch, measured[0] + off, 0)
    words = ["--weights", weights, "--data-path", imagenet, "--device", "cpu", "--num-workers", "0"]
    monkeypatch.setattr(sys, "argv", ["reproduce", *map(str, words)])
    ended = 0
    try:
        run_main(eval.reproduce.main)
    except SystemExit as ending:
        ended = int(str(ending.code))
    assert ended == code
    captured = capsys.readouterr()
    assert said in (captured.err if code else captured.out.splitlines()[-1])


# ---- refusals


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"PUBLISHED": {"xcit_small_12_p16": {}}}, "expected one of xcit_small_12_p16"),
        ({"TRAIN": 25}, "training and validation images and classes"),
        ({"VAL": 19}, "training and validation images and classes"),
        ({"CLASSES": 1000}, "training and validation images and classes"),
    ],
)
def test_reproduce_refuses_unpublished_network_and_other_data(
    imagenet: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], words: str
) -> None:
    for name, value in changed.items():
        monkeypatch.setattr(eval.reproduce, name, value)
    with pytest.raises(InputError, match=words):
        reproduce(config_of(weights, imagenet))


@pytest.mark.parametrize("state", [
    None, {"linear.weight": torch.zeros(3, 64)}, {"module.linear.weight": 3, "module.linear.bias": 4},
    {"module.linear.weight": torch.zeros(3, 64), "module.linear.bias": torch.zeros(4)},
])  # fmt: skip
def test_read_head_refuses_missing_or_misshapen_tensors(tmp_path: Path, state: object) -> None:
    torch.save({"state_dict": state}, tmp_path / "head.pth")
    with pytest.raises(InputError, match="no linear head of this network"):
        read_head(tmp_path / "head.pth", (3, 64))


@pytest.mark.parametrize("flags", [("--eval-crop", 384), ("--network", "student"), ("--allow-missing", "norm.bias"),
                                   ("--tolerance", -1)])  # fmt: skip
def test_reproduce_refuses_flags_that_change_the_protocol(
    imagenet: Path, weights: Path, flags: tuple[object, ...]
) -> None:
    with pytest.raises(InputError, match=r"leave it out|tolerance is -1"):
        config_of(weights, imagenet, *flags)
