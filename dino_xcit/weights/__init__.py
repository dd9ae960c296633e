"""Anybody's weights to a frozen backbone: which file, which network in it, which architecture, all said.

docs/checkpoints.md lists what is known. Reading executes nothing, and keys that are missing or left over are an error
unless they were allowed by name. The parts, in the order in which they are used: :mod:`~dino_xcit.weights.files` (where
it is), :mod:`~dino_xcit.weights.layouts` (what is in it), :mod:`~dino_xcit.weights.names` (under which names),
:mod:`~dino_xcit.weights.architecture` (of what), :mod:`~dino_xcit.weights.fit` (whether all of it is there).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino_xcit.errors import InputError
from dino_xcit.models import build_backbone
from dino_xcit.models.vit import vit_side
from dino_xcit.transform import EvalTransform
from dino_xcit.weights.architecture import architecture_of, family_heads
from dino_xcit.weights.files import WeightsFile, open_weights
from dino_xcit.weights.fit import Allowed, fit
from dino_xcit.weights.hub import TIMM
from dino_xcit.weights.layouts import NETWORKS, ONLY, first, read_network, shown

__all__ = [
    "NETWORKS",
    "ONLY",
    "Allowed",
    "LoadedBackbone",
    "StoredWeights",
    "hash_state",
    "load_backbone",
    "read_weights",
]


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
    transform: EvalTransform
    transform_from: str
    data: str | None
    training: dict[str, Any]
    classifiers: tuple[str, ...] = ()
    """Classifiers on the backbone, which were left aside: such a file was trained with labels."""
    heads_assumed: int = 0
    """A transformer's heads where nobody named them; 0: they are known."""


@dataclass
class LoadedBackbone:
    """A backbone in eval mode, and where it comes from."""

    backbone: nn.Module
    arch: str
    network: str
    """``teacher``, ``student``, or ``the only network`` of a backbone-only file."""
    path: Path
    hash: str
    """Of the backbone's weights alone: the same for checkpoint.pth and the backbone.pth written beside it."""
    transform: EvalTransform
    data: str | None
    """What it was trained on, where the file says so."""
    training: dict[str, Any] = field(default_factory=dict)
    """The stored settings of the run, where the file has them."""
    spec: str = ""
    """What was asked for: a path, ``hf-hub:ORG/NAME`` or ``timm:NAME``."""
    layout: str = ""
    """Whose layout the file has, in words."""
    left_aside: tuple[str, ...] = ()
    """Parts of the file that are not this backbone: heads, classifiers, the other network."""
    allowed: tuple[str, ...] = ()
    """``missing KEY`` and ``unexpected KEY`` for each exception that was made: such a backbone is not the file's."""
    transform_from: str = ""
    """Who says how its images are prepared; empty: nobody, and ``transform`` is ImageNet's way."""
    classifiers: tuple[str, ...] = ()
    """See :class:`StoredWeights`."""
    heads_assumed: int = 0
    """See :class:`StoredWeights`."""

    def describe(self) -> str:
        """One line for the screen, and one more for each thing that should not go unnoticed."""
        lines = [f"{self.network} {self.arch} from {self.spec or self.path} ({self.layout}; weights {self.hash[:12]})"]
        if self.left_aside:
            lines.append(f"left aside, not the backbone: {first(self.left_aside, 8)}")
        if self.heads_assumed:
            lines.append(f"heads assumed: {self.heads_assumed} (a family's; --arch names another)")
        if self.allowed:
            lines.append(f"notice: allowed, though the file does not fit: {first(self.allowed, 8)}")
        return "\n".join(lines)


