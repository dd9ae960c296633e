"""Weights in .safetensors files, from the Hugging Face hub and from timm's list; who says how images are prepared."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_checkpoints as files
import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from dino_xcit.errors import InputError
from dino_xcit.transform import IMAGENET_MEAN, IMAGENET_STD, EvalTransform, normalise
from dino_xcit.weights import load_backbone
from dino_xcit.weights.files import open_weights
from dino_xcit.weights.safetensors_file import HEADER_LIMIT, read_safetensors

CONFIG_TRANSFORM = EvalTransform(resize=80, crop=64, interpolation="bilinear", mean=(0.5,) * 3, std=(0.25,) * 3)


def photographs(side: int) -> Tensor:
    """[3, 3, side, side]: scikit-image's astronaut, cup and cat, normalised."""
    data = pytest.importorskip("skimage.data")
    pictures = [Image.fromarray(make()).resize((side, side)) for make in (data.astronaut, data.coffee, data.chelsea)]
    pixels = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
    return normalise(pixels, IMAGENET_MEAN, IMAGENET_STD)


# ---- timm's files


@torch.no_grad()
def test_timms_xcit_and_ours_see_the_same_in_photographs(tmp_path: Path) -> None:
    theirs = files.timm_xcit(classes=7)
    read = load_backbone(files.timm_folder(tmp_path, theirs, files.XCIT_CONFIG))
    theirs.reset_classifier(0)
    for side in (224, 96):
        images = photographs(side)
        expected = theirs(images)
        found = read.backbone(images).cls_token
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        spread = float((expected[0] - expected[1]).norm() / expected[0].norm())
        assert spread > 0.01  # the photographs are told apart, or equality would say nothing
    assert (read.arch, read.left_aside) == ("xcit_pico_4_p8", ("head",))


def test_config_json_beside_the_file_says_how_images_are_prepared(tmp_path: Path) -> None:
    path = files.timm_folder(tmp_path, files.timm_xcit(), files.XCIT_CONFIG)
    read = load_backbone(path)
    assert read.transform == CONFIG_TRANSFORM
    assert read.transform_from == "config.json's of model.safetensors"
    (tmp_path / "config.json").unlink()
    read = load_backbone(path)
    assert (read.transform, read.transform_from) == (EvalTransform(), "")


def test_settings_of_timm_before_0_9_lie_beside_the_architecture(tmp_path: Path) -> None:
    flat = files.XCIT_CONFIG["pretrained_cfg"] | {"architecture": "xcit_nano_12_p16_224"}
    assert load_backbone(files.timm_folder(tmp_path, files.timm_xcit(), flat)).transform == CONFIG_TRANSFORM


def test_a_crop_mode_that_cannot_be_followed_is_said(tmp_path: Path) -> None:
    config = json.loads(json.dumps(files.XCIT_CONFIG))
    config["pretrained_cfg"]["crop_mode"] = "squash"
    read = load_backbone(files.timm_folder(tmp_path, files.timm_xcit(), config))
    assert read.transform_from.endswith("but for its crop_mode 'squash': the centre is cut")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_size": [3, 64, 32]}, "no square"),
        ({"input_size": [3, 10**9, 10**9]}, "no square of a size that can be"),
        ({"input_size": [3, "a", "a"]}, "invalid literal"),
        ({"crop_pct": 1e-9}, "no square of a size that can be"),
        ({"crop_pct": float("nan")}, "no square of a size that can be"),
        ({"interpolation": "random"}, "interpolation is 'random'"),
        ({"mean": [0.5]}, "expected three numbers"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    config = files.XCIT_CONFIG | {"pretrained_cfg": files.XCIT_CONFIG["pretrained_cfg"] | change}
    with pytest.raises(InputError, match=rf"config\.json.*cannot be read.*{words}"):
        load_backbone(files.timm_folder(tmp_path, files.timm_xcit(), config))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, '{"a": "' + "x" * 2**20 + '"}', "[1]"],
    ids=["empty", "cut", "deep", "long", "list"],
)
def test_a_config_json_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = files.timm_folder(tmp_path, files.timm_xcit(), files.XCIT_CONFIG)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json.*move it away"):
        load_backbone(path)


def test_another_librarys_config_json_is_no_hindrance(tmp_path: Path) -> None:
    path = files.timm_folder(tmp_path, files.timm_xcit(), {"model_type": "vit", "architectures": ["ViTModel"]})
    assert load_backbone(path).arch == "xcit_pico_4_p8"


