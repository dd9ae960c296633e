"""Hugging Face transformers' vision transformers: read by their names, computed as their formulas say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import foreign_checkpoints as files
import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers_files as hf
from export_fixtures import export
from torch import Tensor

from dino_xcit.errors import InputError
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import load_backbone
from dino_xcit.weights.files import EXCEPTION
from dino_xcit.weights.transformers_config import _PROCESSORS

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
    with pytest.raises(InputError, match=r"has besides encoder\.layer\.0\.attention\.attention\.key\.weight"):
        load_backbone(hf.folder(tmp_path, state, hf.VIT_CONFIG))


def test_a_key_that_is_lost_is_named(tmp_path: Path) -> None:
    state = hf.weights("vit")
    del state["encoder.layer.1.attention.attention.key.bias"]
    with pytest.raises(InputError, match=r"lacks blocks\.1\.attn\.qkv\.bias; it has besides encoder\.layer\.1\.att"):
        load_backbone(hf.folder(tmp_path, state, hf.VIT_CONFIG))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "quick_gelu"}, "hidden_act quick_gelu, expected gelu"),
        ({"use_swiglu_ffn": True}, "use_swiglu_ffn True, expected False"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps 1e-05, expected at most 1e-06"),
        ({"layer_norm_eps": "0"}, "layer_norm_eps 0, expected"),
        ({"num_attention_heads": 10**9}, "num_attention_heads 1000000000, expected 1 to 99"),
        ({"num_attention_heads": True}, "num_attention_heads True, expected 1 to 99"),
        ({"num_attention_heads": 7}, "7 heads, which have no name here"),
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
    with pytest.raises(InputError, match=r"SwiGLU .* timm:vit_giant_patch14_dinov2\.lvd142m"):
        load_backbone(hf.folder(tmp_path, state, {}))


# ---- images


def prepared(path: Path, preprocessor: dict[str, Any] | None) -> tuple[EvalTransform, str, str]:
    read = load_backbone(hf.folder(path, hf.weights("vit"), hf.VIT_CONFIG, preprocessor))
    return read.transform, read.transform_from, read.transform_guess


def test_preprocessor_config_json_says_how_images_are_prepared(tmp_path: Path) -> None:
    transform, origin, guess = prepared(tmp_path, hf.DINOV2_PREPROCESSOR)
    assert (transform, guess) == (EvalTransform(), "")
    assert origin == f"preprocessor_config.json's of {tmp_path}"
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "size": {"height": 64, "width": 64}}
    transform, origin, _ = prepared(tmp_path, hf.DINO_PREPROCESSOR | half)
    assert transform == EvalTransform(64, 64, "bilinear", (0.5,) * 3, (0.5,) * 3)
    assert origin.endswith(", but for its squashing of images to squares: the centre is cut")
    transform, origin, _ = prepared(tmp_path, hf.DINO_PREPROCESSOR)
    assert (transform, "squashing" in origin) == (EvalTransform(resize=224), True)
    raw = prepared(tmp_path, hf.DINOV2_PREPROCESSOR | {"do_normalize": False})[0]
    assert (raw.mean, raw.std) == ((0.0,) * 3, (1.0,) * 3)
    (tmp_path / "preprocessor_config.json").unlink()
    assert prepared(tmp_path, None)[1:] == ("", "ImageNet's way for 64 pixels, as its positions")


@pytest.mark.parametrize(
    "changes",
    [
        {"size": {"height": 224, "width": 256}}, {"size": {}}, {"size": 10**9}, {"size": True, "crop_size": 0},
        {"size": "224"}, {"resample": 99}, {"image_mean": [0.5]}, {"do_resize": False}, {"rescale_factor": 1.0},
        {"do_rescale": False}, {"do_center_crop": "false"}, {"crop_size": None}, {"size": {"shortest_edge": True}},
        {"rescale_factor": 0}, {"crop_size": {"shortest_edge": -1}}, {"image_std": "x"}, {"resample": [1]},
    ],
)  # fmt: skip
def test_settings_of_images_that_cannot_be_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"the evaluation transform in preprocessor_config\.json cannot be read") as it:
        prepared(tmp_path, hf.DINOV2_PREPROCESSOR | changes)
    assert "\n" not in str(it.value)


def test_what_settings_do_not_say_is_the_default_of_their_class(tmp_path: Path) -> None:
    unsaid = {
        name: value for name, value in hf.DINOV2_PREPROCESSOR.items() if name not in ("do_center_crop", "resample")
    }
    assert prepared(tmp_path, unsaid)[0] == EvalTransform()
    assert prepared(tmp_path, unsaid | {"do_center_crop": None, "do_rescale": None})[0] == EvalTransform()
    fast = prepared(tmp_path, unsaid | {"image_processor_type": "ViTImageProcessorFast"})
    assert fast[:2] == (
        EvalTransform(resize=256, crop=256, interpolation="bilinear"),
        f"preprocessor_config.json's of {tmp_path}, and the centre is cut",
    )
    squashed = hf.DINO_PREPROCESSOR | {"size": 256, "crop_size": 224, "feature_extractor_type": "DeiTFeatureExtractor"}
    transform, origin, _ = prepared(tmp_path, squashed)
    assert (transform, "squashing" in origin) == (EvalTransform(), True)


@pytest.mark.parametrize("name", ["", "LevitImageProcessor", ["ViTImageProcessor"]])
def test_a_crop_of_which_nothing_says_whether_it_is_made_is_refused(tmp_path: Path, name: object) -> None:
    unsaid = hf.DINOV2_PREPROCESSOR | {"image_processor_type": name, "do_center_crop": None}
    with pytest.raises(InputError, match="a crop_size, and nothing says whether do_center_crop is true"):
        prepared(tmp_path, unsaid)


def test_the_defaults_of_classes_are_those_of_transformers_itself() -> None:
    import transformers

    for name, ours in _PROCESSORS.items():
        theirs = getattr(transformers, f"{name}ImageProcessor")(size=100)
        assert ours == (bool(getattr(theirs, "do_center_crop", False)), theirs.resample, "height" in theirs.size), name


def test_an_export_keeps_what_the_transform_cannot_express(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = {"size": {"height": 64, "width": 64}}
    place = hf.folder(tmp_path / "hf", hf.weights("vit"), hf.VIT_CONFIG, hf.DINO_PREPROCESSOR | half)
    clause = ", but for its squashing of images to squares: the centre is cut"
    for number, source in enumerate((place, tmp_path / "0.safetensors")):  # an export of an export too
        export(source, "safetensors", tmp_path / f"{number}.safetensors")
        assert f"{clause}\n" in capsys.readouterr().out
        again = load_backbone(tmp_path / f"{number}.safetensors")
        assert (again.transform_from, again.transform_exception) == (f"the checkpoint's{clause}", clause)
    export(hf.folder(tmp_path / "crop", hf.weights("vit"), hf.VIT_CONFIG, hf.DINOV2_PREPROCESSOR | {
        "size": {"shortest_edge": 73}, "crop_size": 64}), "safetensors", tmp_path / "crop.safetensors")  # fmt: skip
    assert load_backbone(tmp_path / "crop.safetensors").transform_from == "the checkpoint's"


@pytest.mark.parametrize("said", ["\x1b[31m" + "x" * 9999, "\n\n"])
def test_a_clause_of_an_exports_metadata_is_words_of_one_line(tmp_path: Path, said: str) -> None:
    metadata = {"arch": NAMES["vit"], "eval_transform": json.dumps(EvalTransform(64, 64).to_dict()), EXCEPTION: said}
    safetensors.torch.save_file(dict(files.vit().state_dict()), tmp_path / "a.safetensors", metadata)
    found = load_backbone(tmp_path / "a.safetensors").transform_from
    assert found.isprintable()
    assert len(found) < 999


def test_settings_beside_weights_of_another_layout_do_not_count(tmp_path: Path) -> None:
    place = hf.folder(tmp_path, files.xcit().state_dict(), hf.VIT_CONFIG | {"hidden_act": "relu"}, {"size": "none"})
    read = load_backbone(place)
    assert (read.arch, read.transform, read.transform_from) == ("xcit_pico_4_p8", EvalTransform(), "")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """someone/dino in the cache of huggingface_hub, which has no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    root = tmp_path / "models--someone--dino"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    return root


