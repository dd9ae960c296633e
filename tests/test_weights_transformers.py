"""Hugging Face transformers' vision transformers: read by their names, computed as their formulas say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import foreign_checkpoints as files
import huggingface_hub
import pytest
import torch
import transformers_files as hf
from torch import Tensor

from dino_xcit.errors import InputError
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import load_backbone

IMAGES = torch.rand(3, 3, hf.SIDE, hf.SIDE, generator=torch.Generator().manual_seed(5))
NAMES = {"vit": "vit_tiny_2_p16_64", "dinov2": "vit_tiny_2_p16_64_ls", "registers": "vit_tiny_2_p16_64_ls_reg4"}
PREFIXES = {"vit": "vit.", "dinov2": "dinov2.", "registers": "dinov2_with_registers."}


@torch.no_grad()
def assert_computes(spec: Path | str, tokens: Tensor, prefix: int) -> None:
    """The backbone's tokens are ``tokens`` [B, prefix + N, D], computed in float64."""
    out = load_backbone(spec).backbone(IMAGES)
    limit = 1e-5 * float(tokens.abs().max())
    torch.testing.assert_close(out.cls_token.double(), tokens[:, 0], rtol=0, atol=limit)
    torch.testing.assert_close(out.patch_tokens.double(), tokens[:, prefix:], rtol=0, atol=limit)
    assert float((tokens[0, 0] - tokens[1, 0]).norm()) > 100 * limit  # it tells images apart


@pytest.mark.parametrize("kind", NAMES)
def test_a_folder_of_each_model_computes_what_its_formulas_say(tmp_path: Path, kind: str) -> None:
    state = hf.weights(kind)
    place = hf.folder(tmp_path / "model", state, hf.VIT_CONFIG)
    expected = hf.forward(state, 3, IMAGES, eps=1e-6)
    assert_computes(place, expected, prefix=5 if kind == "registers" else 1)
    assert_computes(place / "model.safetensors", expected, prefix=5 if kind == "registers" else 1)
    read = load_backbone(place)
    assert (read.arch, read.layout) == (NAMES[kind], "a model of Hugging Face transformers")
    assert read.left_aside == (("pooler",) if kind == "vit" else ("mask_token",))
    assert read.path == place / "model.safetensors"


@pytest.mark.parametrize("kind", NAMES)
def test_a_model_with_a_classifier_loses_it_and_says_so(tmp_path: Path, kind: str) -> None:
    state = {name: value for name, value in hf.weights(kind).items() if not name.startswith("pooler.")}
    classifier = {"classifier.weight": torch.zeros(7, hf.WIDTH), "classifier.bias": torch.zeros(7)}
    place = hf.folder(tmp_path, files.prefixed(PREFIXES[kind], state) | classifier, hf.VIT_CONFIG)
    assert_computes(place, hf.forward(state, 3, IMAGES, eps=1e-6), prefix=5 if kind == "registers" else 1)
    read = load_backbone(place)
    assert (read.left_aside[0], read.classifiers) == ("classifier", ("classifier",))


def test_the_heads_are_those_that_config_json_names(tmp_path: Path) -> None:
    state = hf.weights("vit")
    place = hf.folder(tmp_path, state, hf.VIT_CONFIG | {"num_attention_heads": 6})
    read = load_backbone(place)
    assert (read.arch, read.heads_assumed) == ("vit_tiny_2_p16_64_h6", 0)
    assert_computes(place, hf.forward(state, 6, IMAGES, eps=1e-6), prefix=1)
    (place / "config.json").unlink()
    read = load_backbone(place / "model.safetensors")
    assert (read.arch, read.heads_assumed) == ("vit_tiny_2_p16_64", 3)
    assert "heads assumed: 3" in read.describe()


def test_names_of_version_5s_memory_are_read_from_a_plain_state_dict(tmp_path: Path) -> None:
    state = hf.weights("vit")
    renamed = {}
    for name, value in state.items():
        for old, new in (
            ("encoder.layer.", "layers."), ("attention.attention.query", "attention.q_proj"),
            ("attention.attention.key", "attention.k_proj"), ("attention.attention.value", "attention.v_proj"),
            ("attention.output.dense", "attention.o_proj"), ("intermediate.dense", "mlp.fc1"),
            (".output.dense", ".mlp.fc2"),
        ):  # fmt: skip
            name = name.replace(old, new)
        renamed[name] = value
    assert "layers.1.attention.v_proj.bias" in renamed
    assert "layers.1.mlp.fc2.bias" in renamed
    torch.save(renamed, tmp_path / "state.pth")
    assert_computes(tmp_path / "state.pth", hf.forward(state, 3, IMAGES, eps=1e-6), prefix=1)


