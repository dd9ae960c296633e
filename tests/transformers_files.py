"""Checkpoints of vision transformers, written by Hugging Face transformers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import foreign_checkpoints as files
from safetensors.torch import load_file
from torch import Tensor

WIDTH, SIDE = 192, 64
"""Width of vit_tiny, and image side in pixels."""
MODELS = {"vit": "ViT", "dinov2": "Dinov2", "registers": "Dinov2WithRegisters"}
VIT_CONFIG: dict[str, Any] = {
    "architectures": ["ViTModel"], "hidden_act": "gelu", "hidden_size": WIDTH, "image_size": SIDE,
    "layer_norm_eps": 1e-12, "model_type": "vit", "num_attention_heads": 3, "patch_size": 16, "qkv_bias": True,
}  # fmt: skip
DINO_PREPROCESSOR: dict[str, Any] = {
    "do_normalize": True, "do_resize": True, "feature_extractor_type": "ViTFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3, "size": 224,
}  # fmt: skip
DINOV2_PREPROCESSOR: dict[str, Any] = {
    **DINO_PREPROCESSOR, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "do_rescale": True,
    "image_processor_type": "BitImageProcessor", "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 256},
}  # fmt: skip


@cache
def model(kind: str, heads: int = 3) -> Any:
    """Build a network of two blocks with random weights."""
    import transformers  # the import takes seconds

    config = getattr(transformers, f"{MODELS[kind]}Config")(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=heads, intermediate_size=4 * WIDTH, image_size=SIDE,
        patch_size=16, layer_norm_eps=1e-6,
    )  # fmt: skip
    return files.shaken(getattr(transformers, f"{MODELS[kind]}Model")(config), 1)


@cache
def weights(kind: str) -> Mapping[str, Tensor]:
    """Return the weights of :func:`model` under their names in a saved file."""
    with tempfile.TemporaryDirectory() as place:
        model(kind).save_pretrained(place)
        return {key: value.clone() for key, value in load_file(Path(place) / "model.safetensors").items()}


def folder(
    path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None
) -> Path:
    """Write the files that ``save_pretrained`` of a model and of its image processor writes."""
    files.save_safetensors(path / "model.safetensors", state, {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    if preprocessor is not None:
        (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return path
