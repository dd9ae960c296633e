"""Exports, re-loaded by the libraries they are for; files that differ from their original never appear."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import timm
import timm.data
import torch
from export_fixtures import SMALL, checkpoint, export, scrambled
from safetensors.torch import save_file
from torch import Tensor

from dino_xcit.data import Subset, decode, open_source
from dino_xcit.errors import InputError
from dino_xcit.export import onnx_file, timm_folder
from dino_xcit.export.__main__ import command, main
from dino_xcit.export.comparison import Difference, differences, features_of, precise_features_of
from dino_xcit.export.output import SUFFIXES
from dino_xcit.export.photographs import Photographs, photographs
from dino_xcit.export.plain_network import Exported
from dino_xcit.export.provenance import is_export, metadata
from dino_xcit.models import build_backbone
from dino_xcit.models.xcit import XCIT_SIZES
from dino_xcit.timm_names import to_timm
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import load_backbone
from eval.features import extract
from eval.knn import knn_predict


def sample(part: str, count: int) -> Any:
    return Subset(open_source("sample:fashion-mnist", part), np.arange(count))


def close(given: Tensor, expected: Tensor) -> bool:
    return float((given - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


# ---- timm


def test_timm_classifies_as_we_do(tmp_path: Path) -> None:
    """Features by timm's network from images that timm prepared; neighbours vote the same for every image."""
    weights = checkpoint(tmp_path)
    export(weights, "timm", tmp_path / "out")
    loaded = load_backbone(weights)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    ours, theirs, labels = [], [], []
    for part, count in (("train", 300), ("val", 100)):
        source = sample(part, count)
        found = extract(loaded.backbone, source, loaded.transform, torch.device("cpu"), 100, 0)
        ours.append(found.features)
        labels.append(found.labels)
        with torch.no_grad():
            images = torch.stack([prepare(_picture(source, index)) for index in range(count)])
            theirs.append(model(images).numpy())
        assert close(torch.from_numpy(theirs[-1]), torch.from_numpy(ours[-1]))
    expected, found = (
        knn_predict(train, labels[0], test, [1, 20], [0.07]) for train, test in ((ours[0], ours[1]), theirs)
    )
    assert all((expected[key] == found[key]).all() for key in expected)
    assert len(np.unique(expected[20, 0.07][:, 0])) > 3  # (it does tell images apart)


def _picture(source: Any, index: int) -> Any:
    return decode(source.read(index)[0], source.name(index))


def test_an_official_size_has_timms_own_name_and_loads_by_it(tmp_path: Path) -> None:
    export(checkpoint(tmp_path, "xcit_nano_12_p16"), "timm", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "xcit_nano_12_p16_224"
    assert "model_args" not in config
    path = str(tmp_path / "out" / "model.safetensors")
    model = timm.create_model("xcit_nano_12_p16_224", checkpoint_path=path, num_classes=0).eval()
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        assert close(model(images), scrambled("xcit_nano_12_p16")(images).cls_token)


def test_timm_puts_a_fresh_classifier_on_it(tmp_path: Path) -> None:
    export(checkpoint(tmp_path), "timm", tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=7)
    assert model(torch.randn(2, 3, 28, 28)).shape == (2, 7)
    assert torch.equal(model.norm.weight, scrambled("xcit_pico_4_p8").norm.weight)  # type: ignore[union-attr]


def test_timm_knows_every_official_size() -> None:
    official = [name for name in XCIT_SIZES if "_12" in name or "_24" in name]
    assert len(official) == 7
    assert all(timm.is_model(f"{name}_p{patch}_224") for name in official for patch in (8, 16))


def test_another_timm_model_exports_under_its_name(tmp_path: Path) -> None:
    backbone = build_backbone("timm:resnet18")
    path = tmp_path / "b.pth"
    torch.save({"teacher": {f"backbone.{k}": v for k, v in backbone.state_dict().items()},
                "args": {"arch": "timm:resnet18"}, "eval_transform": SMALL.to_dict()}, path)  # fmt: skip
    export(path, "timm", tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), backbone.eval()(images).cls_token)