def test_the_tokens_of_transformers_itself_are_ours(tmp_path: Path) -> None:
    import transformers  # seconds of imports that no other test needs

    for kind in ("ViT", "Dinov2", "Dinov2WithRegisters"):
        settings = getattr(transformers, f"{kind}Config")(
            hidden_size=hf.WIDTH, num_hidden_layers=2, num_attention_heads=6, intermediate_size=4 * hf.WIDTH,
            image_size=hf.SIDE, patch_size=hf.PATCH, layer_norm_eps=1e-6,
        )  # fmt: skip
        model = files.shaken(getattr(transformers, f"{kind}Model")(settings), 1)
        model.save_pretrained(tmp_path / kind)
        with torch.no_grad():
            expected = model(IMAGES).last_hidden_state.double()
        assert_computes(tmp_path / kind, expected, prefix=expected.shape[1] - 16)


def test_queries_beside_a_joined_weight_of_their_new_name_are_named(tmp_path: Path) -> None:
    state = hf.weights("vit") | {"blocks.0.attn.qkv.weight": torch.zeros(3 * hf.WIDTH, hf.WIDTH)}
    with pytest.raises(InputError, match=r"has besides blocks\.0\.attn\.k\.weight"):
        load_backbone(hf.folder(tmp_path, state, hf.VIT_CONFIG))


def test_a_key_that_is_lost_is_named(tmp_path: Path) -> None:
    state = hf.weights("vit")
    del state["encoder.layer.1.attention.attention.key.bias"]
    with pytest.raises(InputError, match=r"lacks blocks\.1\.attn\.qkv\.bias; it has besides blocks\.1\.attn\.q"):
        load_backbone(hf.folder(tmp_path, state, hf.VIT_CONFIG))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "quick_gelu"}, "hidden_act quick_gelu"),
        ({"use_swiglu_ffn": True}, "use_swiglu_ffn True"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps 1e-05"),
        ({"layer_norm_eps": "0"}, "layer_norm_eps 0"),
        ({"num_attention_heads": 10**9}, "1000000000 heads"),
        ({"num_attention_heads": 7}, "7 heads"),
    ],
)
def test_a_network_that_is_not_computed_here_is_refused_by_its_setting(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load_backbone(hf.folder(tmp_path, hf.weights("vit"), hf.VIT_CONFIG | changes))
    assert "\n" not in str(caught.value)


def test_a_swiglu_is_refused_by_name(tmp_path: Path) -> None:
    state = {name.replace("mlp.fc1", "mlp.weights_in"): value for name, value in hf.weights("dinov2").items()}
    with pytest.raises(InputError, match=r"SwiGLU.*timm:vit_giant_patch14_dinov2\.lvd142m"):
        load_backbone(hf.folder(tmp_path, state, {}))


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of someone/dino in the cache of huggingface_hub, which has no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return files.hub_snapshot(tmp_path, "someone/dino")


def test_a_repository_of_the_hub_is_read_with_both_settings(snapshot: Path) -> None:
    state = hf.weights("vit")
    hf.folder(snapshot, state, hf.VIT_CONFIG, hf.DINO_PREPROCESSOR)
    read = load_backbone("hf-hub:someone/dino")
    assert (read.arch, read.transform, read.heads_assumed) == (NAMES["vit"], EvalTransform(resize=224), 0)
    assert read.transform_from.startswith("preprocessor_config.json's of hf-hub:someone/dino")
    assert_computes("hf-hub:someone/dino", hf.forward(state, 3, IMAGES, eps=1e-6), prefix=1)


def test_settings_that_a_repository_is_known_to_lack_are_no_hindrance_without_a_network(snapshot: Path) -> None:
    hf.folder(snapshot, hf.weights("vit"), hf.VIT_CONFIG)
    with pytest.raises(InputError, match=r"cannot fetch preprocessor_config\.json of 'someone/dino"):
        load_backbone("hf-hub:someone/dino")
    absent = snapshot.parents[1] / ".no_exist" / snapshot.name  # where huggingface_hub notes it
    absent.mkdir(parents=True)
    (absent / "preprocessor_config.json").touch()
    read = load_backbone("hf-hub:someone/dino")
    assert (read.arch, read.transform_from) == (NAMES["vit"], "")
