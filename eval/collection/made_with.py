"""The backbone that made a collection's vectors, to make others like them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import torch

from dino_xcit.errors import InputError
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import LoadedBackbone
from eval.collection.store import CARD, Collection
from eval.config import BackboneConfig
from eval.features import width_of
from eval.setup import open_backbone

Config = TypeVar("Config", bound=BackboneConfig)


def with_weights_of(collection: Collection, config: Config) -> Config:
    """Settings with the collection's weights where none are given, and with the network of theirs that made it; keys
    that were allowed to be missing or left over then may be so again."""
    made_by = collection.card["weights"]
    network = made_by.get("network")
    allowed = made_by.get("allowed") or []
    return dataclasses.replace(
        config,
        weights=config.weights or made_by["path"],
        network=network if network in ("teacher", "student") else config.network,
        arch=config.arch or made_by.get("arch") or "",
        allow_missing=(*config.allow_missing, *_keys(allowed, "missing ")),
        allow_unexpected=(*config.allow_unexpected, *_keys(allowed, "unexpected ")),
    )


def _keys(allowed: Sequence[str], kind: str) -> list[str]:
    """Of the exceptions that a card names; a beginning and ``*`` is no key, and would allow more than was."""
    return [
        word.removeprefix(kind) for word in allowed if word.startswith(kind) and word != kind and not word.endswith("*")
    ]


def open_backbone_of(collection: Collection, config: BackboneConfig) -> tuple[LoadedBackbone, torch.device]:
    """The backbone with the preparation of images that the collection's card says, on this process's device.

    Raises:
        InputError: the weights cannot be used, are others than those that made the collection, or give vectors of
            another width than it has.
    """
    transform = EvalTransform.from_dict(collection.card["transform"])
    loaded, device = open_backbone(with_weights_of(collection, config), transform)
    made_by = collection.card["weights"]["hash"]
    if loaded.hash != made_by:
        raise InputError(
            f"{loaded.path} (weights {loaded.hash[:12]}) did not make the vectors in {collection.folder} (weights "
            f"{made_by[:12]}): give the file that did with --weights, or extract anew"
        )
    check_width(collection, loaded)
    return loaded, device


def check_width(collection: Collection, loaded: LoadedBackbone) -> None:
    """Refuse a collection whose vectors are not as wide as its card's descriptor of these weights makes them.

    Raises:
        InputError: they are not.
    """
    made, held = collection.descriptor.width(width_of(loaded.backbone)), collection.width
    if made != held:
        raise InputError(
            f"{collection.folder} is damaged (its vectors were made of {held} numbers, and what its {CARD} says makes "
            f"{made}): extract it anew"
        )
