"""Layouts of weight files: the keys of backbone and head for each network, and the architecture from names and shapes.

The first matching row of :data:`ROWS` is used. A state dict without a matching row is a single network.
docs/checkpoints.md describes the same table. D: number of features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple

from torch import Tensor

from dino_xcit.errors import InputError
from dino_xcit.models.vit import VIT_FAMILIES, VitShape, family_of
from dino_xcit.models.xcit import XCIT_SIZES
from dino_xcit.weights.names import State, backbone_names, head_names, is_transformers, shown, unwrapped

NETWORKS = ("teacher", "student")
ONLY = "the only network"


class Layout(StrEnum):
    """Layout of a file, as printed."""

    DINO = "a DINO checkpoint"
    DINOV2 = "a DINOv2 training checkpoint"
    VISSL = "a VISSL checkpoint"
    LIGHTLY = "a checkpoint of lightly"
    SOLO_LEARN = "a checkpoint of solo-learn"
    MOCO_V3 = "a checkpoint of MoCo v3"
    MOCO = "a checkpoint of MoCo"
    MODULE = "a module's backbone"
    TRANSFORMERS = "a model of Hugging Face transformers"
    MAE = "a MAE checkpoint"
    STATE_DICT = "a state_dict"
    MODEL = "a model"
    BARE = "a backbone by itself"


class Row(NamedTuple):
    """Prefixes of the keys of a layout. If both networks have the same prefixes, the file has one network."""

    layout: Layout
    teacher: str
    """Prefix of the backbone and, separated by spaces, possible prefixes of the head."""
    student: str
    """The same for the student."""
    identified_by: str = ""
    """Prefixes that identify the layout, each on its own; empty: both backbones together."""


_DINO = "teacher.backbone teacher.head", "student.backbone student.head"
_DINOV2 = "teacher.backbone teacher.dino_head", "student.backbone student.dino_head"
_LIGHTLY = "teacher_backbone teacher_head", "student_backbone student_head"
ROWS = (
    Row(Layout.VISSL, "teacher.trunk teacher.heads.0", "student.trunk student.heads.0", "teacher.trunk"),
    Row(Layout.VISSL, "student.trunk student.heads.0", "student.trunk student.heads.0", "student.trunk"),
    Row(Layout.DINOV2, *_DINOV2, "teacher.dino_head student.dino_head"),
    Row(Layout.DINO, *_DINO, "teacher.backbone student.backbone"),
    # In lightly's benchmarks "backbone" is the teacher, in its momentum methods the student. In its MoCo v2 (ImageNet
    # benchmarks, mocov2.py) "backbone" encodes the keys and is the average of query_backbone.
    Row(Layout.LIGHTLY, "backbone projection_head", "student_backbone student_projection_head"),
    Row(Layout.LIGHTLY, "backbone projection_head", "query_backbone query_projection_head"),
    Row(Layout.LIGHTLY, "backbone_momentum projection_head_momentum", "backbone projection_head"),
    Row(Layout.LIGHTLY, *_LIGHTLY, "teacher_backbone student_backbone"),
    Row(Layout.SOLO_LEARN, "momentum_backbone momentum_head", "backbone head"),
    # MoCo's projector replaces the head or fc of the encoder.
    Row(Layout.MOCO_V3, "momentum_encoder", "base_encoder", "momentum_encoder base_encoder"),
    Row(Layout.MOCO, "encoder_k", "encoder_q", "encoder_k encoder_q"),
    Row(Layout.MODULE, "backbone head projection_head", "backbone head projection_head", "backbone"),
)
_CONTAINERS = {"backbone": Layout.BARE, "state_dict": Layout.STATE_DICT, "model": Layout.MODEL, "": Layout.BARE}
"""Keys of a file that contain a state dict; empty: the file is a state dict."""

_RESNETS: dict[tuple[int, tuple[int, ...]], str] = {
    (2, (2, 2, 2, 2)): "resnet18",
    (2, (3, 4, 6, 3)): "resnet34",
    (3, (3, 4, 6, 3)): "resnet50",
    (3, (3, 4, 23, 3)): "resnet101",
    (3, (3, 8, 36, 3)): "resnet152",
}
"""(convolutions per block, blocks per stage) (arXiv 1512.03385, table 1) to timm's name."""

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
"""Keys that identify unsupported architectures, with a description; in brackets timm's copies."""


class StoredNetwork(NamedTuple):
    """One network of a file, with the key names of this project."""

    state: State
    """State dict of the backbone."""
    head: State
    """State dict of the DINO head; empty if the file has none."""
    network: str
    """``teacher``, ``student`` or :data:`ONLY`."""
    layout: Layout
    left_aside: tuple[str, ...]
    """Parts of the file that are not the backbone: ``head``, ``classifier``, the other network."""


