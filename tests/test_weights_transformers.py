"""Hugging Face transformers' vision transformers: read by their names, they compute what transformers does."""

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
    assert float((tokens[0, 0] - tokens[1, 0]).norm()) > 100 * limit  # it tells images apart


@pytest.mark.parametrize("kind", NAMES)
def test_each_model_computes_what_it_did(tmp_path: Path, kind: str) -> None:
    state = {name: value for name, value in hf.weights(kind).items() if not name.startswith("pooler.")}
    read = load_backbone(hf.folder(tmp_path, hf.weights(kind), hf.VIT_CONFIG))
    assert_computes(read, hf.model(kind))
    assert (read.arch, read.layout) == (NAMES[kind], Layout.TRANSFORMERS)
    assert read.left_aside == (("pooler",) if kind == "vit" else ("mask_token",))
    classifier = {"classifier.weight": torch.zeros(7, hf.WIDTH), "classifier.bias": torch.zeros(7)}
    read = load_backbone(hf.folder(tmp_path, files.prefixed(PREFIXES[kind], state) | classifier, hf.VIT_CONFIG))
    assert_computes(read, hf.model(kind))
    assert (read.left_aside[0], read.classifiers) == ("classifier", ("classifier",))
    torch.save(hf.model(kind).state_dict(), tmp_path / "state.pth")  # names of version 5's memory
    assert_computes(load_backbone(tmp_path / "state.pth"), hf.model(kind))


def test_the_heads_are_those_that_config_json_names(tmp_path: Path) -> None:
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
def test_keys_that_do_not_fit_are_named(tmp_path: Path, state: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_backbone(hf.folder(tmp_path, state(dict(hf.weights("vit"))), hf.VIT_CONFIG))


@pytest.mark.parametrize(
    ("name", "value"),
    [("hidden_act", "quick_gelu"), ("use_swiglu_ffn", True), ("layer_norm_eps", 1e-5), ("num_attention_heads", 7)],
)
def test_a_network_that_is_not_computed_is_refused_by_its_setting(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(InputError, match=str(value)) as caught:
        load_backbone(hf.folder(tmp_path, hf.weights("vit"), hf.VIT_CONFIG | {name: value}))
    assert "\n" not in str(caught.value)


def test_a_repository_of_the_hub_is_read_with_both_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    snapshot = files.hub_snapshot(tmp_path, "someone/dino")
    hf.folder(snapshot, hf.weights("vit"), hf.VIT_CONFIG)
    with pytest.raises(InputError, match="preprocessor_config"):  # perhaps it was only never fetched
        load_backbone("hf-hub:someone/dino")
    absent = snapshot.parents[1] / ".no_exist" / snapshot.name  # where huggingface_hub notes what is not there
    absent.mkdir(parents=True)
    (absent / "preprocessor_config.json").touch()
    read = load_backbone("hf-hub:someone/dino")
    assert (read.arch, read.transform_from, read.heads_assumed) == (NAMES["vit"], "", 0)
    hf.folder(snapshot, hf.weights("vit"), hf.VIT_CONFIG, hf.DINO_PREPROCESSOR)
    read = load_backbone("hf-hub:someone/dino")
    assert read.transform == EvalTransform(resize=224)
    assert read.transform_from.startswith("preprocessor_config.json's of hf-hub:someone/dino")