def test_a_patch_that_timm_lacks_is_refused_with_what_to_do_instead(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"patches of 8 and 16 pixels, xcit_pico_4_p4 has 4: --to safetensors"):
        export(checkpoint(tmp_path, "xcit_pico_4_p4"), "timm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_timm_resizes_to_the_same_number_of_pixels_for_every_size() -> None:
    for crop in range(16, 520, 7):
        for resize in {*range(crop, 2 * crop, 3), crop - 5}:
            share = timm_folder.crop_share(EvalTransform(resize, crop))
            assert math.floor(crop / share) == resize


def test_a_folder_that_timm_would_prepare_images_otherwise_for_is_found_out(tmp_path: Path) -> None:
    export(checkpoint(tmp_path), "timm", tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["pretrained_cfg"]["interpolation"] = "bicubic"
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="prepares an image"):
        timm_folder.check_transform(timm_folder.reload(tmp_path / "out"), SMALL, photographs())


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


# ---- what differs does not appear; what is there is not lost


def _keys_as_values(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out = to_timm(state)
    first = "cls_attn_blocks.0.attn."
    return out | {f"{first}v.weight": out[f"{first}k.weight"].clone()}


@pytest.mark.parametrize("before", [False, True])
def test_an_export_that_differs_is_removed_and_the_one_before_it_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    weights = checkpoint(tmp_path)
    out = tmp_path / "out"
    if before:
        export(weights, "timm", out)
        first = (out / "model.safetensors").read_bytes()
    monkeypatch.setattr(timm_folder, "to_timm", _keys_as_values)
    with pytest.raises(InputError, match=r"the export differs from .*ckpt\.pth at .* and was removed"):
        export(weights, "timm", out, "--overwrite")
    assert out.exists() == before
    assert not before or (out / "model.safetensors").read_bytes() == first
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt.pth"} | ({"out"} if before else set())


def test_an_export_is_replaced_on_request_alone_and_nothing_else_ever(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path)
    file, folder, mine = tmp_path / "a.safetensors", tmp_path / "a", tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    for target, out in (("safetensors", file), ("timm", folder)):
        export(weights, target, out)
        with pytest.raises(InputError, match="--overwrite"):
            export(weights, target, out)
        export(weights, target, out, "--overwrite")
    with pytest.raises(InputError, match="no earlier export"):
        export(weights, "timm", mine, "--overwrite")
    assert (mine / "thesis.tex").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt.pth", file.name, folder.name, mine.name}


def test_a_folder_with_anything_besides_an_export_is_not_replaced(tmp_path: Path) -> None:
    weights, out = checkpoint(tmp_path), tmp_path / "clone"
    export(weights, "timm", out)
    (out / ".git").mkdir()
    with pytest.raises(InputError, match=r"no earlier export \(an export writes no \.git\)"):
        export(weights, "timm", out, "--overwrite")
    (out / ".git").rmdir()
    save_file({"a": torch.ones(1)}, out / "model.safetensors")  # a model of somebody else's, with a config.json
    with pytest.raises(InputError, match=r"no earlier export \(nothing in model\.safetensors says"):
        export(weights, "timm", out, "--overwrite")
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "config.json"}


@pytest.mark.parametrize("target", ["safetensors", "onnx", "torch-export"])
def test_a_file_that_no_export_wrote_is_not_replaced(tmp_path: Path, target: str) -> None:
    weights, out = checkpoint(tmp_path), tmp_path / f"mine{SUFFIXES[target]}"
    if target == "safetensors":
        save_file({"a": torch.ones(1)}, out)
    else:
        out.write_bytes(b"years of work")
    before = out.read_bytes()
    with pytest.raises(InputError, match=r"is no earlier export .*remove this one yourself"):
        export(weights, target, out, "--overwrite")
    assert out.read_bytes() == before


def test_onnx_files_and_torch_programs_are_known_as_exports_by_their_own_word(tmp_path: Path) -> None:
    def plus_one() -> torch.export.ExportedProgram:
        class PlusOne(torch.nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x + 1

        return torch.export.export(PlusOne(), (torch.zeros(2),))

    onnx = pytest.importorskip("onnx")
    said = metadata(load_backbone(checkpoint(tmp_path)))
    for words in (said, {"written_by": "somebody"}):
        with open(tmp_path / "a.pt2", "wb") as file:
            torch.export.save(plus_one(), file, extra_files=dict(words))
        model = onnx.ModelProto()
        for key, value in words.items():
            model.metadata_props.add(key=key, value=value)
        (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
        for name in ("a.pt2", "a.onnx"):
            assert is_export(tmp_path / name) == (words is said)


def test_an_export_does_not_replace_its_own_input(tmp_path: Path) -> None:
    export(checkpoint(tmp_path), "safetensors", tmp_path / "a.safetensors")
    export(tmp_path / "ckpt.pth", "timm", tmp_path / "a")
    (tmp_path / "b.safetensors").symlink_to(tmp_path / "a.safetensors")
    for weights, target, out in (
        ("a.safetensors", "safetensors", "a.safetensors"),
        ("b.safetensors", "safetensors", "a.safetensors"),
        ("a/model.safetensors", "timm", "a"),
    ):
        with pytest.raises(InputError, match="is or holds the weights that are to be exported"):
            export(tmp_path / weights, target, tmp_path / out, "--overwrite")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has /proc")
def test_a_place_where_nothing_can_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write /proc/x\.safetensors: No such file or directory; give another"):
        export(checkpoint(tmp_path), "safetensors", Path("/proc/x.safetensors"))
    with pytest.raises(InputError, match=r"cannot write .*name too long"):
        export(tmp_path / "ckpt.pth", "timm", tmp_path / ("x" * 300))


@pytest.mark.parametrize(("target", "name"), [("safetensors", "a.safetensors"), ("hf", "a")])
def test_a_transform_that_nobody_said_stays_a_guess(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str, name: str
) -> None:
    torch.save(scrambled("xcit_pico_4_p8").state_dict(), tmp_path / "bare.pth")
    export(tmp_path / "bare.pth", target, tmp_path / name)
    said = capsys.readouterr().out
    assert "notice: the file does not say how images are prepared; assumed: ImageNet's way" in said
    assert ("config.json tells it to timm" in said) == (target == "hf")
    file = tmp_path / name if target == "safetensors" else tmp_path / name / "model.safetensors"
    with safetensors.safe_open(file, framework="pt") as read:
        assert "eval_transform" not in read.metadata()
    again = load_backbone(file)
    assert (again.transform, again.transform_from) == (EvalTransform(), "")
    if target == "hf":
        assert "assumed here and in config.json is ImageNet's way" in (tmp_path / name / "README.md").read_text()
        path = tmp_path / name / "config.json"  # somebody who knows corrects it
        path.write_text(path.read_text().replace('"bicubic"', '"bilinear"'))
        assert load_backbone(file).transform.interpolation == "bilinear"


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_features_that_say_nothing_are_not_compared(tmp_path: Path, value: float) -> None:
    backbone = scrambled("xcit_pico_4_p8")
    with torch.no_grad():
        backbone.norm.weight.fill_(value)  # type: ignore[union-attr,operator]
        backbone.norm.bias.fill_(value)  # type: ignore[union-attr,operator]
    torch.save(backbone.state_dict(), tmp_path / "b.pth")
    with pytest.raises(InputError, match=r"features are (all zero|not finite)"):
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
