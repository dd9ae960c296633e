"""Files of Hugging Face transformers' vision transformers: their names (version 4's, which version 5 writes too), and
what such a network computes, in float64 from the papers' formulas (arXiv 2010.11929, 2103.17239 for LayerScale).

B batch, N patches, D features, H heads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]
WIDTH, DEPTH, PATCH, SIDE = 192, 2, 16, 64
"""As vit_tiny, of two blocks."""

VIT_CONFIG: dict[str, Any] = {
    "architectures": ["ViTModel"], "hidden_act": "gelu", "hidden_size": WIDTH, "image_size": SIDE,
    "layer_norm_eps": 1e-12, "model_type": "vit", "num_attention_heads": 3, "patch_size": PATCH, "qkv_bias": True,
}  # fmt: skip
DINO_PREPROCESSOR: dict[str, Any] = {
    "do_normalize": True, "do_resize": True, "feature_extractor_type": "ViTFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3, "size": 224,
}  # fmt: skip
DINOV2_PREPROCESSOR: dict[str, Any] = {
    "crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "do_normalize": True, "do_rescale": True,
    "do_resize": True, "image_mean": [0.485, 0.456, 0.406], "image_processor_type": "BitImageProcessor",
    "image_std": [0.229, 0.224, 0.225], "resample": 3, "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 256},
}  # fmt: skip


def weights(kind: str, seed: int = 0) -> State:
    """Random weights under the names of ``vit`` (ViTModel), ``dinov2`` or ``registers`` (Dinov2WithRegistersModel)."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.position_embeddings": (1, 1 + (SIDE // PATCH) ** 2, WIDTH),
        "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, PATCH, PATCH),
        "embeddings.patch_embeddings.projection.bias": (WIDTH,),
    }
    if kind == "vit":
        norms, layers = ("layernorm_before", "layernorm_after"), ("intermediate.dense", "output.dense")
        shapes |= {"pooler.dense.weight": (WIDTH, WIDTH), "pooler.dense.bias": (WIDTH,)}
    else:
        norms, layers = ("norm1", "norm2"), ("mlp.fc1", "mlp.fc2")
        shapes["embeddings.mask_token"] = (1, WIDTH)
    if kind == "registers":
        shapes["embeddings.register_tokens"] = (1, 4, WIDTH)
    for block in range(DEPTH):
        before = f"encoder.layer.{block}."
        square = ("attention.query", "attention.key", "attention.value", "output.dense")
        sizes = {f"attention.{name}": (WIDTH, WIDTH) for name in square}
        sizes |= {layers[0]: (4 * WIDTH, WIDTH), layers[1]: (WIDTH, 4 * WIDTH)}
        for name, (outputs, inputs) in sizes.items():
            shapes |= {f"{before}{name}.weight": (outputs, inputs), f"{before}{name}.bias": (outputs,)}
        for name in norms:
            shapes |= {f"{before}{name}.weight": (WIDTH,), f"{before}{name}.bias": (WIDTH,)}
        if kind != "vit":
            shapes |= {f"{before}layer_scale{number}.lambda1": (WIDTH,) for number in (1, 2)}
    shapes |= {"layernorm.weight": (WIDTH,), "layernorm.bias": (WIDTH,)}
    scale = {True: 0.1, False: 0.5}  # of matrices, and of the rest
    return {
        name: scale[len(shape) == 2] * torch.randn(shape, generator=generator) for name, shape in sorted(shapes.items())
    }


def forward(state: Mapping[str, Tensor], heads: int, images: Tensor, eps: float) -> Tensor:
    """[B, 1 + registers + N, D] after the final norm, in float64, of images of the size of the positions."""
    w = {key: value.double() for key, value in state.items()}
    scaled = "encoder.layer.0.layer_scale1.lambda1" in w
    norms = ("norm1", "norm2") if scaled else ("layernorm_before", "layernorm_after")
    layers = ("mlp.fc1", "mlp.fc2") if scaled else ("intermediate.dense", "output.dense")

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        length = (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
        return centred / length * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    projection = "embeddings.patch_embeddings.projection"
    patches = F.conv2d(images.double(), w[f"{projection}.weight"], w[f"{projection}.bias"], stride=PATCH)
    x = torch.cat([w["embeddings.cls_token"].expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
    x = x + w["embeddings.position_embeddings"]
    if "embeddings.register_tokens" in w:  # they have no position
        x = torch.cat([x[:, :1], w["embeddings.register_tokens"].expand(len(images), -1, -1), x[:, 1:]], dim=1)
    for block in range(DEPTH):
        name = f"encoder.layer.{block}."
        seen = norm(x, name + norms[0])
        q, k, v = (
            linear(seen, f"{name}attention.attention.{part}").unflatten(2, (heads, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        attended = ((q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
        branch = linear(attended, f"{name}attention.output.dense")
        x = x + branch * (w[f"{name}layer_scale1.lambda1"] if scaled else 1)
        hidden = linear(norm(x, name + norms[1]), name + layers[0])
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        x = x + linear(hidden, name + layers[1]) * (w[f"{name}layer_scale2.lambda1"] if scaled else 1)
    return norm(x, "layernorm")


def folder(
    path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None
) -> Path:
    """What ``save_pretrained`` of a model and of its image processor leave."""
    path.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(dict(state), path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    if preprocessor is not None:
        (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return path