def read_network(content: Mapping[str, Any], network: str, where: str) -> StoredNetwork:
    """Return one network of a file.

    Args:
        content: Content of the file.
        network: ``teacher`` or ``student``. Ignored for files with a single network.
        where: Name of the file, for errors.

    Raises:
        InputError: The layout is unknown, or the file does not have this network.
    """
    if network not in NETWORKS:
        raise InputError(f"network is {network!r}, expected one of {', '.join(NETWORKS)}")
    state, layout, key = _state_dict(content, where)
    if row := next((row for row in ROWS if _fits(row, state)), None):
        return _read_row(row, state, network, where)
    if layout is Layout.DINO:
        raise InputError(f"{where} is not a DINO checkpoint: expected keys that start with backbone. in its networks")
    if is_transformers(state):
        layout = Layout.TRANSFORMERS
    elif "decoder_embed.weight" in state:
        layout = Layout.MAE
    left_aside = tuple(name for name in content if name == f"{key}_ema")
    return StoredNetwork(backbone_names(state), {}, ONLY, layout, left_aside)


def _state_dict(content: Mapping[str, Any], where: str) -> tuple[State, Layout, str]:
    """Return the state dict of a file, its preliminary layout, and the key that contains it.

    Files with one part per network, such as DINO's and VISSL's, become one state dict: ``teacher.backbone...``.
    """
    if "classy_state_dict" in content:
        content = _vissl_networks(content, where)
    if networks := [name for name in NETWORKS if isinstance(content.get(name), Mapping)]:
        parts = {name: unwrapped(_tensors(content[name], f"the {name} in {where}")) for name in networks}
        return {f"{name}.{key}": part[key] for name, part in parts.items() for key in part}, Layout.DINO, ""
    for key, layout in _CONTAINERS.items():
        found = content.get(key) if key else content
        if isinstance(found, Mapping) and any(isinstance(value, Tensor) for value in found.values()):
            return unwrapped(_tensors(found, f"{key} in {where}" if key else where)), layout, key
    expected = "a state dict, or a key such as teacher, state_dict or model with one"
    raise InputError(f"{where} is not a checkpoint: its keys are {shown(content, 5)}, expected {expected}")


