"""Which architecture a state dict is of, read off its names and shapes. D features."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from dino_xcit.errors import InputError
from dino_xcit.models.vit import VIT_FAMILIES, VitShape, family_of
from dino_xcit.models.xcit import XCIT_SIZES
from dino_xcit.weights.names import shown

_RESNETS: dict[tuple[int, tuple[int, ...]], str] = {
    (2, (2, 2, 2, 2)): "resnet18",
    (2, (3, 4, 6, 3)): "resnet34",
    (3, (3, 4, 6, 3)): "resnet50",
    (3, (3, 4, 23, 3)): "resnet101",
    (3, (3, 8, 36, 3)): "resnet152",
}
"""Convolutions a block, and blocks a stage (arXiv 1512.03385, table 1), to timm's name."""

_SWIGLU = "a transformer with SwiGLU, as DINOv2's giant (timm:vit_giant_patch14_dinov2.lvd142m)"
_DINOV3 = "DINOv3 (timm:vit_small_patch16_dinov3.lvd1689m, timm:convnext_tiny.dinov3_lvd1689m ...)"
_NOT_READ = {
    "patch_embed.proj.0.weight": "a transformer of MoCo v3 with a stem of convolutions, vit_conv_...",
    "blocks.0.mlp.w12.weight": _SWIGLU,
    "blocks.0.mlp.weights_in.weight": _SWIGLU,  # by Hugging Face transformers
    "storage_tokens": _DINOV3,
    "blocks.0.mlp.up_proj.weight": _DINOV3,  # by Hugging Face transformers
    "downsample_layers.0.0.weight": _DINOV3,  # its ConvNeXt
}
"""A key that tells a network for which there is no architecture here, and which; in brackets timm's copies."""


def architecture_of(state: Mapping[str, Tensor], where: str, heads: int = 0) -> str:
    """The name under which :func:`dino_xcit.models.build_backbone` makes such a network.

    Args:
        state: a backbone's weights, under the names of :func:`dino_xcit.weights.names.backbone_names`.
        where: the file, for messages.
        heads: a transformer's, where they are known; 0: those of its family, as no shape shows them.

    Raises:
        InputError: it looks like none that has a name here.
    """
    if "cls_token" in state and "pos_embeder.token_projection.weight" in state:
        return _xcit(state, where)
    for key, words in _NOT_READ.items():
        if key in state:
            raise InputError(f"{where} is {words}, which is not read here: give timm's copy as --weights timm:NAME")
    if "cls_token" in state and "pos_embed" in state and "patch_embed.proj.weight" in state:
        return _vit(state, where, heads)
    if "conv1.weight" in state and "layer1.0.conv1.weight" in state:
        return _resnet(state, where)
    raise InputError(
        f"cannot tell the architecture of {where} (first keys: {shown(state, 3)}): give --arch timm:NAME if these are "
        "the keys of a model of timm's; else save the backbone's state dict by itself (docs/checkpoints.md)"
    )


def _xcit(state: Mapping[str, Tensor], where: str) -> str:
    temperature = state.get("blocks.0.attn.temperature")
    if temperature is None or not temperature.ndim or not state["cls_token"].ndim:
        raise InputError(f"{where} looks like an XCiT but lacks a cls_token [1, 1, D] or blocks.0.attn.temperature")
    dim, depth, heads = state["cls_token"].shape[-1], _count(state, "blocks."), temperature.shape[0]
    stages = sum(key.startswith("patch_embed.proj.") and key.endswith(".0.weight") for key in state)
    for name, size in XCIT_SIZES.items():
        if (size.dim, size.depth, size.heads) == (dim, depth, heads) and stages < 10:
            return f"{name}_p{2**stages}"
    raise InputError(f"{where} is an XCiT of {dim} features, {depth} layers and {heads} heads, which has no name here")


def _vit(state: Mapping[str, Tensor], where: str, heads: int) -> str:
    """DINO's, DINOv2's and timm's plain vision transformers. Patches [D, 3, p, p]; positions [1, 1 + grid * grid, D],
    without the first where there are registers [1, R, D]."""
    positions, patches = state["pos_embed"].shape, state["patch_embed.proj.weight"].shape
    registers = state["reg_token"].shape[1] if "reg_token" in state and state["reg_token"].ndim == 3 else 0
    of_patches = positions[1] - (0 if registers else 1) if len(positions) == 3 and len(patches) == 4 else -1
    grid = math.isqrt(max(0, of_patches))
    if grid * grid != of_patches or patches[2] != patches[3]:
        found = f"pos_embed {list(positions[:6])} and patch_embed.proj.weight {list(patches[:6])}"
        raise InputError(
            f"{where} has {found}, expected [1, 1 + h * h, D] and [D, 3, p, p]: other ViTs are not read here"
        )
    width, depth, patch, scaled = positions[2], _count(state, "blocks."), patches[2], "blocks.0.ls1.gamma" in state
    if family := family_of(width):
        heads = heads or VIT_FAMILIES[family][1]
        shape = VitShape(family, depth, patch, grid * patch, heads, layer_scale=scaled, registers=registers)
        if shape.can_be():
            return shape.name
    sizes = f"{width} features, {depth} layers, {heads or 'unknown'} heads and patches of {patch} pixels"
    raise InputError(f"{where} is a ViT of {sizes}, which has no name here: give --arch timm:NAME")


def _resnet(state: Mapping[str, Tensor], where: str) -> str:
    blocks = tuple(_count(state, f"layer{stage}.") for stage in range(1, 5))
    convolutions = 3 if "layer1.0.conv3.weight" in state else 2
    name = _RESNETS.get((convolutions, blocks))
    if name is None or state["layer1.0.conv1.weight"].shape[:1] != (64,):
        sizes = f"{' + '.join(map(str, blocks))} blocks with {convolutions} convolutions each"
        raise InputError(f"{where} is a ResNet of {sizes}, which has no name here: give --arch timm:NAME")
    return f"timm:{name}"


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Blocks: different second words of the keys that start so."""
    return len({key.split(".")[1] for key in state if key.startswith(prefix)})
