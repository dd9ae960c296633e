"""What timm says about weights: its list, and the ``config.json`` that it writes beside its files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dino_xcit.errors import InputError
from dino_xcit.transform import EvalTransform

SIDE_LIMIT = 4096
"""Pixels a side of images that a file may ask for."""


def transform_of(settings: Mapping[str, Any], where: str) -> tuple[EvalTransform | None, str]:
    """timm's pretrained_cfg as a transform, and a clause on what it cannot express; None where it says too little.

    timm resizes the shorter side to side / crop_pct, rounded down, and cuts the centre (timm.data.create_transform).
    """
    if not {"input_size", "mean", "std"} <= settings.keys():
        return None, ""
    try:
        _, height, width = settings["input_size"]
        share = float(settings.get("crop_pct") or 0.875)
        side = int(width)
        if height != width or not 1 <= side <= SIDE_LIMIT or not side / SIDE_LIMIT <= share <= 1:
            raise ValueError("no square of a size that can be")
        stored = {
            "resize": math.floor(side / share),
            "crop": side,
            "interpolation": settings.get("interpolation") or "bicubic",
            "mean": settings["mean"],
            "std": settings["std"],
        }
        transform = EvalTransform.from_dict(stored)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{where}: the evaluation transform in it cannot be read ({' '.join(str(error).split())[:200]})"
        ) from error
    mode = settings.get("crop_mode") or "center"
    return transform, "" if mode == "center" else f", but for its crop_mode {str(mode)[:20]!r}: the centre is cut"