def _vissl_networks(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Convert VISSL's model, and the DINO teacher inside its loss, to the layout of DINO's checkpoints."""
    try:
        model, words = content["classy_state_dict"]["base_model"]["model"], "momentum_teacher."
        parts = {"trunk": model["trunk"], "heads": model.get("heads") or {}}
        student = {f"{part}.{key}": value for part, inner in parts.items() for key, value in inner.items()}
        loss = content.get("loss") or {}
        teacher = {key.removeprefix(words): value for key, value in loss.items() if key.startswith(words)}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where} has a classy_state_dict, expected VISSL's base_model.model.trunk in it") from error
    return {"student": student, "teacher": teacher or None}


def _tensors(state: Mapping[Any, Any], holder: str) -> State:
    wrong = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if wrong:
        raise InputError(f"{holder} has values that are not tensors ({shown(wrong, 3)}): expected a state dict")
    return dict(state)


def _fits(row: Row, state: State) -> bool:
    if row.identified_by:
        return any(_under(state, word) for word in row.identified_by.split())
    return all(len(_under(state, words.split()[0])) > 1 for words in (row.teacher, row.student))


def _under(state: State, words: str) -> State:
    return {key[len(words) + 1 :]: value for key, value in state.items() if key.startswith(f"{words}.")}


def _read_row(row: Row, state: State, network: str, where: str) -> StoredNetwork:
    words = {name: of_network.split() for name, of_network in zip(NETWORKS, (row.teacher, row.student), strict=True)}
    present = [name for name in NETWORKS if _under(state, words[name][0])]
    if network not in present:
        raise InputError(f"{where} has no {network}, only {', '.join(present)}: use --network {present[0]}")
    backbone, *heads = words[network]
    holder = backbone.rpartition(".")[0]
    others = [key.removeprefix(f"{holder}.") for key in state if not key.startswith(f"{backbone}.")]
    left_aside = tuple(dict.fromkeys(key.partition(".")[0] for key in others))
    unknown = [part for part in left_aside if "backbone" in part]
    if row.layout is Layout.MODULE and network == "student" and unknown:
        parts = f"backbone and {shown(unknown, 3)}, an unknown layout"
        raise InputError(f"{where} has {parts}: remove --network student, or save the backbone alone")
    return StoredNetwork(
        state=backbone_names(_under(state, backbone)),
        head=next((found for word in heads if (found := head_names(_under(state, word)))), {}),
        network=network if row.teacher != row.student else ONLY,
        layout=row.layout,
        left_aside=left_aside,
    )


def architecture_of(state: State, where: str, heads: int = 0) -> str:
    """Infer the architecture, a name for :func:`dino_xcit.models.build_backbone`, from names and shapes.

    Args:
        state: State dict of a backbone, with names as from :func:`dino_xcit.weights.names.backbone_names`.
        where: Name of the file, for errors.
        heads: Number of heads of a ViT, which the shapes do not determine; 0: the default of its family.

    Raises:
        InputError: The architecture is unknown or unsupported.
    """
    if "cls_token" in state and "pos_embeder.token_projection.weight" in state:
        return _xcit(state, where)
    for key, words in _NOT_READ.items():
        if key in state:
            raise InputError(f"{where} is {words}, which is not supported: give timm's copy as --weights timm:NAME")
    if "cls_token" in state and "pos_embed" in state and "patch_embed.proj.weight" in state:
        return _vit(state, where, heads)
    if "conv1.weight" in state and "layer1.0.conv1.weight" in state:
        return _resnet(state, where)
    keys = f"first keys: {shown(state, 3)}"
    raise InputError(f"cannot infer the architecture of {where} ({keys}): save the backbone alone, or give --arch")


def _xcit(state: State, where: str) -> str:
    temperature = state.get("blocks.0.attn.temperature")
    if temperature is None or not temperature.ndim or not state["cls_token"].ndim:
        raise InputError(f"{where} looks like an XCiT but lacks a cls_token [1, 1, D] or blocks.0.attn.temperature")
    dim, depth, heads = state["cls_token"].shape[-1], _count(state, "blocks."), temperature.shape[0]
    stages = sum(key.startswith("patch_embed.proj.") and key.endswith(".0.weight") for key in state)
    for name, size in XCIT_SIZES.items():
        if (size.dim, size.depth, size.heads) == (dim, depth, heads) and stages < 10:
            return f"{name}_p{2**stages}"
    raise InputError(
        f"{where} is an XCiT with {dim} features, {depth} layers and {heads} heads, expected one of "
        f"{', '.join(XCIT_SIZES)}"
    )


def _vit(state: State, where: str, heads: int) -> str:
    """Infer the architecture of a plain ViT of DINO, DINOv2 or timm.

    Shapes: patch embedding [D, 3, p, p]; positions [1, 1 + grid * grid, D], or with registers [1, R, D] only
    [1, grid * grid, D].
    """
    positions, patches = state["pos_embed"].shape, state["patch_embed.proj.weight"].shape
    registers = state["reg_token"].shape[1] if "reg_token" in state and state["reg_token"].ndim == 3 else 0
    of_patches = positions[1] - (0 if registers else 1) if len(positions) == 3 and len(patches) == 4 else -1
    grid = math.isqrt(max(0, of_patches))
    if grid * grid != of_patches or patches[2] != patches[3]:
        found = f"pos_embed {list(positions[:6])} and patch_embed.proj.weight {list(patches[:6])}"
        raise InputError(
            f"{where} has {found}, expected [1, 1 + h * h, D] and [D, 3, p, p]: other ViTs are not supported"
        )
    width, depth, patch, scaled = positions[2], _count(state, "blocks."), patches[2], "blocks.0.ls1.gamma" in state
    if family := family_of(width):
        heads = heads or VIT_FAMILIES[family][1]
        shape = VitShape(family, depth, patch, grid * patch, heads, layer_scale=scaled, registers=registers)
        if shape.can_be():
            return shape.name
    sizes = f"{width} features, {depth} layers, {heads or 'unknown'} heads and patches of {patch} pixels"
    raise InputError(f"{where} is a ViT with {sizes}, which has no name here: give --arch timm:NAME")


def _resnet(state: State, where: str) -> str:
    blocks = tuple(_count(state, f"layer{stage}.") for stage in range(1, 5))
    convolutions = 3 if "layer1.0.conv3.weight" in state else 2
    name = _RESNETS.get((convolutions, blocks))
    if name is None or state["layer1.0.conv1.weight"].shape[:1] != (64,):
        sizes = f"{' + '.join(map(str, blocks))} blocks with {convolutions} convolutions each"
        raise InputError(f"{where} is a ResNet with {sizes}, which has no name here: give --arch timm:NAME")
    return f"timm:{name}"


def _count(state: State, prefix: str) -> int:
    """Count the blocks: distinct second words of the keys with this prefix."""
    return len({key.split(".")[1] for key in state if key.startswith(prefix)})
