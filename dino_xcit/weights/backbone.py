"""Weights out of a file in a frozen network, and all that is to be told about where they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino_xcit.models import build_backbone
from dino_xcit.transform import EvalTransform
from dino_xcit.weights.fit import Allowed
from dino_xcit.weights.printing import first
from dino_xcit.weights.reading import read_weights


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
    """Who says how its images are prepared, and ``transform_exception``; empty: nobody."""
    transform_exception: str = ""
    """A clause on what ``transform`` cannot express of what they say: ``, but for its squashing of images to squares:
    the centre is cut``."""
    transform_guess: str = ""
    """Where nobody says it, what ``transform`` is and why: ``ImageNet's way for 384 pixels, as its positions``."""
    classifiers: tuple[str, ...] = ()
    """See :class:`~dino_xcit.weights.reading.StoredWeights`."""
    heads_assumed: int = 0
    """See :class:`~dino_xcit.weights.reading.StoredWeights`."""

    def describe(self) -> str:
        """One line for the screen, and one more for each thing that should not go unnoticed."""
        lines = [f"{self.network} {self.arch} from {self.spec or self.path} ({self.layout}; weights {self.hash[:12]})"]
        if self.left_aside:
            lines.append(f"left aside, not the backbone: {first(self.left_aside, 8)}")
        if self.heads_assumed:
            lines.append(f"heads assumed: {self.heads_assumed} (a family's; --arch names another)")
        if self.allowed:
            lines.append(f"warning: allowed, though the file does not fit: {first(self.allowed, 8)}")
        return "\n".join(lines)


def load_backbone(
    spec: str | Path, network: str = "teacher", arch: str | None = None, allowed: Allowed | None = None
) -> LoadedBackbone:
    """Read a backbone.

    Args:
        spec: a checkpoint file, or a folder as the hub has them; ``hf-hub:ORG/NAME``; or ``timm:NAME``, with timm's
            pretrained tag or without.
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
        transform=read.preparation.transform,
        data=read.data,
        training=read.training,
        spec=str(spec),
        layout=read.layout,
        left_aside=read.left_aside,
        allowed=read.allowed,
        transform_from=read.preparation.said_by + read.preparation.exception,
        transform_exception=read.preparation.exception,
        transform_guess=read.preparation.guess,
        classifiers=read.classifiers,
        heads_assumed=read.heads_assumed,
    )


def hash_state(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of a state dict, in order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
