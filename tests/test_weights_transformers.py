"""Vision transformers of Hugging Face transformers: loaded backbones against the library's own outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import foreign_checkpoints as files
import huggingface_hub
import pytest
import torch
import transformers_files as hf

from dino_xcit.errors import InputError
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import Layout, LoadedBackbone, load_backbone

IMAGES = torch.rand(3, 3, hf.SIDE, hf.SIDE, generator=torch.Generator().manual_seed(5))
NAMES = {"vit": "vit_tiny_2_p16_64", "dinov2": "vit_tiny_2_p16_64_ls", "registers": "vit_tiny_2_p16_64_ls_reg4"}
PREFIXES = {"vit": "vit.", "dinov2": "dinov2.", "registers": "dinov2_with_registers."}


@torch.no_grad()
def assert_computes(read: LoadedBackbone, model: Any) -> None:
    tokens = model(IMAGES).last_hidden_state
    out = read.backbone(IMAGES)
    limit = 1e-5 * float(tokens.abs().max())
    torch.testing.assert_close(out.cls_token, tokens[:, 0], rtol=0, atol=limit)
    torch.testing.assert_close(out.patch_tokens, tokens[:, -16:], rtol=0, atol=limit)
    assert float((tokens[0, 0] - tokens[1, 0]).norm()) > 100 * limit  # the outputs depend on the image


@pytest.mark.parametrize("kind", NAMES)
def test_load_backbone_reproduces_transformers_outputs(tmp_path: Path, kind: str) -> None:
    state = {name: value for name, value in hf.weights(kind).items() if not name.startswith("pooler.")}
    read = load_backbone(hf.folder(tmp_path, hf.weights(kind), hf.VIT_CONFIG))
    assert_computes(read, hf.model(kind))
    assert (read.arch, read.layout) == (NAMES[kind], Layout.TRANSFORMERS)
    assert read.left_aside == (("pooler",) if kind == "vit" else ("mask_token",))
    classifier = {"classifier.weight": torch.zeros(7, hf.WIDTH), "classifier.bias": torch.zeros(7)}
    read = load_backbone(hf.folder(tmp_path, files.prefixed(PREFIXES[kind], state) | classifier, hf.VIT_CONFIG))
    assert_computes(read, hf.model(kind))
    assert (read.left_aside[0], read.classifiers) == ("classifier", ("classifier",))
    torch.save(hf.model(kind).state_dict(), tmp_path / "state.pth")  # in-memory names of transformers 5
    assert_computes(load_backbone(tmp_path / "state.pth"), hf.model(kind))


def test_number_of_heads_comes_from_config_json_else_is_assumed(tmp_path: Path) -> None:
    model = hf.model("vit", heads=6)
    model.save_pretrained(tmp_path)
    read = load_backbone(tmp_path)
    assert (read.arch, read.heads_assumed) == ("vit_tiny_2_p16_64_h6", 0)
    assert_computes(read, model)
    (tmp_path / "config.json").unlink()
    read = load_backbone(tmp_path / "model.safetensors")
    assert (read.arch, read.heads_assumed) == ("vit_tiny_2_p16_64", 3)


LOST = "encoder.layer.1.attention.attention.key.bias"


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (lambda state: state | {"blocks.0.attn.qkv.weight": torch.zeros(3, 1)}, r"besides blocks\.0\.attn\.k\.weight"),
        (lambda state: {k: v for k, v in state.items() if k != LOST}, r"lacks blocks\.1\.attn\.qkv\.bias; .*\.attn\.q"),
        (lambda state: {k.replace("intermediate.dense", "mlp.weights_in"): v for k, v in state.items()}, "SwiGLU"),
    ],
)
def test_unexpected_and_missing_keys_are_named_in_error(tmp_path: Path, state: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_backbone(hf.folder(tmp_path, state(dict(hf.weights("vit"))), hf.VIT_CONFIG))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("hidden_act", "quick_gelu", "hidden_act.*quick_gelu"), ("use_swiglu_ffn", True, "use_swiglu_ffn.*True"),
        ("layer_norm_eps", 1e-5, "layer_norm_eps.*1e-05"), ("num_attention_heads", 7, "7 heads"),
    ],
)  # fmt: skip
def test_unsupported_config_value_is_refused(tmp_path: Path, name: str, value: object, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load_backbone(hf.folder(tmp_path, hf.weights("vit"), hf.VIT_CONFIG | {name: value}))
    assert "\n" not in str(caught.value)


def test_hub_repository_is_read_with_both_config_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    snapshot = files.hub_snapshot(tmp_path, "someone/dino")
    hf.folder(snapshot, hf.weights("vit"), hf.VIT_CONFIG)
    with pytest.raises(InputError, match="preprocessor_config"):  # not cached: it may exist on the hub
        load_backbone("hf-hub:someone/dino")
    absent = snapshot.parents[1] / ".no_exist" / snapshot.name  # huggingface_hub's record of files absent on the hub
    absent.mkdir(parents=True)
    (absent / "preprocessor_config.json").touch()
    read = load_backbone("hf-hub:someone/dino")
    assert (read.arch, read.transform_from, read.heads_assumed) == (NAMES["vit"], "", 0)
    hf.folder(snapshot, hf.weights("vit"), hf.VIT_CONFIG, hf.DINO_PREPROCESSOR)
    read = load_backbone("hf-hub:someone/dino")
    assert read.transform == EvalTransform(resize=224)
    assert read.transform_from.startswith("preprocessor_config.json's of hf-hub:someone/dino")
