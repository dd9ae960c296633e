"""What a file of weights is made of: which of its parts is the backbone, which the head, and which network that is.

Each layout is recognised by its keys, as its program writes them (:class:`~dino_xcit.weights.stored_network.Layout`
names all; docs/checkpoints.md has the table). Here: files with a part for each network (DINO, this project, iBOT,
DINOv2), and files with one network alone. Of the others, :mod:`~dino_xcit.weights.vissl_layout` and
:mod:`~dino_xcit.weights.module_layouts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dino_xcit.errors import InputError
from dino_xcit.weights.module_layouts import read_module
from dino_xcit.weights.names import backbone_names, head_names, unwrapped
from dino_xcit.weights.printing import shown
from dino_xcit.weights.stored_network import (
    NETWORKS,
    ONLY,
    Layout,
    StoredNetwork,
    by_part,
    refuse_absent,
    tensors,
)
from dino_xcit.weights.transformers_names import is_transformers
from dino_xcit.weights.vissl_layout import read_vissl

_PLAIN = (("backbone", Layout.BARE), ("state_dict", Layout.STATE_DICT), ("model", Layout.MODEL), ("", Layout.BARE))
"""Under which key of a file a state dict lies; the last: none, the file is one."""


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
    if isinstance(content.get("classy_state_dict"), Mapping):
        return read_vissl(content, network, where)
    if any(isinstance(content.get(name), Mapping) for name in NETWORKS):
        return _read_networks(content, network, where)
    for key, layout in _PLAIN:
        inner = content.get(key) if key else content
        if isinstance(inner, Mapping) and inner and any(isinstance(value, Tensor) for value in inner.values()):
            state = unwrapped(tensors(inner, f"{key} in {where}" if key else where))
            if of_both := _networks_in(state):
                return _read_networks(of_both, network, where)
            averaged = [f"{name}_ema" for name in (key,) if isinstance(content.get(f"{name}_ema"), Mapping)]
            return read_module(state, network, where) or StoredNetwork(
                backbone_names(state), {}, ONLY, _layout_of(state, layout), tuple(averaged)
            )
    raise InputError(f"{where} is no checkpoint of a known kind: its keys are {shown(list(content)[:5])} ...")


def _layout_of(state: Mapping[str, Tensor], layout: Layout) -> Layout:
    """The layout of a state dict with one network, where its names tell more than the key that it lies under."""
    if is_transformers(state):
        return Layout.TRANSFORMERS
    return Layout.MAE if "decoder_embed.weight" in state else layout


def _networks_in(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """DINOv2's whole training state, cut in its networks; empty where it is none: ``teacher.backbone.cls_token``."""
    parts = {name: state_of for name, state_of in by_part(state).items() if name in NETWORKS}
    return parts if any("backbone" in by_part(inner) for inner in parts.values()) else {}


def _read_networks(content: Mapping[str, Any], network: str, where: str) -> StoredNetwork:
    """DINO's and iBOT's full checkpoints, this project's, and DINOv2's: each network a ``backbone`` and a head."""
    present = [name for name in NETWORKS if isinstance(content.get(name), Mapping)]
    refuse_absent(network, present, where)
    parts = by_part(unwrapped(tensors(content[network], f"the {network} in {where}")))
    if "backbone" not in parts:
        raise InputError(f"the {network} in {where} has no keys that start with 'backbone.': not a DINO checkpoint")
    second = "dino_head" in parts  # DINOv2 has one head for images and, where it is not shared, one for patches
    return StoredNetwork(
        state=backbone_names(parts.pop("backbone")),
        head=head_names(parts.get("dino_head" if second else "head", {})),
        network=network,
        layout=Layout.DINOV2 if second else Layout.DINO,
        left_aside=(*parts, *(name for name in present if name != network)),
    )
