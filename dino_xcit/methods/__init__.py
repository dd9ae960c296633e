"""Training methods: DINO, SimDINO, and registered ones."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dino_xcit.config import PretrainConfig
from dino_xcit.errors import InputError, near_matches
from dino_xcit.methods.dino import DINO
from dino_xcit.methods.method import Method, Stats
from dino_xcit.methods.simdino import SimDINO
from dino_xcit.optim import parameter_groups
from dino_xcit.runtime import distributed

__all__ = ["Method", "Stats", "build_method", "register_method"]

Build = Callable[[PretrainConfig, torch.device], Method]
_METHODS: dict[str, Build] = {"dino": DINO, "simdino": SimDINO}


def register_method(name: str, build: Build) -> None:
    """Make ``--method name`` call ``build(config, device)``.

    Raises:
        ValueError: the name is taken.
    """
    if name in _METHODS:
        raise ValueError(f"method {name!r} is registered already: choose another name")
    _METHODS[name] = build


def build_method(config: PretrainConfig, device: torch.device) -> Method:
    """Build ``config.method`` with the same initial weights on every rank.

    Raises:
        InputError: the method is unknown, or it has no ``ddp_student`` with several ranks.
    """
    if config.method not in _METHODS:
        hint = near_matches(config.method, _METHODS)
        raise InputError(f"unknown method {config.method!r}{hint} (known: {', '.join(_METHODS)})")
    torch.manual_seed(config.seed)
    method = _METHODS[config.method](config, device)
    optional = {
        "teacher": None, "ddp_student": None, "features": None, "prototype_logits": None,
        "frozen_parameters": lambda rates: (), "parameter_groups": lambda: parameter_groups(method.trained),
    }  # fmt: skip
    for name, default in optional.items():
        if not hasattr(method, name):  # the class does not derive from Method
            setattr(method, name, default)
    if distributed.world_size() > 1 and method.ddp_student is None:
        raise InputError(
            f"method {config.method} has no ddp_student, so the gradients of {distributed.world_size()} ranks "
            "would not be averaged: set it to distributed.wrap_ddp(trained, device), or train on one rank"
        )
    return method
