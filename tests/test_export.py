"""Exports: features in other libraries, replacement of earlier exports, and refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import timm
import timm.data
import torch
from export_fixtures import SMALL, checkpoint, close, export, scrambled
from torch import Tensor

from dino_xcit import export as exports
from dino_xcit.data import Subset, decode, open_source
from dino_xcit.errors import InputError
from dino_xcit.export import command, crop_share, difference, main, shown_place
from dino_xcit.models.xcit import XCIT_SIZES
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import load_backbone
from dino_xcit.weights.names import to_timm
from eval.features import extract
from eval.knn import knn_predict

Compute = Callable[[Tensor], Any]


@pytest.fixture(autouse=True)
def _small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare exports with their originals at about a twentieth of the usual number of pixels."""
    monkeypatch.setattr(exports, "XCIT_SIZES_COMPARED", ((48, 48), (56, 40), (37, 51)))


# ---- safetensors


def test_safetensors_export_has_official_names_and_origin_metadata(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path, data_path="/home/somebody/imagenet/train")
    export(weights, "safetensors", tmp_path / "out.safetensors")
    loaded = load_backbone(weights)
    with safetensors.safe_open(tmp_path / "out.safetensors", "pt") as file:
        names, said = set(file.keys()), file.metadata()
    assert names == loaded.backbone.state_dict().keys()
    assert load_backbone(tmp_path / "out.safetensors").hash == loaded.hash
    assert (said["arch"], said["network"], said["weights_hash"]) == (loaded.arch, "teacher", loaded.hash)
    assert EvalTransform.from_dict(json.loads(said["eval_transform"])) == SMALL
    assert said["data"] == ".../imagenet/train"


# ---- timm and the Hub


def test_timm_export_gives_same_features_and_knn_predictions(tmp_path: Path) -> None:
    """timm prepares the images and computes the features."""
    weights = checkpoint(tmp_path)
    export(weights, "timm", tmp_path / "out")
    loaded, back = load_backbone(weights), load_backbone(tmp_path / "out" / "model.safetensors")
    assert (back.arch, back.hash, back.transform) == (loaded.arch, loaded.hash, loaded.transform)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    ours, theirs, labels = [], [], []
    for part, count in (("train", 100), ("val", 40)):
        source = Subset(open_source("sample:fashion-mnist", part), np.arange(count))
        found = extract(loaded.backbone, source, loaded.transform, torch.device("cpu"), 0)
        ours.append(found.features)
        labels.append(found.labels)
        images = torch.stack([prepare(decode(source.read(i)[0], source.name(i))) for i in range(count)])
        with torch.no_grad():
            theirs.append(model(images).numpy())
        assert close(torch.from_numpy(theirs[-1]), torch.from_numpy(ours[-1]))
    expected, found = (knn_predict(a, labels[0], b, [1, 20], [0.07]) for a, b in (ours, theirs))
    assert all((expected[key] == found[key]).all() for key in expected)
    assert len(np.unique(expected[20, 0.07][:, 0])) > 3  # the predictions are not trivial


def test_timm_export_of_official_size_loads_under_timms_own_name(tmp_path: Path) -> None:
    export(checkpoint(tmp_path, "xcit_nano_12_p16"), "timm", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "xcit_nano_12_p16_224"
    assert not {"license", "tag"} & config["pretrained_cfg"].keys()  # those of timm's own weights do not apply
    original, weights = scrambled("xcit_nano_12_p16"), tmp_path / "out" / "model.safetensors"
    model = timm.create_model(config["architecture"], checkpoint_path=str(weights), num_classes=0).eval()
    images = torch.randn(2, 3, 96, 64)  # other sizes than the 224 pixels in the name
    with torch.no_grad():
        assert close(model(images), original(images).cls_token)
    fresh = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=7)
    assert fresh(images).shape == (2, 7)
    assert torch.equal(fresh.norm.weight, original.norm.weight)  # type: ignore[union-attr]


