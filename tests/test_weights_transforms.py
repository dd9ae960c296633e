"""Source of the evaluation transform: the checkpoint, config.json or preprocessor_config.json; otherwise a guess."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_checkpoints as files
import pytest
import timm
import torch
import transformers_files as hf
from export_fixtures import export

from dino_xcit.cli import parse
from dino_xcit.errors import InputError
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import load_backbone
from dino_xcit.weights.locate import ASSUMED, EXCEPTION, read_safetensors
from eval.config import KnnConfig
from eval.setup import open_backbone

OF_POSITIONS = "ImageNet's transform at 64 pixels, as its positions"
SQUASHED = ", but with a centre crop instead of squashing images to squares"


def checkpoint(folder: Path, **said: object) -> Path:
    content = {"teacher": files.prefixed("backbone.", files.vit().state_dict())}
    torch.save(content | {"eval_transform": EvalTransform().to_dict() | said}, folder / "ckpt.pth")
    return folder / "ckpt.pth"


def exported(folder: Path, **said: object) -> Path:
    metadata = {"eval_transform": json.dumps(EvalTransform().to_dict() | said)}
    return files.save_safetensors(folder / "e.safetensors", files.vit().state_dict(), metadata)


def of_timm(folder: Path, **said: object) -> Path:
    settings = {"pretrained_cfg": files.XCIT_CONFIG["pretrained_cfg"] | said}
    return files.timm_folder(folder, files.timm_xcit(), files.XCIT_CONFIG | settings)


def of_transformers(folder: Path, **said: object) -> Path:
    if "std" in said:
        said["image_std"] = said.pop("std")
    return hf.folder(folder, hf.weights("vit"), hf.VIT_CONFIG, hf.DINO_PREPROCESSOR | said)


@pytest.mark.parametrize(
    ("written", "bad"), [(checkpoint, 0.0), (exported, -1.0), (of_timm, float("nan")), (of_transformers, 0.0)]
)
def test_transform_with_nonpositive_or_nan_std_is_refused(
    tmp_path: Path, written: Callable[..., Path], bad: float
) -> None:
    with pytest.raises(InputError, match=rf"{tmp_path}.*std is 0\.2 {bad:g} 0\.2"):
        load_backbone(written(tmp_path, std=[0.2, bad, 0.2]))


# ---- guesses


@pytest.mark.parametrize(
    ("state", "guess", "transform"),
    [
        (files.vit().state_dict(), OF_POSITIONS, EvalTransform(73, 64)),
        (files.dinov2_vit()[1], "ImageNet's transform, as in DINOv2's evaluations", EvalTransform()),
        (files.xcit().state_dict(), "ImageNet's transform", EvalTransform()),
    ],
    ids=["positions", "dinov2", "xcit"],
)
def test_evaluator_warns_of_guessed_transform(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], state: dict[str, Any], guess: str, transform: EvalTransform
) -> None:
    torch.save(state, tmp_path / "bare.pth")
    words = ["--weights", str(tmp_path / "bare.pth"), "--device", "cpu"]
    read, _ = open_backbone(parse(KnnConfig, words, "run_knn.py"))
    assert (read.transform, read.transform_from, read.transform_guess) == (transform, "", guess)
    assert f"this one is a guess: {guess} (--eval-resize" in capsys.readouterr().out


def test_transform_stored_in_checkpoint_is_not_a_guess(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--weights", str(checkpoint(tmp_path, resize=64)), "--device", "cpu"]
    read, _ = open_backbone(parse(KnnConfig, words, "run_knn.py"))
    assert (read.transform, read.transform_from) == (EvalTransform(resize=64), "the checkpoint's")
    assert "guess" not in capsys.readouterr().out


def test_export_stores_guessed_transform_as_a_guess(tmp_path: Path) -> None:
    torch.save(files.vit().state_dict(), tmp_path / "bare.pth")
    export(tmp_path / "bare.pth", "safetensors", tmp_path / "out.safetensors")
    metadata = read_safetensors(tmp_path / "out.safetensors")[1]
    assert "eval_transform" not in metadata
    assert json.loads(metadata[ASSUMED])["crop"] == 64
    again = load_backbone(tmp_path / "out.safetensors")
    assert (again.transform, again.transform_guess) == (EvalTransform(73, 64), OF_POSITIONS)


def test_export_keeps_transform_exception_and_prints_it_sanitised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = of_transformers(tmp_path / "hf", size={"height": 64, "width": 64})
    for number in range(2):  # also an export of an export
        export(source, "safetensors", tmp_path / f"{number}.safetensors")
        source = tmp_path / f"{number}.safetensors"
        assert f"{SQUASHED}\n" in capsys.readouterr().out
    again = load_backbone(source)
    assert (again.transform_from, again.transform_exception) == (f"the checkpoint's{SQUASHED}", SQUASHED)
    said = {"eval_transform": json.dumps(EvalTransform().to_dict()), EXCEPTION: "\x1b[31m\n" + "x" * 9999}
    path = files.save_safetensors(tmp_path / "a.safetensors", files.vit().state_dict(), said)
    shown = load_backbone(path).transform_from
    assert shown.isprintable()
    assert len(shown) < 999


# ---- timm's config.json


def test_timm_config_json_sets_transform(tmp_path: Path) -> None:
    path = of_timm(tmp_path)
    read = load_backbone(path)
    assert (read.transform, read.transform_from) == (files.XCIT_TRANSFORM, "config.json's of model.safetensors")
    before_0_9 = files.XCIT_CONFIG["pretrained_cfg"] | {"architecture": "xcit_nano_12_p16_224"}
    assert load_backbone(files.timm_folder(tmp_path, files.timm_xcit(), before_0_9)).transform == files.XCIT_TRANSFORM
    read = load_backbone(of_timm(tmp_path, crop_mode="squash"))
    assert read.transform_from.endswith("but with a centre crop instead of crop_mode 'squash'")
    (tmp_path / "config.json").write_text('{"model_type": "another library"}')
    assert load_backbone(path).transform_from == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_size": [3, 64, 32]}, "expected a square"), ({"input_size": [3, 10**9, 10**9]}, "expected a square"),
        ({"input_size": [3, "a", "a"]}, "invalid literal"), ({"crop_pct": float("nan")}, "expected a square"),
        ({"interpolation": "random"}, "'random'"),
        ({"mean": [0.5]}, "mean has 1 numbers and std 3, expected one each per channel"),
    ],
)  # fmt: skip
def test_invalid_timm_transform_settings_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=rf"config\.json.*{words}"):
        load_backbone(of_timm(tmp_path, **change))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"a": "' + "x" * 2**20 + '"}', "[1]"])
def test_settings_file_that_is_no_json_object_is_refused(tmp_path: Path, name: str, text: str) -> None:
    path = of_transformers(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=rf"/{name} is not a JSON"):
        load_backbone(path)


def test_file_metadata_takes_precedence_over_config_json(tmp_path: Path) -> None:
    other = {"architecture": "resnet18", "pretrained_cfg": {"input_size": [3, 99, 99], "mean": [0] * 3, "std": [1] * 3}}
    network = timm.create_model("test_vit", pretrained=False, num_classes=0)
    path = files.timm_folder(tmp_path, network, other)
    with pytest.raises(InputError, match=r"does not fit timm:resnet18 \(named by config\.json"):
        load_backbone(path)
    files.save_safetensors(path, network.state_dict(), {"arch": "timm:test_vit"})
    read = load_backbone(path)
    assert (read.arch, read.transform.crop) == ("timm:test_vit", 99)  # the metadata has no transform
    said = {"arch": "timm:test_vit", "eval_transform": json.dumps(files.XCIT_TRANSFORM.to_dict())}
    assert load_backbone(files.save_safetensors(path, network.state_dict(), said)).transform == files.XCIT_TRANSFORM


# ---- transformers' preprocessor_config.json


def prepared(path: Path, **said: object) -> tuple[EvalTransform, str]:
    read = load_backbone(hf.folder(path, hf.weights("vit"), hf.VIT_CONFIG, hf.DINOV2_PREPROCESSOR | said))
    before, _, clause = read.transform_from.partition(f"preprocessor_config.json's of {path}")
    assert before == ""
    return read.transform, clause


def test_transformers_preprocessor_config_json_sets_transform(tmp_path: Path) -> None:
    assert prepared(tmp_path) == (EvalTransform(), "")
    assert prepared(tmp_path, do_rescale=None, do_resize=None) == (EvalTransform(), "")
    assert prepared(tmp_path, do_normalize=False)[0] == EvalTransform(mean=(0.0,) * 3, std=(1.0,) * 3)
    whole = prepared(tmp_path, do_center_crop=False, resample=2)
    assert whole == (EvalTransform(256, 256, "bilinear"), ", with a centre crop")
    square = {"size": {"height": 64, "width": 64}, "do_center_crop": None, "crop_size": None}
    assert prepared(tmp_path, **square) == (EvalTransform(64, 64), SQUASHED)
    read = load_backbone(of_transformers(tmp_path))
    assert (read.transform, read.transform_exception) == (EvalTransform(resize=224), SQUASHED)
    (tmp_path / "preprocessor_config.json").unlink()
    assert load_backbone(tmp_path).transform_guess == OF_POSITIONS


@pytest.mark.parametrize(
    "changes",
    [
        {"size": {"height": 224, "width": 256}}, {"size": {}}, {"size": 10**9}, {"size": "224"}, {"resample": 99},
        {"resample": [1]}, {"image_mean": [0.5]}, {"image_std": "x"}, {"do_resize": False}, {"rescale_factor": 1.0},
        {"do_rescale": False}, {"do_center_crop": "false"}, {"do_center_crop": None}, {"crop_size": None},
        {"size": {"shortest_edge": True}}, {"crop_size": {"shortest_edge": -1}},
    ],
)  # fmt: skip
def test_invalid_transformers_transform_settings_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"evaluation transform .*preprocessor_config\.json") as caught:
        prepared(tmp_path, **changes)
    assert "\n" not in str(caught.value)