def test_what_a_file_says_of_itself_goes_before_the_config_json_beside_it(tmp_path: Path) -> None:
    import timm

    other = {"architecture": "resnet18", "pretrained_cfg": {"input_size": [3, 99, 99], "mean": [0] * 3, "std": [1] * 3}}
    path = files.timm_folder(tmp_path, timm.create_model("test_vit", pretrained=False, num_classes=0), other)
    state = safetensors.torch.load_file(path)
    with pytest.raises(InputError, match=r"does not fit timm:resnet18.*it is .*config\.json that names timm:resnet18"):
        load_backbone(path)
    safetensors.torch.save_file(state, path, {"arch": "timm:test_vit"})
    read = load_backbone(path)
    assert (read.arch, read.transform.crop) == ("timm:test_vit", 99)  # the metadata do not say how images are prepared
    bare = tmp_path / "own.safetensors"
    safetensors.torch.save_file(files.xcit().state_dict(), bare, {"arch": "xcit_pico_4_p8"})
    assert load_backbone(bare).arch == "xcit_pico_4_p8"
    said = {"arch": "timm:test_vit", "eval_transform": json.dumps(CONFIG_TRANSFORM.to_dict())}
    safetensors.torch.save_file(state, path, said)
    (tmp_path / "config.json").write_text("{")
    read = load_backbone(path)
    assert (read.transform, read.transform_from) == (CONFIG_TRANSFORM, "the checkpoint's")
    safetensors.torch.save_file(state, path, said | {"eval_transform": "{"})
    with pytest.raises(InputError, match="eval_transform in its metadata is no JSON"):
        load_backbone(path)


def test_half_precision_weights_are_widened_without_loss(tmp_path: Path) -> None:
    state = {
        key: value.half() if value.is_floating_point() else value for key, value in files.xcit().state_dict().items()
    }
    safetensors.torch.save_file(state, tmp_path / "half.safetensors")
    read = load_backbone(tmp_path / "half.safetensors").backbone.state_dict()
    assert all(value.dtype in (torch.float32, torch.int64) for value in read.values())
    assert all(torch.equal(read[key].to(value.dtype), value) for key, value in state.items())


# ---- .safetensors files that are none


def container(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape: list[int], start: int, end: int, kind: str = "F32") -> dict[str, object]:
    return {"dtype": kind, "shape": shape, "data_offsets": [start, end]}


HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "seven bytes": b"1234567",
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "a header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "a header of an exbibyte": struct.pack("<Q", 2**60) + b"{}",
    "a header over the limit": struct.pack("<Q", HEADER_LIMIT + 1) + b"{}",
    "no JSON": container(b"{nonsense}"),
    "JSON nested deep": container(b"[" * 100_000),
    "more than the file has": container({"a": tensor([2**40], 0, 2**42)}, b"1234"),
    "less than the file has": container({"a": tensor([1], 0, 4)}, b"12345678"),
    "overlapping": container({"a": tensor([1], 0, 4), "b": tensor([1], 0, 4)}, b"1234"),
    "backwards": container({"a": tensor([1], 4, 0)}, b"1234"),
    "a shape that does not fit": container({"a": tensor([9], 0, 4)}, b"1234"),
    "a shape that wraps round": container({"a": tensor([2**33, 2**31, 2], 0, 0)}),
    "an empty tensor of an exbibyte": container({"a": tensor([0, 2**62], 0, 0)}),
    "a negative length": container({"a": tensor([-1], 0, 4)}, b"1234"),
    "a type unknown": container({"a": tensor([4], 0, 4, "X8")}, b"1234"),
    "eight-bit floats": container({"a": tensor([4], 0, 4, "F8_E4M3")}, b"1234"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_no_safetensors_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(HOSTILE[name])
    with pytest.raises(InputError) as caught:
        load_backbone(tmp_path / "x.safetensors")
    sentence = str(caught.value)
    assert str(tmp_path / "x.safetensors") in sentence
    assert "\n" not in sentence
    assert len(sentence) < 500


def test_git_lfs_notes_are_told_as_such_whatever_file_they_stand_for(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(HOSTILE["a git-lfs pointer"])
    with pytest.raises(InputError, match="git lfs pull"):
        load_backbone(tmp_path / "x.pth")


def test_a_header_over_the_limit_is_refused_before_the_library_reads_it(tmp_path: Path) -> None:
    """The library's own limit is 100 MB, all of it JSON."""
    header = json.dumps({"a": tensor([1], 0, 4)}).encode()
    (tmp_path / "x.safetensors").write_bytes(container(header.ljust(HEADER_LIMIT), b"1234"))
    assert read_safetensors(tmp_path / "x.safetensors")[0].keys() == {"a"}
    (tmp_path / "x.safetensors").write_bytes(container(header.ljust(HEADER_LIMIT + 1), b"1234"))
    with pytest.raises(InputError, match="its header would be 16,777,217 bytes long, expected at most 16,777,216"):
        read_safetensors(tmp_path / "x.safetensors")


def test_a_whole_file_of_that_kind_is_read_and_its_names_are_shown_when_it_is_no_network(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(container({"a\n\x1b": tensor([1], 0, 4)}, b"1234"))
    assert read_safetensors(tmp_path / "x.safetensors")[0].keys() == {"a\n\x1b"}
    with pytest.raises(InputError, match=r"first keys: a\?\?"):
        load_backbone(tmp_path / "x.safetensors")


def test_more_tensors_than_any_network_has_are_refused(tmp_path: Path) -> None:
    header = {f"{number}": tensor([], number, number + 1, "U8") for number in range(50_001)}
    (tmp_path / "x.safetensors").write_bytes(container(header, bytes(50_001)))
    with pytest.raises(InputError, match="holds 50,001 tensors"):
        load_backbone(tmp_path / "x.safetensors")


def test_the_kind_of_file_is_seen_without_its_name(tmp_path: Path) -> None:
    """The hub's cache has blobs that are named by their hash."""
    path = files.timm_folder(tmp_path, files.timm_xcit(), {})
    path.rename(tmp_path / "0a1b2c")
    assert load_backbone(tmp_path / "0a1b2c").arch == "xcit_pico_4_p8"


def test_a_pipe_a_folder_and_nothing_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for name, words in (("pipe", "pipe or a device"), ("folder", "is a folder"), ("absent", "there is no file")):
        with pytest.raises(InputError, match=words):
            load_backbone(tmp_path / f"{name}.safetensors")
    files.timm_folder(tmp_path / "export", files.timm_xcit(), {})
    (tmp_path / "export" / "config.json").unlink()
    with pytest.raises(InputError, match=r"such as .*export/model\.safetensors"):
        load_backbone(tmp_path / "export")


# ---- the hub and timm's list

Hub = Callable[..., None]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """huggingface_hub without a network, and what it finds in its cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(repository: str, network: torch.nn.Module, config: dict[str, Any]) -> None:
        files.hub_cache(tmp_path / "hub", repository, network, config)

    return put


def test_a_repository_of_the_hub_is_read_with_its_settings(hub: Hub) -> None:
    network = files.timm_xcit()
    hub("someone/xcit-pico", network, files.XCIT_CONFIG)
    read = load_backbone("hf-hub:someone/xcit-pico")
    assert read.transform == CONFIG_TRANSFORM
    assert "from hf-hub:someone/xcit-pico" in read.describe()
    assert read.transform_from == "config.json's of hf-hub:someone/xcit-pico"
    assert read.arch == "xcit_pico_4_p8"
    torch.testing.assert_close(
        read.backbone(torch.ones(1, 3, 64, 64)).cls_token, network(torch.ones(1, 3, 64, 64)), rtol=1e-5, atol=1e-5
    )


def test_a_name_of_timm_is_read_with_its_tag_and_timms_settings(hub: Hub) -> None:
    import timm

    network = timm.create_model("test_vit", pretrained=False)
    hub("timm/test_vit.r160_in1k", network, {})
    for name in ("timm:test_vit.r160_in1k", "timm:test_vit"):
        read = load_backbone(name)
        assert (read.arch, read.left_aside) == ("timm:test_vit", ("head",))
        assert read.transform == EvalTransform(168, 160, "bicubic", (0.5,) * 3, (0.5,) * 3)
        assert read.transform_from == "timm's for test_vit.r160_in1k"
    network.reset_classifier(0)
    images = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(read.backbone(images).cls_token, network.eval()(images))


def test_timms_xcit_with_a_tag_is_read_as_this_projects(hub: Hub) -> None:
    import timm

    hub("timm/xcit_nano_12_p16_224.fb_dist_in1k", timm.create_model("xcit_nano_12_p16_224"), {})
    read = load_backbone("timm:xcit_nano_12_p16_224.fb_dist_in1k")
    assert (read.arch, read.left_aside) == ("xcit_nano_12_p16", ("head",))
    assert read.transform == EvalTransform(resize=224, crop=224)  # timm's: the whole side is seen
    assert read.transform_from == "timm's for xcit_nano_12_p16_224.fb_dist_in1k"


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("hf-hub:someone/absent", "cannot fetch config.json of someone/absent .*give its path"),
        ("hf-hub:timm/resnet18.a1_in1k@main", "cannot fetch config.json"),
        ("timm:resnet18.a1_in1k", "cannot fetch model.safetensors of timm/resnet18.a1_in1k"),
        ("hf-hub:", "has no repository : expected hf-hub:ORG/NAME"),
        ("hf-hub:a/b/c", "has no repository a/b/c"),
        ("timm:resnet81", "timm has no weights named 'resnet81'; did you mean .*timm:resnet"),
        ("timm:resnet18.nobody", r"no weights named 'resnet18\.nobody'; it has .*timm:resnet18\.a1_in1k"),
        ("timm:", "timm has no weights named ''"),
    ],
)
def test_what_cannot_be_fetched_is_one_sentence(spec: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        open_weights(spec)
    assert "\n" not in str(caught.value)