def test_timm_export_of_timm_model_gives_same_features(tmp_path: Path) -> None:
    backbone = scrambled("timm:test_vit")
    export(checkpoint(tmp_path, "timm:test_vit", EvalTransform(64, 64)), "timm", tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(2, 3, 96, 48)
    with torch.no_grad():
        assert torch.equal(model(images), backbone(images).cls_token)


def test_timm_export_refuses_patch_size_that_timm_lacks_with_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--to safetensors"):
        export(checkpoint(tmp_path, "xcit_pico_4_p4"), "timm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_crop_share_gives_exact_resize_in_timm_for_every_size() -> None:
    for crop in range(16, 520, 7):
        for resize in {*range(crop, 2 * crop, 3), crop - 5}:
            assert math.floor(crop / crop_share(EvalTransform(resize, crop))) == resize


def test_timm_export_refuses_different_image_preparation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "crop_share", lambda transform: 1.0)
    with pytest.raises(InputError, match="timm prepares"):
        export(checkpoint(tmp_path), "timm", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pth"]


def test_hf_export_readme_has_settings_but_no_local_paths_or_markup(tmp_path: Path) -> None:
    evil = "<script>\n```\n# z"
    args = {"data_path": "/home/somebody/pets", "lr": 3e-4, "output_dir": "/home/somebody/x", "recipe": evil}
    weights = checkpoint(tmp_path, epochs=100, **args)
    torch.save(torch.load(weights) | {"epoch": 7}, weights)
    export(weights, "hf", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert text.startswith("---\nlibrary_name: timm\n")
    for line in ("lr: 0.0003", "trained on: .../somebody/pets", f"weights (SHA-256): {load_backbone(weights).hash}"):
        assert f"\n{line}\n" in text
    assert "/home" not in text
    assert "\nepochs_trained: 7\n" in text  # the trained epochs, not the planned ones
    assert "epochs: 100" not in text
    assert text.count("\n```") == 4


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("/home/me/imagenet/train/", ".../imagenet/train"), ("~/photos", ".../~/photos"),
        ("tar:/data/in/train-{000..146}.tar", "tar:.../in/train-{000..146}.tar"),
        ("hf:org/name", "hf:org/name"), ("s3://bucket/a/b/c", "s3://bucket/a/b/c"),
    ],
)  # fmt: skip
def test_shown_place_hides_local_folders(url: str, shown: str) -> None:
    assert shown_place(url) == shown


# ---- ONNX and torch.export


def onnx_session(path: Path) -> Compute:
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert [output.name for output in session.get_outputs()] == ["cls_token", "patch_tokens"]
    assert session.get_modelmeta().custom_metadata_map["arch"] == "xcit_atom_1_p4"
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]


def torch_program(path: Path) -> Compute:
    with open(path, "rb") as file:
        return torch.export.load(file).module()


@pytest.mark.parametrize(
    ("target", "load"),
    [("onnx", onnx_session), pytest.param("torch-export", torch_program, marks=pytest.mark.slow)],
)
def test_graph_export_matches_backbone_at_any_size_and_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, load: Callable[[Path], Compute]
) -> None:
    if target == "onnx":
        pytest.importorskip("onnxscript")
    monkeypatch.setitem(XCIT_SIZES, "xcit_atom_1", dataclasses.replace(XCIT_SIZES["xcit_pico_4"], depth=1))

    path = tmp_path / f"out{exports.SUFFIXES[target]}"
    export(checkpoint(tmp_path, "xcit_atom_1_p4"), target, path, "--patch-tokens")
    compute, backbone = load(path), scrambled("xcit_atom_1_p4")
    for shape in ((1, 3, 224, 224), (3, 3, 64, 48), (2, 3, 37, 51), (1, 3, 5, 5)):
        images = torch.randn(shape)
        with torch.no_grad():
            expected, (cls_token, patch_tokens) = backbone(images), compute(images)
        assert close(cls_token, expected.cls_token)
        assert close(patch_tokens, expected.patch_tokens)


def test_onnx_export_names_missing_packages_and_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="onnxruntime: pip install"):
        export(checkpoint(tmp_path), "onnx", tmp_path / "out.onnx")


