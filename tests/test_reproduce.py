"""python -m eval.reproduce on a stand-in of ImageNet's layout: figures, pass and fail, and what is refused.

The published files and ImageNet are not here: figures of the stand-in are handed in as the published ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from eval_fixtures import CLASSES, image_tree
from last_words import last_words
from PIL import Image
from tiny_run import CPU, tiny_config
from torchvision import transforms

import eval.reproduce
from dino_xcit.cli import parse
from dino_xcit.errors import InputError, run_main
from dino_xcit.models import build_backbone
from dino_xcit.train import build_state
from dino_xcit.weights import load_backbone
from eval.compare.published import Published
from eval.reproduce import DataSet, ReproduceConfig, Verdict, check_data, read_head, reproduce

ARCH = "xcit_pico_4_p8"
WNIDS = ("n01440764", "n02111889", "n15075141")
STAND_IN = DataSet(classes=3, train=24, val=18)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """{train,val}/WNID/: eight and six images of three classes."""
    folder = image_tree(tmp_path_factory.mktemp("imagenet"), train=8, val=6)
    for part in ("train", "val"):
        for name, wnid in zip(CLASSES, WNIDS, strict=True):
            (folder / part / name).rename(folder / part / wnid)
    return folder


@pytest.fixture(scope="module")
def backbone() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return build_backbone(ARCH).state_dict()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, backbone: dict[str, torch.Tensor]) -> Path:
    """A file as DINO's trainer leaves it, with the backbone as teacher and another as student."""
    heads = build_state(tiny_config(arch=ARCH, out_dim=16), CPU).method.student.head.state_dict()
    networks = {
        name: {f"module.backbone.{key}": value for key, value in state.items()}
        | {f"module.head.{key}": value for key, value in heads.items()}
        for name, state in (("teacher", backbone), ("student", build_backbone(ARCH).state_dict()))
    }
    path = tmp_path_factory.mktemp("full") / "dino_full_checkpoint.pth"
    torch.save(
        networks
        | {"optimizer": {"state": {}, "param_groups": []}, "epoch": 300, "args": argparse.Namespace(out_dim=16),
           "dino_loss": {"center": torch.zeros(1, 16)}},
        path,
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head as DINO publishes it; untrained, so that it is wrong about some images."""
    path = tmp_path_factory.mktemp("linear") / "dino_linearweights.pth"
    state = {"module.linear.weight": torch.randn(3, 64) / 8, "module.linear.bias": torch.tensor([0.1, -0.1, 0.0])}
    torch.save({"epoch": 100, "state_dict": state, "optimizer": {}, "scheduler": {}, "best_acc": 77.8}, path)
    return path


def config_of(weights: Path, data: Path, *flags: object) -> ReproduceConfig:
    words = ["--weights", weights, "--data-path", data, "--device", "cpu", "--num-workers", "0", "--no-cache", *flags]
    return parse(ReproduceConfig, last_words(words), "reproduce")


@pytest.fixture(scope="module")
def measured(imagenet: Path, backbone: dict[str, torch.Tensor], linear: Path) -> tuple[float, float]:
    """k-NN and linear top-1 in percent by their definitions, one image at a time, with torchvision's transforms."""
    network = build_backbone(ARCH).eval()
    network.load_state_dict(backbone)
    prepare = transforms.Compose([
        transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224),
        transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    head = torch.load(linear, weights_only=True)["state_dict"]

    def features(part: str) -> list[tuple[torch.Tensor, int]]:
        found = []
        for label, wnid in enumerate(WNIDS):
            for path in sorted((imagenet / part / wnid).iterdir()):
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


def as_published(knn: float, linear: float) -> dict[str, Published]:
    return {ARCH: Published(knn, linear, "the stand-in's own")}


def test_the_figures_of_a_full_checkpoint_and_of_a_backbone_alone_are_those_of_the_definition(
    imagenet: Path, full: Path, backbone: dict[str, torch.Tensor], linear: Path, measured: tuple[float, float],
    tmp_path: Path,
) -> None:  # fmt: skip
    assert 0 < measured[0] < 100  # a figure that could come of anything shows nothing
    assert 0 < measured[1] < 100
    assert measured[0] != measured[1]
    alone = tmp_path / "dino_pretrain.pth"
    torch.save(backbone, alone)
    for weights in (full, alone):
        verdicts = reproduce(config_of(weights, imagenet, "--linear", linear), as_published(*measured), STAND_IN)
        assert [verdict.measure for verdict in verdicts] == ["k-NN", "linear"]
        assert [verdict.top1 for verdict in verdicts] == pytest.approx(list(measured))
        assert all(verdict.passed for verdict in verdicts)


@pytest.mark.parametrize(("off", "code", "word"), [
    ((0.0, 0.0), 0, "pass"), ((0.3, -0.3), 0, "pass"), ((0.4, 0.0), 1, "fail: k-NN of"),
    ((0.0, -0.4), 1, "fail: linear"), ((-9.0, 9.0), 1, "fail: k-NN and linear"),
])  # fmt: skip
def test_the_command_ends_with_0_where_every_figure_is_within_the_tolerance_and_else_with_1(
    imagenet: Path, full: Path, linear: Path, measured: tuple[float, float], off: tuple[float, float], code: int,
    word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    published = as_published(measured[0] + off[0], measured[1] + off[1])
    monkeypatch.setattr(
        eval.reproduce, "reproduce", functools.partial(reproduce, published=published, data_set=STAND_IN)
    )
    words = ["--weights", full, "--data-path", imagenet, "--linear", linear, "--device", "cpu", "--num-workers", "0"]
    monkeypatch.setattr(sys, "argv", ["reproduce", *map(str, words)])
    ended = 0
    try:
        run_main(eval.reproduce.main)
    except SystemExit as ending:
        ended = int(str(ending.code))
    assert ended == code
    said = capsys.readouterr()
    assert word in (said.err if code else said.out.splitlines()[-1])
    assert f"{ARCH}, recognised by its shapes" in said.out


def test_without_a_head_knn_is_measured_alone_and_that_is_said(
    imagenet: Path, full: Path, measured: tuple[float, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(full, imagenet, "--json", tmp_path / "out.json", "--tolerance", "0")
    (verdict,) = reproduce(config, as_published(*measured), STAND_IN)
    assert verdict.passed
    assert "linear: not measured" in capsys.readouterr().out
    card = json.loads((tmp_path / "out.json").read_text())
    assert card["measure"] == "reproduce"
    assert card["results"][0] | {"interval": 0} == {
        "measure": "k-NN", "top1": measured[0], "interval": 0, "published": measured[0], "tolerance": 0.0,
        "passed": True,
    }  # fmt: skip
    assert card["transform"]["resize"] == 256
    assert card["protocol"]["k"] == 20


def test_a_figure_beyond_the_published_one_is_no_reproduction_either() -> None:
    assert Verdict("k-NN", 76.3, (0, 0), 76.0, 0.3).passed
    assert Verdict("k-NN", 75.7, (0, 0), 76.0, 0.3).passed
    assert not Verdict("k-NN", 76.31, (0, 0), 76.0, 0.3).passed
    assert not Verdict("k-NN", 82.0, (0, 0), 76.0, 0.3).passed


# ---- what is refused


def test_a_network_without_a_published_figure_is_refused(imagenet: Path, full: Path) -> None:
    with pytest.raises(
        InputError, match=f"is {ARCH}, for which nothing was published; expected one of xcit_small_12_p16"
    ):
        reproduce(config_of(full, imagenet))


def test_another_methods_weights_are_refused_as_such_and_not_as_trained_with_labels(
    imagenet: Path, backbone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    state = backbone | {"head.weight": torch.zeros(4, 64), "head.bias": torch.zeros(4)}  # a projector of one layer
    encoders = {f"module.{name}.{key}": v for name in ("encoder_q", "encoder_k") for key, v in state.items()}
    torch.save({"state_dict": encoders}, tmp_path / "moco.pth")
    with pytest.raises(InputError, match=r"is a checkpoint of MoCo, and what was published is of DINO's weights"):
        reproduce(config_of(tmp_path / "moco.pth", imagenet), as_published(76, 77.8), STAND_IN)


@pytest.mark.parametrize("layout", ["model", "state_dict", ""])
def test_weights_that_learnt_from_labels_are_refused_in_whatever_layout(
    imagenet: Path, backbone: dict[str, torch.Tensor], tmp_path: Path, layout: str
) -> None:
    state = backbone | {"head.weight": torch.zeros(3, 64), "head.bias": torch.zeros(3)}
    torch.save({layout: state} if layout else state, tmp_path / "supervised.pth")
    with pytest.raises(InputError, match=r"was trained with labels: it has a classifier \(head\)"):
        reproduce(config_of(tmp_path / "supervised.pth", imagenet), as_published(76, 77.8), STAND_IN)


def test_the_name_model_of_a_files_weights_says_nothing_of_labels(
    imagenet: Path, backbone: dict[str, torch.Tensor], measured: tuple[float, float], tmp_path: Path
) -> None:
    torch.save({"model": backbone}, tmp_path / "model.pth")
    assert load_backbone(tmp_path / "model.pth").layout == "a model"
    (verdict,) = reproduce(config_of(tmp_path / "model.pth", imagenet), as_published(*measured), STAND_IN)
    assert verdict.passed


def test_make_asks_for_what_is_missing_before_it_builds_an_environment(tmp_path: Path) -> None:
    words = ["make", "reproduce", "DATA=/x", "PYTHON=false", f"VENV={tmp_path / 'venv'}"]
    ended = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "expected DATA, ImageNet's folder, and WEIGHTS" in ended.stderr
    assert not (tmp_path / "venv").exists()


def test_another_data_set_or_layout_is_refused(imagenet: Path, full: Path, tmp_path: Path) -> None:
    def refused(data: Path, sentence: str, expected: DataSet = STAND_IN) -> None:
        with pytest.raises(InputError, match=sentence):
            reproduce(config_of(full, data), as_published(76, 77.8), expected)

    refused(imagenet, "has 3 classes, and .* 18 images: the published figures are of 1,000 and 50,000", DataSet())
    refused(imagenet, "18 images: .* of 3 and 19", dataclasses.replace(STAND_IN, val=19))
    refused(
        imagenet, "has 24 images: the published figures are of 25; complete it", dataclasses.replace(STAND_IN, train=25)
    )
    refused(imagenet, "has 24 images: .* of 23", dataclasses.replace(STAND_IN, train=23))
    refused(image_tree(tmp_path / "named"), "has a class 'bars': expected ImageNet's wnids")
    flat = tmp_path / "flat"
    shutil.copytree(imagenet / "train", flat / "train")
    (flat / "val").mkdir()
    for wnid in WNIDS:
        for path in (imagenet / "val" / wnid).iterdir():
            shutil.copy(path, flat / "val" / f"{wnid} {path.name}")
    refused(flat, "has no labels")
    refused(tmp_path / "absent", "absent")


def test_a_few_missing_training_images_are_a_notice(imagenet: Path) -> None:
    from dino_xcit.data import open_parts

    class Long:
        def __init__(self, source: Any, length: int) -> None:
            self.url, self.classes, self._length = source.url, source.classes, length

        def __len__(self) -> int:
            return self._length

    train, val = open_parts(str(imagenet), None, None)
    expected = dataclasses.replace(STAND_IN, train=10_000)
    assert check_data(Long(train, 10_000), val, expected) == []  # type: ignore[arg-type]
    assert "lacks 10 of 10,000 images" in check_data(Long(train, 9_990), val, expected)[0]  # type: ignore[arg-type]
    with pytest.raises(InputError, match="complete it"):
        check_data(Long(train, 9_989), val, expected)  # type: ignore[arg-type]


HEADS: dict[str, tuple[object, str]] = {
    "no state_dict": ({"weight": torch.zeros(3, 64)}, "no linear head of DINO's: expected a state_dict"),
    "a backbone": ({"state_dict": {"linear.weight": torch.zeros(3, 64)}}, "expected a state_dict with module.linear"),
    "more": (
        {"state_dict": {"module.linear.weight": torch.zeros(3, 64), "module.linear.bias": torch.zeros(3),
                        "module.other": torch.zeros(1)}}, "alone"),
    "another network's": (
        {"state_dict": {"module.linear.weight": torch.zeros(3, 384), "module.linear.bias": torch.zeros(3)}},
        "but the network has 64 features"),
    "a bias of another length": (
        {"state_dict": {"module.linear.weight": torch.zeros(3, 64), "module.linear.bias": torch.zeros(4)}},
        r"and module.linear.bias of \(4,\)"),
    "a number": ({"state_dict": {"module.linear.weight": 3, "module.linear.bias": 4}}, "is no matrix"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_of_another_kind_is_refused(tmp_path: Path, kind: str) -> None:
    content, sentence = HEADS[kind]
    torch.save(content, tmp_path / "head.pth")
    with pytest.raises(InputError, match=sentence):
        read_head(tmp_path / "head.pth", 64)


def test_a_head_in_a_safetensors_file_is_the_same_head_and_another_file_of_that_kind_is_refused_by_its_keys(
    linear: Path, backbone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    state = torch.load(linear, weights_only=True)["state_dict"]
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(state, path)
    for found, stored in zip(read_head(path, 64), read_head(linear, 64), strict=True):
        assert torch.equal(found, stored)
    safetensors.torch.save_file({"backbone.norm.weight": backbone["norm.weight"]}, path)
    with pytest.raises(InputError, match=r"is no linear head of DINO's: .* alone, found backbone\.norm\.weight"):
        read_head(path, 64)
    path.write_bytes(b"1234")
    with pytest.raises(InputError, match=r"is no \.safetensors file"):
        read_head(path, 64)


def test_a_head_of_other_classes_is_refused(imagenet: Path, full: Path, tmp_path: Path) -> None:
    state = {"module.linear.weight": torch.zeros(1000, 64), "module.linear.bias": torch.zeros(1000)}
    torch.save({"state_dict": state}, tmp_path / "head.pth")
    with pytest.raises(InputError, match=r"knows 1000 classes, but .* has 3"):
        reproduce(config_of(full, imagenet, "--linear", tmp_path / "head.pth"), as_published(1, 1), STAND_IN)


@pytest.mark.parametrize("flags", [("--eval-crop", 384), ("--network", "student"), ("--allow-missing", "norm.bias"),
                                   ("--tolerance", -1), ("--data-path", "")])  # fmt: skip
def test_settings_that_would_make_it_another_measurement_are_refused(
    imagenet: Path, full: Path, flags: tuple[object, ...]
) -> None:
    with pytest.raises(InputError, match=r"leave it out|tolerance is -1|no data given"):
        config_of(full, imagenet, *flags)


def test_the_teacher_is_measured(full: Path, backbone: dict[str, torch.Tensor]) -> None:
    loaded = load_backbone(full)
    assert loaded.arch == ARCH
    np.testing.assert_array_equal(loaded.backbone.state_dict()["cls_token"], backbone["cls_token"])
