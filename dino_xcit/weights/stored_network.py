"""One network out of a file, and in whose layout it lay there; what the readers of all layouts share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import Tensor

from dino_xcit.errors import InputError
from dino_xcit.weights.printing import shown

NETWORKS = ("teacher", "student")
ONLY = "the only network"


class Layout(StrEnum):
    """Whose layout a file has, in the words in which it is told (the table of docs/checkpoints.md has each)."""

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


@dataclass
class StoredNetwork:
    """One network of a file, under the names used here."""

    state: dict[str, Tensor]
    """The backbone's."""
    head: dict[str, Tensor]
    """Its DINO head's; empty where the file has none."""
    network: str
    """``teacher``, ``student`` or :data:`ONLY`."""
    layout: Layout
    left_aside: tuple[str, ...]
    """Parts of the file that are not the backbone: ``head``, ``classifier``, the other network."""
    heads: int = 0
    """A transformer's attention heads, where the layout's program has one number for its width; 0: unknown."""


def refuse_absent(network: str, present: list[str], where: str) -> None:
    """Refuse a network that the file does not hold.

    Args:
        present: those that it holds, one at least.

    Raises:
        InputError: with the networks that it holds.
    """
    if network not in present:
        raise InputError(f"{where} holds no {network}, only {', '.join(present)}: use --network {present[0]}")


def by_part(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """``{"head": {"mlp.0.weight": ...}}``: the first word of each key, and what is under it."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        parts.setdefault(part, {})[rest] = value
    return parts


def tensors(state: Mapping[Any, Any], holder: str) -> dict[str, Tensor]:
    """A state dict's content.

    Args:
        holder: which part of which file it is, for messages.

    Raises:
        InputError: it holds something else besides tensors.
    """
    wrong = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if wrong:
        raise InputError(f"{holder} holds besides tensors {shown(wrong[:3])}: not a checkpoint of a known kind")
    return dict(state)
