"""From a file to one network's weights, compared with their architecture: the order in which the parts are used."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino_xcit.errors import InputError
from dino_xcit.models import build_backbone, is_registered
from dino_xcit.models.vit import vit_shape
from dino_xcit.weights.architecture import architecture_of
from dino_xcit.weights.files import WeightsFile, open_weights
from dino_xcit.weights.fit import Allowed, fit
from dino_xcit.weights.hub import TIMM
from dino_xcit.weights.layouts import read_network
from dino_xcit.weights.preparation import Preparation, preparation
from dino_xcit.weights.printing import shown
from dino_xcit.weights.stored_network import Layout, StoredNetwork


@dataclass
class StoredWeights:
    """One network's weights out of a file, compared with its architecture, not yet in a network."""

    state: dict[str, Tensor]
    """The backbone's, under the architecture's names; without those that were allowed to be missing."""
    head: dict[str, Tensor]
    """Its DINO head's under DINO's names; empty where the file has none."""
    arch: str
    network: str
    path: Path
    layout: str
    left_aside: tuple[str, ...]
    allowed: tuple[str, ...]
    preparation: Preparation
    data: str | None
    training: dict[str, Any]
    classifiers: tuple[str, ...] = ()
    """Classifiers on the backbone, which were left aside: such a file was trained with labels."""
    heads_assumed: int = 0
    """A transformer's heads where nobody named them; 0: they are known."""


def read_weights(
    spec: str | Path, network: str = "teacher", arch: str | None = None, allowed: Allowed | None = None
) -> StoredWeights:
    """As :func:`dino_xcit.weights.load_backbone`, without a network to put them into, and with the DINO head if any."""
    allowed = allowed or Allowed()
    allowed.check()
    file = open_weights(spec)
    where = str(spec)
    training = _training(file.content)
    stored = read_network(file.content, network, where)
    settings = file.transformers if stored.layout is Layout.TRANSFORMERS else None
    heads = stored.heads or (settings.heads() if settings else 0) or _named_heads(training)
    like, refusal = "", None
    try:
        like = _said(file, training, where) or architecture_of(stored.state, where, heads)
    except InputError as error:
        refusal = error
    name = arch or like
    if not name:
        assert refusal is not None
        raise refusal
    # Without memory of its own first: a file of a few bytes may name or resemble a network of twenty gigabytes.
    try:
        fitting = fit(stored.state, _without_memory(name).state_dict(), name, where, allowed, like)
    except InputError as error:
        if not file.named_by or arch or name != f"{TIMM}{file.timm_name}":
            raise
        raise InputError(
            f"{error}; it is {file.named_by} that names {name}: move it away if it belongs to other weights"
        ) from error
    return StoredWeights(
        state=fitting.state,
        head=stored.head,
        arch=name,
        network=stored.network,
        path=file.path,
        layout=stored.layout,
        left_aside=(*fitting.classifiers, *fitting.of_training, *stored.left_aside),
        allowed=fitting.allowed,
        preparation=preparation(file, name, where, settings),
        data=str(training["data_path"]) if training.get("data_path") else None,
        training=training,
        classifiers=_classifiers(stored, fitting.classifiers),
        heads_assumed=0 if arch or heads or _named(training, name) else _heads(name),
    )


def _classifiers(stored: StoredNetwork, left_aside: Sequence[str]) -> tuple[str, ...]:
    """Those of one linear layer that stood on the backbone. MoCo, which uses no labels, puts its projector there: that
    of version 1 is one linear layer too."""
    if stored.layout in (Layout.MOCO, Layout.MOCO_V3):
        return ()
    return tuple(name for name in left_aside if f"{name}.weight" in stored.state)


def _training(content: Mapping[str, Any]) -> dict[str, Any]:
    stored = content.get("args", {})
    if isinstance(stored, argparse.Namespace):
        stored = vars(stored)
    return dict(stored) if isinstance(stored, Mapping) else {}


def _said(file: WeightsFile, training: Mapping[str, Any], where: str) -> str:
    """The architecture by the file's own word, where that is timm's or registered; empty where the shapes must tell."""
    named = training.get("arch")
    if is_registered(named):
        return str(named)
    if isinstance(named, str) and named.startswith("timm:"):
        if len(named) > 100 or not named.isprintable():
            raise InputError(f"{where} names an architecture that is none: {shown([named])}")
        return named
    # timm's XCiT is read as this project's, whose names its file was given.
    return "" if not file.timm_name or file.timm_name.startswith("xcit_") else f"{TIMM}{file.timm_name}"


def _named(training: Mapping[str, Any], name: str) -> bool:
    """Whether the stored settings name this architecture, or, as DINO's do, its family (``vit_small``)."""
    return f"{name}_".startswith(f"{training.get('arch')}_")


def _named_heads(training: Mapping[str, Any]) -> int:
    """A transformer's heads, where the stored settings have this project's name of it; else 0."""
    return _heads(str(training.get("arch"))[:100])


def _heads(name: str) -> int:
    shape = vit_shape(name)
    return shape.heads if shape else 0


def _without_memory(arch: str) -> nn.Module:
    try:
        with torch.device("meta"):
            return build_backbone(arch)
    except RuntimeError:  # a model of timm's that computes with its weights while it is built
        return build_backbone(arch)
