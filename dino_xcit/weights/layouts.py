"""What a file of weights is made of: which of its keys are the backbone, which the head, of which network, and the
backbone's architecture, read off its names and shapes. D features.

The first row of :data:`ROWS` that fits is taken; a state dict that fits none is one network by itself.
docs/checkpoints.md has the same table in words.
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
    """Whose layout a file has, in the words in which it is told."""

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
    """First words of a layout's keys. Where both networks have the same, the file holds one network."""

    layout: Layout
    teacher: str
    """Of its backbone and, after a space each, of what may be its head."""
    student: str
    told_by: str = ""
    """Each of these words tells the layout alone; empty: the two backbones together do."""


_DINO = "teacher.backbone teacher.head", "student.backbone student.head"
_DINOV2 = "teacher.backbone teacher.dino_head", "student.backbone student.dino_head"
_LIGHTLY = "teacher_backbone teacher_head", "student_backbone student_head"
ROWS = (
    Row(Layout.VISSL, "teacher.trunk teacher.heads.0", "student.trunk student.heads.0", "teacher.trunk"),
    Row(Layout.VISSL, "student.trunk student.heads.0", "student.trunk student.heads.0", "student.trunk"),
    Row(Layout.DINOV2, *_DINOV2, "teacher.dino_head student.dino_head"),
    Row(Layout.DINO, *_DINO, "teacher.backbone student.backbone"),
    # lightly's benchmarks call the teacher "backbone", its momentum methods the student. In its MoCo v2 (benchmarks of
    # ImageNet, mocov2.py) the "backbone" encodes the keys and follows the query_backbone's average.
    Row(Layout.LIGHTLY, "backbone projection_head", "student_backbone student_projection_head"),
    Row(Layout.LIGHTLY, "backbone projection_head", "query_backbone query_projection_head"),
    Row(Layout.LIGHTLY, "backbone_momentum projection_head_momentum", "backbone projection_head"),
    Row(Layout.LIGHTLY, *_LIGHTLY, "teacher_backbone student_backbone"),
    Row(Layout.SOLO_LEARN, "momentum_backbone momentum_head", "backbone head"),
    # MoCo's projector takes the place of the encoder's own head or fc.
    Row(Layout.MOCO_V3, "momentum_encoder", "base_encoder", "momentum_encoder base_encoder"),
    Row(Layout.MOCO, "encoder_k", "encoder_q", "encoder_k encoder_q"),
    Row(Layout.MODULE, "backbone head projection_head", "backbone head projection_head", "backbone"),
)
_CONTAINERS = {"backbone": Layout.BARE, "state_dict": Layout.STATE_DICT, "model": Layout.MODEL, "": Layout.BARE}
"""Keys of a file under which a state dict may lie; the last: the file is one."""


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


class StoredNetwork(NamedTuple):
    """One network of a file, under the names used here."""

    state: State
    """The backbone's."""
    head: State
    """Its DINO head's; empty where the file has none."""
    network: str
    """``teacher``, ``student`` or :data:`ONLY`."""
    layout: Layout
    left_aside: tuple[str, ...]
    """Parts of the file that are not the backbone: ``head``, ``classifier``, the other network."""


def read_network(content: Mapping[str, Any], network: str, where: str) -> StoredNetwork:
    """The network asked for.

    Args:
        content: of a file, as it was read.
        network: ``teacher`` or ``student``; a file with one network gives that.
        where: the file, for messages.

    Raises:
        InputError: the file is of no known layout, or does not hold that network.
    """
    if network not in NETWORKS:
        raise InputError(f"network is {network!r}, expected one of {', '.join(NETWORKS)}")
    state, layout, key = _state_dict(content, where)
    if row := next((row for row in ROWS if _fits(row, state)), None):
        return _read_row(row, state, network, where)
    if layout is Layout.DINO:
        raise InputError(f"{where} is no DINO checkpoint: none of its networks has keys that start with backbone.")
    if is_transformers(state):
        layout = Layout.TRANSFORMERS
    elif "decoder_embed.weight" in state:
        layout = Layout.MAE
    left_aside = tuple(name for name in content if name == f"{key}_ema")
    return StoredNetwork(backbone_names(state), {}, ONLY, layout, left_aside)


def _state_dict(content: Mapping[str, Any], where: str) -> tuple[State, Layout, str]:
    """The state dict of a file, its layout by the key that it lies under, and that key; where the file has a part for
    each network, as DINO and VISSL, both of them in one state dict: ``teacher.backbone...``."""
    if "classy_state_dict" in content:
        content = _vissl_networks(content, where)
    if networks := [name for name in NETWORKS if isinstance(content.get(name), Mapping)]:
        parts = {name: unwrapped(_tensors(content[name], f"the {name} in {where}")) for name in networks}
        return {f"{name}.{key}": part[key] for name, part in parts.items() for key in part}, Layout.DINO, ""
    for key, layout in _CONTAINERS.items():
        found = content.get(key) if key else content
        if isinstance(found, Mapping) and any(isinstance(value, Tensor) for value in found.values()):
            return unwrapped(_tensors(found, f"{key} in {where}" if key else where)), layout, key
    places = "by itself, or under a key such as teacher, state_dict or model"
    raise InputError(f"{where} is no checkpoint: its keys are {shown(content, 5)}, expected a state dict {places}")


