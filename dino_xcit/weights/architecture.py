"""Which architecture a state dict is of, read off its names and shapes. D features."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dino_xcit.errors import InputError
from dino_xcit.models.vit import VIT_FAMILIES, VitShape, family_of
from dino_xcit.models.xcit import XCIT_SIZES
from dino_xcit.weights.printing import shown

_RESNETS: dict[tuple[int, tuple[int, ...]], str] = {
    (2, (2, 2, 2, 2)): "resnet18",
    (2, (3, 4, 6, 3)): "resnet34",
    (3, (3, 4, 6, 3)): "resnet50",
    (3, (3, 4, 23, 3)): "resnet101",
    (3, (3, 8, 36, 3)): "resnet152",
}
"""Convolutions a block, and blocks a stage (arXiv 1512.03385, table 1), to timm's name."""


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
    if "cls_token" in state and "pos_embed" in state and "patch_embed.proj.weight" in state:
        return _vit(state, where, heads)
    if "cls_token" in state and "patch_embed.proj.0.weight" in state:
        raise InputError(
            f"{where} is a vision transformer whose patches come out of several convolutions (MoCo v3's vit_conv_...), "
            "which is not read here: give --arch timm:NAME if timm has it"
        )
    if "conv1.weight" in state and "layer1.0.conv1.weight" in state:
        return _resnet(state, where)
    raise InputError(f"cannot tell the architecture of {where} (first keys: {shown(list(state)[:3])}): give --arch")


def _xcit(state: Mapping[str, Tensor], where: str) -> str:
    dim = state["cls_token"].shape[-1] if state["cls_token"].ndim else 0
    temperatures = [value for key, value in state.items() if key.endswith(".attn.temperature")]
    if not temperatures:
        raise InputError(f"{where} looks like an XCiT but lacks blocks.0.attn.temperature, as of every block")
    if not dim or not temperatures[0].ndim:
        raise InputError(f"{where} looks like an XCiT, but its cls_token or attn.temperature is a single number")
    depth, heads = _depth(state), temperatures[0].shape[0]
    stages = sum(key.startswith("patch_embed.proj.") and key.endswith(".0.weight") for key in state)
    for name, size in XCIT_SIZES.items():
        if (size.dim, size.depth, size.heads) == (dim, depth, heads) and stages < 10:
            return f"{name}_p{2**stages}"
    raise InputError(f"{where} is an XCiT of {dim} features, {depth} layers and {heads} heads, which has no name here")


def _vit(state: Mapping[str, Tensor], where: str, heads: int) -> str:
    """DINO's, DINOv2's and timm's plain vision transformers. Patches [D, 3, p, p]; positions [1, 1 + grid * grid, D],
    without the first where there are registers [1, R, D]."""
    positions, patches = state["pos_embed"], state["patch_embed.proj.weight"]
    if positions.ndim != 3 or patches.ndim != 4 or patches.shape[2] != patches.shape[3]:
        raise InputError(
            f"{where} looks like a vision transformer, but its pos_embed or patch_embed.proj.weight has the shape "
            f"{tuple(positions.shape[:6])} or {tuple(patches.shape[:6])}, expected [1, 1 + h * h, D] and [D, 3, p, p]"
        )
    if any(key.startswith(("blocks.0.mlp.w12.", "blocks.0.mlp.fc1_g.")) for key in state):
        raise InputError(
            f"{where} is a vision transformer with SwiGLU layers, such as DINOv2's giant, which is not read here: "
            "timm:vit_giant_patch14_dinov2.lvd142m and timm:vit_giant_patch14_reg4_dinov2.lvd142m are timm's copies"
        )
    registers = state["reg_token"].shape[1] if "reg_token" in state and state["reg_token"].ndim == 3 else 0
    width, depth, patch = int(positions.shape[2]), _depth(state), int(patches.shape[2])
    of_patches = max(0, int(positions.shape[1]) - (0 if registers else 1))
    grid = int(of_patches**0.5)
    if grid * grid != of_patches:
        raise InputError(
            f"{where} looks like a vision transformer with {positions.shape[1]} positions, expected one and a square "
            "number: other prefix tokens, or images that are not square, are not read here"
        )
    family = family_of(width)
    shape = family and VitShape(
        family=family,
        depth=depth,
        patch=patch,
        side=grid * patch,
        heads=heads or VIT_FAMILIES[family][1],
        layer_scale="blocks.0.ls1.gamma" in state,
        registers=registers,
    )
    if not shape or not shape.can_be():
        known = ", ".join(str(dim) for dim, _ in VIT_FAMILIES.values())
        told = f"{heads} heads, which have no name here" if heads else "its number of heads follows from no shape"
        raise InputError(
            f"{where} is a vision transformer of {width} features, {depth} layers and patches of {patch} pixels, and "
            f"{told} (known for {known} features): give --arch timm:NAME"
        )
    return shape.name


def _resnet(state: Mapping[str, Tensor], where: str) -> str:
    blocks = tuple(
        len({key.split(".")[1] for key in state if key.startswith(f"layer{stage}.")}) for stage in range(1, 5)
    )
    convolutions = 3 if "layer1.0.conv3.weight" in state else 2
    name = _RESNETS.get((convolutions, blocks))
    if name is None or state["layer1.0.conv1.weight"].shape[:1] != (64,):
        raise InputError(
            f"{where} is a ResNet of {' + '.join(map(str, blocks))} blocks with {convolutions} convolutions each, "
            "which has no name here: give --arch timm:NAME"
        )
    return f"timm:{name}"


def _depth(state: Mapping[str, Tensor]) -> int:
    return len({key.split(".")[1] for key in state if key.startswith("blocks.")})