def test_a_repository_of_the_hub_is_read_with_both_settings(repository: Path) -> None:
    state = hf.weights("vit")
    hf.folder(repository / "snapshots" / ("0" * 40), state, hf.VIT_CONFIG, hf.DINO_PREPROCESSOR)
    read = load_backbone("hf-hub:someone/dino")
    assert (read.arch, read.transform, read.heads_assumed) == (NAMES["vit"], EvalTransform(resize=224), 0)
    assert read.transform_from.startswith("preprocessor_config.json's of hf-hub:someone/dino")
    assert_computes("hf-hub:someone/dino", hf.forward(state, 3, IMAGES, eps=1e-6), prefix=1)


def test_settings_that_a_repository_is_known_to_lack_are_no_hindrance_without_a_network(repository: Path) -> None:
    hf.folder(repository / "snapshots" / ("0" * 40), hf.weights("vit"), hf.VIT_CONFIG)
    with pytest.raises(InputError, match=r"cannot fetch preprocessor_config\.json of someone/dino"):
        load_backbone("hf-hub:someone/dino")
    absent = repository / ".no_exist" / ("0" * 40)  # where huggingface_hub notes it
    absent.mkdir(parents=True)
    (absent / "preprocessor_config.json").touch()
    read = load_backbone("hf-hub:someone/dino")
    assert (read.arch, read.transform_from) == (NAMES["vit"], "")


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000])
def test_a_preprocessor_config_json_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    place = hf.folder(tmp_path, hf.weights("vit"), hf.VIT_CONFIG)
    (place / "preprocessor_config.json").write_text(text)
    with pytest.raises(InputError, match=r"preprocessor_config\.json.*move it away"):
        load_backbone(place)


def test_a_folder_without_a_whole_file_of_weights_is_refused(tmp_path: Path) -> None:
    place = hf.folder(tmp_path, hf.weights("vit"), hf.VIT_CONFIG)
    (place / "model.safetensors").rename(place / "model-00001-of-00002.safetensors")
    with pytest.raises(InputError, match="is a folder: expected a file"):
        load_backbone(place)