def _vissl_networks(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """VISSL's trained model, and DINO's teacher out of its loss, in the form of DINO's checkpoints."""
    try:
        model, words = content["classy_state_dict"]["base_model"]["model"], "momentum_teacher."
        parts = {"trunk": model["trunk"], "heads": model.get("heads") or {}}
        student = {f"{part}.{key}": value for part, inner in parts.items() for key, value in inner.items()}
        loss = content.get("loss") or {}
        teacher = {key.removeprefix(words): value for key, value in loss.items() if key.startswith(words)}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where} has a classy_state_dict without base_model.model.trunk, as VISSL has it") from error
    return {"student": student, "teacher": teacher or None}


def _tensors(state: Mapping[Any, Any], holder: str) -> State:
    wrong = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if wrong:
        raise InputError(f"{holder} holds besides tensors {shown(wrong, 3)}: no checkpoint of a known kind")
    return dict(state)


def _fits(row: Row, state: State) -> bool:
    if row.told_by:
        return any(_under(state, word) for word in row.told_by.split())
    return all(len(_under(state, words.split()[0])) > 1 for words in (row.teacher, row.student))


def _under(state: State, words: str) -> State:
    return {key[len(words) + 1 :]: value for key, value in state.items() if key.startswith(f"{words}.")}


def _read_row(row: Row, state: State, network: str, where: str) -> StoredNetwork:
    words = {name: of_network.split() for name, of_network in zip(NETWORKS, (row.teacher, row.student), strict=True)}
    present = [name for name in NETWORKS if _under(state, words[name][0])]
    if network not in present:
        raise InputError(f"{where} holds no {network}, only {', '.join(present)}: use --network {present[0]}")
    backbone, *heads = words[network]
    holder = backbone.rpartition(".")[0]
    others = [key.removeprefix(f"{holder}.") for key in state if not key.startswith(f"{backbone}.")]
    left_aside = tuple(dict.fromkeys(key.partition(".")[0] for key in others))
    unknown = [part for part in left_aside if "backbone" in part]
    if row.layout is Layout.MODULE and network == "student" and unknown:
        what = f"backbone and {shown(unknown, 3)}, which no program known here does"
        raise InputError(f"{where} holds {what}: leave out --network student, or save a backbone by itself")
    return StoredNetwork(
        state=backbone_names(_under(state, backbone)),
        head=next((found for word in heads if (found := head_names(_under(state, word)))), {}),
        network=network if row.teacher != row.student else ONLY,
        layout=row.layout,
        left_aside=left_aside,
    )


def architecture_of(state: State, where: str, heads: int = 0) -> str:
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
    keys = f"first keys: {shown(state, 3)}"
    raise InputError(f"cannot tell the architecture of {where} ({keys}): save a backbone by itself, or give --arch")


def _xcit(state: State, where: str) -> str:
    temperature = state.get("blocks.0.attn.temperature")
    if temperature is None or not temperature.ndim or not state["cls_token"].ndim:
        raise InputError(f"{where} looks like an XCiT but lacks a cls_token [1, 1, D] or blocks.0.attn.temperature")
    dim, depth, heads = state["cls_token"].shape[-1], _count(state, "blocks."), temperature.shape[0]
    stages = sum(key.startswith("patch_embed.proj.") and key.endswith(".0.weight") for key in state)
    for name, size in XCIT_SIZES.items():
        if (size.dim, size.depth, size.heads) == (dim, depth, heads) and stages < 10:
            return f"{name}_p{2**stages}"
    raise InputError(f"{where} is an XCiT of {dim} features, {depth} layers and {heads} heads, which has no name here")


def _vit(state: State, where: str, heads: int) -> str:
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


def _resnet(state: State, where: str) -> str:
    blocks = tuple(_count(state, f"layer{stage}.") for stage in range(1, 5))
    convolutions = 3 if "layer1.0.conv3.weight" in state else 2
    name = _RESNETS.get((convolutions, blocks))
    if name is None or state["layer1.0.conv1.weight"].shape[:1] != (64,):
        sizes = f"{' + '.join(map(str, blocks))} blocks with {convolutions} convolutions each"
        raise InputError(f"{where} is a ResNet of {sizes}, which has no name here: give --arch timm:NAME")
    return f"timm:{name}"


def _count(state: State, prefix: str) -> int:
    """Blocks: different second words of the keys that start so."""
    return len({key.split(".")[1] for key in state if key.startswith(prefix)})
