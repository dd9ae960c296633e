"""``--to timm``: a folder with model.safetensors (timm's names) and config.json, as ``timm.create_model`` reads it from
the disk (``local-dir:``) and from the Hugging Face Hub (``hf-hub:``).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from dino_xcit.errors import InputError
from dino_xcit.export.comparison import Features
from dino_xcit.export.photographs import Photographs
from dino_xcit.export.provenance import metadata
from dino_xcit.models.xcit import XCIT_SIZES, XCiT
from dino_xcit.runtime import atomic
from dino_xcit.transform import EvalTransform, normalise
from dino_xcit.weights import LoadedBackbone
from dino_xcit.weights.names import to_timm

WEIGHTS, CONFIG = "model.safetensors", "config.json"
"""The names that timm and the Hub look for."""

_MOST_PIXEL_DIFFERENCE = 1e-5
_STAND_IN = "xcit_nano_12_p{patch}_224"
"""timm's entry point under which sizes of this project's own are built; model_args replace all of its settings."""


def write(loaded: LoadedBackbone, folder: Path) -> None:
    """Write the two files into a folder that is made.

    Raises:
        InputError: timm has no such network.
    """
    config = _config(loaded)
    state = loaded.backbone.state_dict()
    if isinstance(loaded.backbone, XCiT):
        state = to_timm(state)
    else:
        state = {key.removeprefix("model."): value for key, value in state.items()}
    tensors = {key: value.contiguous() for key, value in state.items()}
    folder.mkdir(parents=True)
    content = safetensors.torch.save(tensors, metadata(loaded))
    atomic.write(folder / WEIGHTS, lambda file: file.write(content))
    atomic.write(folder / CONFIG, lambda file: file.write((json.dumps(config, indent=2) + "\n").encode()))


def reload(folder: Path) -> nn.Module:
    """The model as timm makes it of the folder: its output is the class token [B, D]."""
    import timm  # takes a second

    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return model.eval().requires_grad_(False)


def features(model: nn.Module) -> Features:
    """What the reloaded model computes."""

    def compute(images: Tensor) -> tuple[Tensor, ...]:
        return (model(images),)

    return compute


def check_transform(model: nn.Module, transform: EvalTransform, photographs: Photographs) -> None:
    """Hold the transform that timm makes of config.json against the checkpoint's.

    Raises:
        InputError: they give other pixels.
    """
    import timm.data

    data: Any = timm.data  # its types name none of what it offers
    theirs = data.create_transform(**data.resolve_model_data_config(model), is_training=False)
    for image in photographs.images:
        ours = normalise(transform(image)[None], transform.mean, transform.std)[0]
        given: Tensor = theirs(image)
        if ours.shape != given.shape or float((ours - given).abs().max()) > _MOST_PIXEL_DIFFERENCE:
            raise InputError(
                f"timm prepares an image of {image.width} x {image.height} pixels otherwise than the checkpoint asks "
                f"for ({transform}), so the folder would classify otherwise: export with --to safetensors instead"
            )


def _config(loaded: LoadedBackbone) -> dict[str, Any]:
    transform = loaded.transform
    architecture, model_args, prepared = _architecture(loaded)
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": int(loaded.backbone.embed_dim),  # type: ignore[arg-type]
        **({"model_args": model_args} if model_args else {}),
        "pretrained_cfg": {
            **prepared,
            "num_classes": 0,
            "input_size": [3, transform.crop, transform.crop],
            "interpolation": _interpolation(transform),
            "crop_pct": crop_share(transform),
            "crop_mode": "center",
            "mean": list(transform.mean),
            "std": list(transform.std),
        },
    }


def _architecture(loaded: LoadedBackbone) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """timm's entry point, what it is called with, and what pretrained_cfg says of the model itself."""
    import timm

    backbone = loaded.backbone
    if loaded.arch.startswith("timm:"):
        model: Any = backbone.model
        name = loaded.arch.removeprefix("timm:").partition(".")[0]  # without the tag of its weights
        known = {name: model.pretrained_cfg.get(name) for name in ("first_conv", "classifier", "fixed_input_size")}
        # See TimmBackbone: transformers with a fixed table of positions are told to interpolate it.
        if getattr(model, "dynamic_img_size", False):
            return name, {"dynamic_img_size": True}, {**known, "fixed_input_size": False}
        return name, {}, known
    if not isinstance(backbone, XCiT):
        raise InputError(f"timm has no name for {loaded.arch}: --to safetensors, onnx or torch-export")
    if backbone.patch_size not in (8, 16):
        raise InputError(
            f"timm's XCiT knows patches of 8 and 16 pixels, {loaded.arch} has {backbone.patch_size}: "
            "--to safetensors, onnx or torch-export"
        )
    # Not fixed: timm would build the network for the crop alone, and refuse one that the patch does not divide.
    known = {"first_conv": "patch_embed.proj.0.0", "classifier": "head", "fixed_input_size": False}
    if timm.is_model(f"{loaded.arch}_224"):
        return f"{loaded.arch}_224", {}, known
    size = XCIT_SIZES[loaded.arch.rpartition("_p")[0]]
    model_args = {
        "patch_size": backbone.patch_size,
        "embed_dim": size.dim,
        "depth": size.depth,
        "num_heads": size.heads,
        "mlp_ratio": size.mlp_ratio,
        "cls_attn_layers": size.class_blocks,
        "eta": size.layer_scale,
        "tokens_norm": size.tokens_norm,
    }
    return _STAND_IN.format(patch=backbone.patch_size), model_args, known


def _interpolation(transform: EvalTransform) -> str:
    if transform.interpolation == "nearest-exact":
        raise InputError("timm has no interpolation 'nearest-exact': --to safetensors, onnx or torch-export")
    return transform.interpolation


def crop_share(transform: EvalTransform) -> float:
    """timm's crop_pct: it resizes the shorter side to floor(crop / crop_pct)."""
    share = transform.crop / transform.resize
    while math.floor(transform.crop / share) < transform.resize:  # rounding
        share = math.nextafter(share, 0)
    return share