def load_backbone(
    spec: str | Path, network: str = "teacher", arch: str | None = None, allowed: Allowed | None = None
) -> LoadedBackbone:
    """Read a backbone.

    Args:
        spec: a checkpoint file; ``hf-hub:ORG/NAME``; or ``timm:NAME``, with timm's pretrained tag or without.
        network: ``teacher`` or ``student``, for files that hold both.
        arch: its architecture, where the file neither says nor shows it.
        allowed: keys that may be missing (they keep the values that an untrained network with seed 0 has) or left over.

    Raises:
        InputError: no such file, not readable safely, no such network, another architecture, missing or unknown keys
            (the first few are named).
    """
    read = read_weights(spec, network, arch, allowed)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        backbone = build_backbone(read.arch)
    backbone.load_state_dict(read.state, strict=not read.allowed)
    backbone.eval().requires_grad_(False)
    return LoadedBackbone(
        backbone=backbone,
        arch=read.arch,
        network=read.network,
        path=read.path,
        hash=hash_state(backbone.state_dict()),
        transform=read.transform,
        data=read.data,
        training=read.training,
        spec=str(spec),
        layout=read.layout,
        left_aside=read.left_aside,
        allowed=read.allowed,
        transform_from=read.transform_from,
        classifiers=read.classifiers,
        heads_assumed=read.heads_assumed,
    )


def read_weights(
    spec: str | Path, network: str = "teacher", arch: str | None = None, allowed: Allowed | None = None
) -> StoredWeights:
    """As :func:`load_backbone`, without a network to put them into, and with the DINO head if there is one."""
    allowed = allowed or Allowed()
    allowed.check()
    file = open_weights(spec)
    where = str(spec)
    training = _training(file.content)
    stored = read_network(file.content, network, where)
    like, refusal = "", None
    try:
        like = _said(file, training, where) or architecture_of(stored.state, where)
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
    transform, transform_from = _transform(file, name, where)
    return StoredWeights(
        state=fitting.state,
        head=stored.head,
        arch=name,
        network=stored.network,
        path=file.path,
        layout=stored.layout,
        left_aside=(*fitting.classifiers, *stored.left_aside),
        allowed=fitting.allowed,
        transform=transform,
        transform_from=transform_from,
        data=str(training["data_path"]) if training.get("data_path") else None,
        training=training,
        classifiers=tuple(name for name in fitting.classifiers if f"{name}.weight" in stored.state),
        heads_assumed=0 if arch or _named(training, name) else family_heads(name),
    )


def hash_state(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of a state dict, in order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _training(content: Mapping[str, Any]) -> dict[str, Any]:
    stored = content.get("args", {})
    if isinstance(stored, argparse.Namespace):
        stored = vars(stored)
    return dict(stored) if isinstance(stored, Mapping) else {}


def _said(file: WeightsFile, training: Mapping[str, Any], where: str) -> str:
    """The architecture by the file's own word, where that is one of timm's; empty where the shapes must tell."""
    named = training.get("arch")
    if isinstance(named, str) and named.startswith("timm:"):
        if len(named) > 100 or not named.isprintable():
            raise InputError(f"{where} names an architecture that is none: {shown([named])}")
        return named
    # timm's XCiT is read as this project's, whose names its file was given.
    return "" if not file.timm_name or file.timm_name.startswith("xcit_") else f"{TIMM}{file.timm_name}"


def _named(training: Mapping[str, Any], name: str) -> bool:
    """Whether the stored settings name this architecture, or, as DINO's do, its family (``vit_small``)."""
    return f"{name}_".startswith(f"{training.get('arch')}_")


def _transform(file: WeightsFile, arch: str, where: str) -> tuple[EvalTransform, str]:
    """How images are prepared, and who says so."""
    if "eval_transform" in file.content:
        try:
            return EvalTransform.from_dict(file.content["eval_transform"]), "the checkpoint's"
        except (InputError, OverflowError, RuntimeError) as error:
            raise InputError(f"{where}: {shown([' '.join(str(error)[:1000].split())])}") from error
    if file.transform:
        return file.transform, file.transform_from
    side = vit_side(arch) or 224
    if side != 224:  # its positions were learnt for images of that size
        return dataclasses.replace(
            EvalTransform(), resize=round(side * 8 / 7), crop=side
        ), f"for {side} pixels, as its positions"
    return EvalTransform(), ""


def _without_memory(arch: str) -> nn.Module:
    try:
        with torch.device("meta"):
            return build_backbone(arch)
    except RuntimeError:  # a model of timm's that computes with its weights while it is built
        return build_backbone(arch)
