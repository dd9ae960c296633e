"""Backbones by name, and the DINO head."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dino_xcit.errors import InputError, near_matches
from dino_xcit.models.channels import set_channels
from dino_xcit.models.head import DINOHead
from dino_xcit.models.multicrop import MultiCropOutput, MultiCropWrapper
from dino_xcit.models.output import BackboneOutput
from dino_xcit.models.xcit import PATCH_SIZES, XCIT_SIZES, XCiT

if TYPE_CHECKING:
    from dino_xcit.models.pyramid import FeaturePyramid

__all__ = [
    "BackboneOutput",
    "DINOHead",
    "MultiCropOutput",
    "MultiCropWrapper",
    "XCiT",
    "backbone_names",
    "build_backbone",
    "feature_pyramid",
    "is_registered",
    "register_backbone",
]


def backbone_names() -> list[str]:
    """Return all XCiT names."""
    return [f"{size}_p{patch}" for size in XCIT_SIZES for patch in PATCH_SIZES]


def feature_pyramid(backbone: nn.Module) -> FeaturePyramid:
    """Build the feature pyramid of an XCiT, a vision transformer or a timm model, for detection and segmentation.

    Raises:
        InputError: the backbone is of another kind, or has no maps of strides 4, 8, 16 and 32.
    """
    from dino_xcit.models.pyramid import FeaturePyramid  # imports timm, which takes a second

    return FeaturePyramid(backbone)


_REGISTERED: dict[str, Callable[..., nn.Module]] = {}


def register_backbone(name: str, build: Callable[..., nn.Module]) -> None:
    """Make ``--arch name`` call ``build(**kw)``.

    Args:
        build: returns a module with ``embed_dim`` and ``forward(images: [B, 3, H, W], layers=()) -> BackboneOutput``,
            the same in train and eval mode. It accepts ``drop_path_rate`` if it supports stochastic depth. If its
            ``forward`` has ``drop_path_keys`` ([B] int64), it gets keys that depend on (seed, epoch, image, view).

    Raises:
        ValueError: the name is taken.
    """
    if name in _REGISTERED or name in backbone_names() or name.startswith(("timm:", "vit_")):
        raise ValueError(f"backbone {name!r} is taken: choose another name")
    _REGISTERED[name] = build


def is_registered(name: object) -> bool:
    """Whether a backbone is registered under this name."""
    return name in _REGISTERED


def build_backbone(name: str, channels: int = 3, **kw: Any) -> nn.Module:
    """Build a backbone with random weights.

    Args:
        name: an official XCiT name such as ``xcit_small_12_p16`` (nano_12, tiny_12, tiny_24, small_12, small_24,
            medium_24, large_24, with p8 and p16, here also p4), this project's ``xcit_pico_4`` and ``xcit_micro_4``
            for small images; a vision transformer such as ``vit_small_12_p16`` (:mod:`dino_xcit.models.vit`);
            ``timm:NAME``; or a name registered with :func:`register_backbone`.
        channels: number of channels of the images.
        kw: ``drop_path_rate``, stochastic depth in training, 0 <= rate < 1; a registered backbone may accept others.

    Raises:
        InputError: the name is unknown, a registered backbone has no ``drop_path_rate``, or the number of channels of a
            backbone cannot be changed.
    """
    backbone = _build(name, **kw)
    if channels != 3:
        set_channels(backbone, channels)
    return backbone


def _build(name: str, **kw: Any) -> nn.Module:
    if name in _REGISTERED:
        parameters = inspect.signature(_REGISTERED[name]).parameters
        takes_rate = "drop_path_rate" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if kw.get("drop_path_rate") and not takes_rate:
            raise InputError(f"backbone {name} has no stochastic depth: give --drop-path-rate 0")
        return _REGISTERED[name](**kw)
    if name.startswith("timm:"):
        from dino_xcit.models.timm_backbone import build_timm  # timm takes a second to import

        return build_timm(name.removeprefix("timm:"), **kw)
    if name.startswith("vit_"):
        from dino_xcit.models.vit import build_vit

        return build_vit(name, **kw)
    size, _, patch = name.rpartition("_p")
    if size not in XCIT_SIZES or patch not in {str(p) for p in PATCH_SIZES}:
        near = near_matches(name, [*backbone_names(), *_REGISTERED])
        known = ", ".join([*(f"{size}_p16" for size in XCIT_SIZES), *_REGISTERED])
        raise InputError(f"unknown arch {name!r}{near} (known: {known}; _p8, _p4; vit_small_12_p16 ...; or timm:NAME)")
    return XCiT(XCIT_SIZES[size], int(patch), **kw)


def build_empty(name: str, channels: int = 3) -> nn.Module:
    """Build a backbone without memory for its weights, on the meta device; some timm models need the memory.

    Raises:
        InputError: the name is unknown.
    """
    try:
        with torch.device("meta"):
            return build_backbone(name, channels)
    except RuntimeError:  # some timm models compute with their weights in the constructor
        return build_backbone(name, channels)
