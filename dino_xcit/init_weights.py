"""Initialise the backbones, and matching heads, of a new run from a file (``--init-weights``).

Optimizer, step, schedules and center start as in any new run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from dino_xcit.config import PretrainConfig
from dino_xcit.errors import InputError
from dino_xcit.methods import Method
from dino_xcit.methods.student_teacher import StudentTeacher
from dino_xcit.models.channels import adapted, first_convolution
from dino_xcit.models.vit import vit_shape
from dino_xcit.weights import Allowed, StoredWeights, read_weights
from dino_xcit.weights.names import shown


def initialise(method: Method, config: PretrainConfig) -> str:
    """Load ``config.init_network`` of ``config.init_weights`` into student and teacher; return a message.

    Keys that are allowed to be missing keep their initial values, which are the same in both.

    Raises:
        InputError: The file cannot be used, or has another architecture.
    """
    if not isinstance(method, StudentTeacher):
        raise InputError(f"init_weights is for methods with a student and a teacher, but method is {config.method}")
    # The architecture of timm's models cannot be inferred from shapes, so it is taken from the settings.
    given = config.arch if config.arch.startswith("timm:") else None
    allowed = Allowed(config.allow_missing, config.allow_unexpected)
    read = read_weights(config.init_weights, config.init_network, given, allowed)
    if read.arch != config.arch and not _differs_in_assumed_heads(read, config.arch):
        raise InputError(
            f"init_weights is {config.init_weights}, a {read.arch}, but arch is {config.arch}: give --arch "
            f"{read.arch}, or weights of that architecture"
        )
    if (stored_channels := len(read.transform.mean)) != config.channels:
        name = f"{first_convolution(method.student.backbone)[0]}.weight"
        if name in read.state:
            read.state[name] = adapted(read.state[name], config.channels)
    whole = not read.allowed
    for network in (method.student, method.teacher):
        network.backbone.load_state_dict(read.state, strict=whole)
    why_fresh = _why_not(read.head, method.student.head.state_dict())
    if not why_fresh:
        for network in (method.student, method.teacher):
            network.head.load_state_dict(read.head)
    lines = [
        f"starting from {read.network} {config.arch} of {config.init_weights} ({read.layout}), for student and "
        "teacher; " + (f"heads start fresh: {why_fresh}" if why_fresh else f"heads too{_lengths(read.head, config)}")
    ]
    if stored_channels != config.channels:
        lines.append(
            f"first convolution adapted from {stored_channels} to {config.channels} channels: each has the mean of the "
            f"weights, times {stored_channels}/{config.channels}"
        )
    if read.allowed:
        lines.append(f"warning: allowed mismatches of the file: {shown(read.allowed)}")
    stored = read.transform if read.transform_from else None
    same_channels = stored_channels == config.channels
    if stored and same_channels and (stored.mean, stored.std) != (config.mean, config.std):
        lines.append(
            f"warning: the weights were trained with mean {_rounded(stored.mean)} and std {_rounded(stored.std)}, "
            f"this run has {_rounded(config.mean)} and {_rounded(config.std)} (--mean, --std)"
        )
    return "\n".join(lines)


def _differs_in_assumed_heads(read: StoredWeights, arch: str) -> bool:
    """Whether the two ViTs differ only in the number of heads, which the file does not determine."""
    found, wanted = vit_shape(read.arch), vit_shape(arch)
    if not read.heads_assumed or found is None or wanted is None:
        return False
    return dataclasses.replace(found, heads=wanted.heads) == wanted


def _why_not(head: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Return why the head of the file cannot be used; empty if it can."""
    if not head:
        return "the file has no DINO head"
    if head.keys() != own.keys():
        return f"the file's has other layers ({', '.join(sorted(head.keys() ^ own.keys())[:3])})"
    for key, value in own.items():
        if head[key].shape != value.shape:
            shapes = [" x ".join(map(str, tensor.shape)) for tensor in (head[key], value)]
            return f"in the file {key} is {shapes[0]}, in this run {shapes[1]}"
    return ""


def _lengths(head: Mapping[str, Tensor], config: PretrainConfig) -> str:
    """Return a clause on prototypes that are frozen at norms other than 1."""
    frozen = config.norm_last_layer and not torch.all(head["last_layer.weight_g"] == 1)
    return ", with prototypes frozen at norms other than 1 (--norm-last-layer false trains them)" if frozen else ""


def _rounded(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.3g}" for value in values)
