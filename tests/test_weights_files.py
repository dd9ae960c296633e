"""Sources of weights: .safetensors files, folders, the Hugging Face hub and timm; and their refusals."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_checkpoints as files
import huggingface_hub
import pytest
import timm
import torch

from dino_xcit.errors import InputError
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import load_backbone

# ---- .safetensors files


def test_half_precision_safetensors_are_widened_without_loss(tmp_path: Path) -> None:
    state = files.xcit().half().state_dict()
    read = load_backbone(files.save_safetensors(tmp_path / "half.safetensors", state)).backbone.state_dict()
    assert all(value.dtype in (torch.float32, torch.int64) for value in read.values())
    assert all(torch.equal(read[key].to(value.dtype), value) for key, value in state.items())


def test_safetensors_file_is_detected_without_suffix(tmp_path: Path) -> None:
    """Blobs in the hub's cache are named by their hash."""
    path = files.save_safetensors(tmp_path / "0a1b2c", files.xcit().state_dict())
    assert load_backbone(path).arch == "xcit_pico_4_p8"


def container(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape: list[int], start: int, end: int, kind: str = "F32") -> dict[str, object]:
    return {"dtype": kind, "shape": shape, "data_offsets": [start, end]}


HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "a header of an exbibyte": struct.pack("<Q", 2**60) + b"{}",
    "JSON nested deep": container(b"[" * 100_000),
    "more than the file has": container({"a": tensor([2**40], 0, 2**42)}, b"1234"),
    "an empty tensor of an exbibyte": container({"a": tensor([0, 2**62], 0, 0)}),
    "eight-bit floats": container({"a": tensor([4], 0, 4, "F8_E4M3")}, b"1234"),
    "metadata that are no JSON": container({"__metadata__": {"eval_transform": "{"}, "a": tensor([1], 0, 4)}, b"1234"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_invalid_safetensors_file_is_refused_with_one_short_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(HOSTILE[name])
    with pytest.raises(InputError, match=r"x\.safetensors") as caught:
        load_backbone(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_git_lfs_pointer_is_refused_with_remedy(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(InputError, match="git lfs pull"):
        load_backbone(tmp_path / name)


# ---- folders


@pytest.mark.parametrize(
    ("inside", "words"),
    [
        ((), "model.safetensors and config.json"), (("checkpoint.pth", "metrics.jsonl"), r"such as .*checkpoint\.pth"),
        (("config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"), "sharded"),
        ((".metadata", "__0_0.distcp"), "dcp_to_torch"),
    ],
)  # fmt: skip
def test_folder_without_known_weights_is_refused_with_hint(tmp_path: Path, inside: tuple[str, ...], words: str) -> None:
    for name in inside:
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=words):
        load_backbone(tmp_path)


def test_shard_pipe_and_missing_file_are_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    shard = files.save_safetensors(tmp_path / "model-00001-of-00002.safetensors", {"a": torch.zeros(1)})
    for name, words in (("pipe.safetensors", "pipe"), ("absent", "there is no file"), (shard.name, "shard")):
        with pytest.raises(InputError, match=words):
            load_backbone(tmp_path / name)


# ---- the hub and timm

Hub = Callable[..., None]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Take huggingface_hub offline; return a function that puts a repository into its cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(repository: str, network: torch.nn.Module, config: dict[str, Any]) -> None:
        files.timm_folder(files.hub_snapshot(tmp_path / "hub", repository), network, config)

    return put


def test_hub_repository_is_loaded_with_its_transform(hub: Hub) -> None:
    network = files.timm_xcit()
    hub("someone/xcit-pico", network, files.XCIT_CONFIG)
    read = load_backbone("hf-hub:someone/xcit-pico")
    assert (read.transform, read.transform_from) == (files.XCIT_TRANSFORM, "config.json's of hf-hub:someone/xcit-pico")
    assert "from hf-hub:someone/xcit-pico" in read.describe()
    assert read.arch == "xcit_pico_4_p8"


def test_timm_name_is_loaded_with_tag_and_timms_transform(hub: Hub) -> None:
    network = timm.create_model("test_vit", pretrained=False)
    hub("timm/test_vit.r160_in1k", network, {})
    for name in ("timm:test_vit.r160_in1k", "timm:test_vit"):
        read = load_backbone(name)
        assert (read.arch, read.left_aside) == ("timm:test_vit", ("head",))
        assert read.transform == EvalTransform(168, 160, "bicubic", (0.5,) * 3, (0.5,) * 3)
        assert read.transform_from == "timm's for test_vit.r160_in1k"
    own = {key.removeprefix("model."): value for key, value in read.backbone.state_dict().items()}
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in own.items())
    hub("timm/xcit_nano_12_p16_224.fb_dist_in1k", timm.create_model("xcit_nano_12_p16_224"), {})
    read = load_backbone("timm:xcit_nano_12_p16_224.fb_dist_in1k")
    assert (read.arch, read.transform) == ("xcit_nano_12_p16", EvalTransform(resize=224, crop=224))


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("hf-hub:someone/absent", "config.json of 'someone/absent'.*give its path"),
        ("timm:resnet18.a1_in1k", "model.safetensors of 'timm/resnet18.a1_in1k'"),
        ("hf-hub:", "hf-hub:ORG/NAME"), ("hf-hub:a/b/c", "hf-hub:ORG/NAME"),
        ("timm:resnet81", "did you mean .*timm:resnet"), ("timm:resnet18.nobody", "did you mean .*timm:resnet18"),
    ],
)  # fmt: skip
def test_unavailable_remote_weights_are_refused_with_one_line(spec: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load_backbone(spec)
    assert "\n" not in str(caught.value)
