"""Exports to safetensors, ONNX and torch programs; how they are compared with the original; the command."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from export_fixtures import SMALL, checkpoint, close, export, scrambled
from torch import Tensor

from dino_xcit.errors import InputError
from dino_xcit.export import onnx_file
from dino_xcit.export.__main__ import command, main
from dino_xcit.export.comparison import Difference, differences, features_of, precise_features_of
from dino_xcit.export.photographs import Photographs, photographs
from dino_xcit.export.plain_network import Exported
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import load_backbone

# ---- safetensors


def test_safetensors_has_official_names_and_says_where_it_is_from(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path, data_path="/home/somebody/imagenet/train")
    export(weights, "safetensors", tmp_path / "out.safetensors")
    loaded = load_backbone(weights)
    with safetensors.safe_open(tmp_path / "out.safetensors", "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        said = file.metadata()
    assert state.keys() == loaded.backbone.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in loaded.backbone.state_dict().items())
    assert (said["arch"], said["network"], said["weights_hash"]) == (loaded.arch, "teacher", loaded.hash)
    assert EvalTransform.from_dict(json.loads(said["eval_transform"])) == SMALL
    assert said["data"] == ".../imagenet/train"


@pytest.mark.parametrize(("target", "file"), [("safetensors", "a.safetensors"), ("timm", "a/model.safetensors")])
def test_what_is_exported_reads_back_here_with_the_same_hash(tmp_path: Path, target: str, file: str) -> None:
    weights = checkpoint(tmp_path)
    export(weights, target, tmp_path / file.split("/")[0])
    original, back = load_backbone(weights), load_backbone(tmp_path / file)
    assert (back.arch, back.hash, back.transform) == (original.arch, original.hash, original.transform)


# ---- graphs


def test_the_plain_network_computes_the_same_under_the_same_names() -> None:
    for arch in ("xcit_pico_4_p4", "xcit_nano_12_p16"):
        backbone = scrambled(arch).double()
        plain = Exported(backbone, patch_tokens=True).eval()
        assert {f"backbone.{key}" for key in backbone.state_dict()} == set(plain.state_dict())
        for height, width in ((32, 32), (64, 48), (37, 51)):  # fewer and more tokens than features a head
            images = torch.randn(2, 3, height, width, dtype=torch.float64)
            with torch.no_grad():
                out, (cls_token, patch_tokens) = backbone(images), plain(images)
            torch.testing.assert_close(cls_token, out.cls_token, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(patch_tokens, out.patch_tokens, rtol=1e-10, atol=1e-10)


def test_onnxruntime_computes_the_same_at_any_size_and_batch(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    weights = checkpoint(tmp_path, "xcit_pico_4_p4")
    export(weights, "onnx", tmp_path / "out.onnx", "--patch-tokens")
    session = onnxruntime.InferenceSession(str(tmp_path / "out.onnx"))
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert [output.name for output in session.get_outputs()] == ["cls_token", "patch_tokens"]
    said = session.get_modelmeta().custom_metadata_map
    assert (said["arch"], said["weights_hash"]) == ("xcit_pico_4_p4", load_backbone(weights).hash)
    backbone = scrambled("xcit_pico_4_p4")
    for shape in ((1, 3, 224, 224), (3, 3, 64, 48), (2, 3, 37, 51), (1, 3, 4, 4)):
        images = torch.randn(shape)
        with torch.no_grad():
            expected = backbone(images)
        cls_token, patch_tokens = session.run(None, {"images": images.numpy()})
        assert close(torch.from_numpy(cls_token), expected.cls_token)
        assert close(torch.from_numpy(patch_tokens), expected.patch_tokens)


@pytest.mark.slow
def test_a_torch_program_computes_the_same_at_any_size_and_batch(tmp_path: Path) -> None:
    export(checkpoint(tmp_path, "xcit_pico_4_p4"), "torch-export", tmp_path / "out.pt2")
    with open(tmp_path / "out.pt2", "rb") as file:
        program = torch.export.load(file).module()
    backbone = scrambled("xcit_pico_4_p4")
    for shape in ((1, 3, 224, 224), (3, 3, 64, 48), (2, 3, 37, 51), (1, 3, 5, 5)):
        images = torch.randn(shape)
        with torch.no_grad():
            (cls_token,) = program(images)
            assert close(cls_token, backbone(images).cls_token)


def test_a_package_that_is_missing_is_named_with_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "PACKAGES", ("onnx_of_nowhere", "torch"))
    with pytest.raises(InputError, match=r"--to onnx needs onnx_of_nowhere: pip install onnx_of_nowhere"):
        export(checkpoint(tmp_path), "onnx", tmp_path / "out.onnx")


# ---- what is compared, and when it is the same


def test_a_transform_that_nobody_said_stays_a_guess_that_somebody_may_correct(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(scrambled("xcit_pico_4_p8").state_dict(), tmp_path / "bare.pth")
    export(tmp_path / "bare.pth", "hf", tmp_path / "a")
    said = capsys.readouterr().out
    assert "warning: the file does not say how images are prepared; assumed: ImageNet's way" in said
    assert "config.json tells it to timm" in said
    assert "assumed here and in config.json is ImageNet's way" in (tmp_path / "a" / "README.md").read_text()
    again = load_backbone(tmp_path / "a" / "model.safetensors")
    assert (again.transform, again.transform_from) == (EvalTransform(), "")
    path = tmp_path / "a" / "config.json"
    path.write_text(path.read_text().replace('"bicubic"', '"bilinear"'))
    assert load_backbone(tmp_path / "a" / "model.safetensors").transform.interpolation == "bilinear"


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_features_that_say_nothing_are_not_compared(tmp_path: Path, value: float) -> None:
    backbone = scrambled("xcit_pico_4_p8")
    with torch.no_grad():
        backbone.norm.weight.fill_(value)  # type: ignore[union-attr,operator]
        backbone.norm.bias.fill_(value)  # type: ignore[union-attr,operator]
    torch.save(backbone.state_dict(), tmp_path / "b.pth")
    with pytest.raises(InputError, match=r"all zero|not finite"):
        export(tmp_path / "b.pth", "safetensors", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_another_shape_and_a_value_that_is_not_finite_are_differences_without_bound() -> None:
    original = features_of(scrambled("xcit_pico_4_p8"), patch_tokens=False)

    def nan_at_one_place(images: Tensor) -> tuple[Tensor, ...]:
        (out,) = original(images)
        out[0, 0] = float("nan")
        return (out,)

    for wrong in (nan_at_one_place, lambda images: (original(images)[0][:, :-1],)):
        (found,) = differences(original, wrong, [(28, 28)], photographs(), SMALL)
        assert found.relative == math.inf


def test_rounding_passes_and_nothing_beyond_it() -> None:
    def difference(relative: float, rounding: float) -> bool:
        return Difference((28, 28), 4, relative, rounding).passes(1e-5)

    assert difference(9e-6, 0)
    assert difference(4e-5, 1e-5)  # deep networks, sums in another order
    assert not difference(4e-5, 1e-6)
    assert not difference(4e-5, 0)
    assert not difference(2e-3, 1e-2)  # a network whose rounding is as large has no features
    assert not difference(math.inf, 1e-2)
    backbone = scrambled("xcit_pico_4_p8")
    original, precise = features_of(backbone, True), precise_features_of(backbone, True)
    (found,) = differences(original, original, [(64, 48)], photographs(), SMALL, precise)
    assert found.relative == 0
    assert 1e-8 < found.rounding < 1e-5


# ---- the images that are compared on


def test_the_images_are_real_ones_and_those_asked_for_where_some_were(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(photographs().images) >= 3
    assert photographs(str(photos)).images[0].size == (24, 20)
    monkeypatch.setattr("dino_xcit.export.photographs._SCIKIT_IMAGE", ())
    assert photographs().origin.startswith("sample:fashion-mnist")
    assert len(photographs().images) >= 3
    (tmp_path / "few").mkdir()
    for path in sorted(photos.iterdir())[:2]:
        (tmp_path / "few" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="holds 2 images, expected at least 3"):
        photographs(str(tmp_path / "few"))


def test_a_batch_has_the_size_asked_for_and_no_distortion(photo: Any) -> None:
    batch = Photographs("here", (photo,)).batch(1, (46, 130), SMALL)
    assert batch.shape == (1, 3, 46, 130)
    middle = torch.from_numpy(np.array(photo)[22:68]).permute(2, 0, 1) / 255
    assert torch.allclose(batch[0] * 0.353 + 0.286, middle, atol=1e-6)


# ---- the command


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("", "no --weights given"),
        ("--weights a.pth", "no --out given"),
        ("--weights a.pth --out b", "to is '', expected one of timm, safetensors, hf, onnx, torch-export"),
        ("--weights a.pth --out b --to timmm", "to is 'timmm'"),
        ("--weights a.pth --out b --to timm --patch-tokens", "output of onnx and torch-export"),
        ("--weights a.pth --out b --to timm --card c.json", "card goes into the model card"),
        ("--weights a.pth --out b --to onnx", r"out is b, expected a file that ends in \.onnx"),
        ("--weights a.pth --out b --to timm --tolerance 1", r"tolerance is 1\.0, expected 0 to 0\.01"),
        ("--weights a.pth --out b --to timm --tolerance nan", "tolerance is nan"),
        ("--weights a.pth --out b --to timm --wieghts c", "did you mean --weights"),
        ("--weights /nowhere/a.pth --out b --to timm", "no file /nowhere/a.pth"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: str, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=sentence) as caught:
        main(argv.split())
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_command_ends_with_two_and_a_sentence_for_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["export", "--weights", "/nowhere/a.pth", "--to", "timm", "--out", "/nowhere/b"])
    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: there is no file /nowhere/a.pth")