# ---- Comparison with the original


def _keys_as_values(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out, first = to_timm(state), "cls_attn_blocks.0.attn."
    return out | {f"{first}v.weight": out[f"{first}k.weight"].clone()}


def test_differing_export_is_refused_and_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, out = checkpoint(tmp_path), tmp_path / "out"
    export(weights, "timm", out)
    first = (out / "model.safetensors").read_bytes()
    monkeypatch.setattr(exports, "to_timm", _keys_as_values)
    for target in (out, tmp_path / "new"):
        with pytest.raises(InputError, match="differs"):
            export(weights, "timm", target, "--overwrite")
    assert (out / "model.safetensors").read_bytes() == first
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt.pth", "out"}


def test_difference_is_relative_and_infinite_for_unequal_shapes_and_nan() -> None:
    expected, wrong = torch.tensor([[1.0, -4.0]]), torch.tensor([[1.0, float("nan")]])
    assert difference([expected], [expected + 1]) == 0.25
    for given in ([expected, wrong], [wrong, expected], [expected, expected[:, :1]]):
        assert difference([expected, expected], given) == math.inf
    for nothing in (0 * expected, wrong):
        with pytest.raises(InputError, match="features"):
            difference([nothing], [expected])


def test_export_refuses_fewer_than_three_images(tmp_path: Path, photos: Path) -> None:
    export(checkpoint(tmp_path), "safetensors", tmp_path / "a.safetensors", "--images", str(photos))
    few = tmp_path / "few.txt"
    few.write_text("".join(f"{path}\n" for path in sorted(photos.iterdir())[:2]))
    with pytest.raises(InputError, match="2 images"):
        export(tmp_path / "ckpt.pth", "safetensors", tmp_path / "b.safetensors", "--images", str(few))


# ---- Replacement of earlier exports


def test_export_replaces_only_earlier_exports_with_overwrite(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path)
    for target, out in (("safetensors", tmp_path / "a.safetensors"), ("timm", tmp_path / "a")):
        export(weights, target, out)
        with pytest.raises(InputError, match="--overwrite"):
            export(weights, target, out)
        export(weights, target, out, "--overwrite")
    (tmp_path / "a" / ".git").mkdir()
    with pytest.raises(InputError, match="not an earlier export"):
        export(weights, "timm", tmp_path / "a", "--overwrite")
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt.pth", "a.safetensors", "a"}


def test_export_does_not_replace_its_own_input(tmp_path: Path) -> None:
    export(checkpoint(tmp_path), "safetensors", tmp_path / "a.safetensors")
    export(tmp_path / "ckpt.pth", "timm", tmp_path / "a")
    (tmp_path / "b.safetensors").symlink_to(tmp_path / "a.safetensors")
    for weights, target, out in (
        ("b.safetensors", "safetensors", "a.safetensors"),
        ("a/model.safetensors", "timm", "a"),
    ):
        with pytest.raises(InputError, match="is or contains the weights"):
            export(tmp_path / weights, target, tmp_path / out, "--overwrite")


@pytest.mark.parametrize(("target", "name"), [("safetensors", f"{'x' * 300}.safetensors"), ("timm", "x" * 300)])
def test_export_to_unwritable_path_is_refused(tmp_path: Path, target: str, name: str) -> None:
    with pytest.raises(InputError, match="cannot write"):
        export(checkpoint(tmp_path), target, tmp_path / name)


# ---- The command


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ("--weights a.pth --out b --to timmm", "timmm"),
        ("--weights a.pth --out b --to timm --patch-tokens", "patch_tokens"),
        ("--weights a.pth --out b --to onnx", r"\.onnx"),
        ("--weights a.pth --out b --to timm --tolerance nan", "tolerance"),
    ],
)
def test_export_refuses_invalid_arguments_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: str, word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=word):
        main(argv.split())
    assert not list(tmp_path.iterdir())


def test_export_command_exits_with_2_on_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["export", "--weights", "/nowhere/a.pth", "--to", "timm", "--out", "/nowhere/b"])
    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == 2
