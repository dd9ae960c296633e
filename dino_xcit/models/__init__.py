"""Backbones by name, and the DINO head."""

from __future__ import annotations

from torch import nn

from dino_xcit.errors import InputError, near_matches
from dino_xcit.models.head import DINOHead
from dino_xcit.models.multicrop import StudentOutput, ViewNetwork
from dino_xcit.models.output import BackboneOutput
from dino_xcit.models.xcit import PATCH_SIZES, XCIT_SIZES, XCiT

__all__ = [
    "BackboneOutput",
    "DINOHead",
    "StudentOutput",
    "ViewNetwork",
    "XCiT",
    "backbone_names",
    "build_backbone",
]


def backbone_names() -> list[str]:
    """Every name of an XCiT that :func:`build_backbone` knows; the others are ``vit_...`` and ``timm:NAME``."""
    return [f"{size}_p{patch}" for size in XCIT_SIZES for patch in PATCH_SIZES]


def build_backbone(name: str, drop_path_rate: float = 0.0) -> nn.Module:
    """A fresh backbone.

    Args:
        name: an official XCiT name such as ``xcit_small_12_p16`` (nano_12, tiny_12, tiny_24, small_12, small_24,
            medium_24, large_24, with p8, p16 and here also p4), this project's ``xcit_pico_4`` and ``xcit_micro_4``
            for small images; a vision transformer such as ``vit_small_12_p16`` (:mod:`dino_xcit.models.vit`); or
            ``timm:NAME``.
        drop_path_rate: stochastic depth while training, 0 <= rate < 1.

    Returns:
        A module with ``embed_dim`` and ``forward(images, layers=(), drop_path_keys=None) -> BackboneOutput``.

    Raises:
        InputError: the name is not known; near matches are given.
    """
    if name.startswith("timm:"):
        from dino_xcit.models.timm_backbone import build_timm  # timm takes a second to import

        return build_timm(name.removeprefix("timm:"), drop_path_rate)
    if name.startswith("vit_"):
        from dino_xcit.models.vit import build_vit

        return build_vit(name, drop_path_rate)
    size, _, patch = name.rpartition("_p")
    if size not in XCIT_SIZES or patch not in {str(p) for p in PATCH_SIZES}:
        raise InputError(
            f"unknown arch {name!r}{near_matches(name, backbone_names())} "
            f"(known: {', '.join(XCIT_SIZES)}, each with _p4, _p8 or _p16; vit_small_12_p16 and the like; or "
            "timm:NAME)"
        )
    return XCiT(XCIT_SIZES[size], int(patch), drop_path_rate)
