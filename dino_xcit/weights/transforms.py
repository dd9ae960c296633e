"""How images are prepared for a file's weights, and who says so: the checkpoint, timm, transformers, or nobody."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from dino_xcit.errors import InputError, one_line, printable
from dino_xcit.models.vit import vit_shape
from dino_xcit.transform import EvalTransform
from dino_xcit.weights.locate import ASSUMED, EXCEPTION, PREPROCESSOR, WeightsFile

SIDE_LIMIT = 4096
"""Pixels a side of images that settings may ask for."""
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Pillow's numbers of its filters (PIL.Image.Resampling)."""


class Preparation(NamedTuple):
    """A transform, and either who says that it is the one or, where nobody does, why it was taken."""

    transform: EvalTransform
    transform_from: str = ""
    """With ``transform_exception``."""
    transform_exception: str = ""
    """A clause on what of their word the transform cannot express."""
    transform_guess: str = ""


def preparation(file: WeightsFile, arch: str, where: str, of_transformers: bool) -> Preparation:
    """What the file says; else what lies beside it; else a guess by the architecture.

    Args:
        where: the file, for messages.
        of_transformers: whether the weights are transformers'; else its settings of images do not count.

    Raises:
        InputError: what is said cannot be read.
    """
    content, source = file.content, "the checkpoint's"
    try:
        if "eval_transform" in content:
            found: EvalTransform | None = EvalTransform.from_dict(content["eval_transform"])
            clause = printable(str(content.get(EXCEPTION, ""))[:200])
        else:
            source = file.config_from
            found, clause = _of_timm(file.config)
            if ASSUMED in content and found == EvalTransform.from_dict(content[ASSUMED]):
                found = None  # config.json repeats an export's guess
            if not found and of_transformers and "size" in file.preprocessor:
                source = f"{PREPROCESSOR}'s of {where}"
                found, clause = _of_transformers(file.preprocessor)
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else one_line(error)
        raise InputError(f"cannot read the evaluation transform of {file.path} ({source}): {why}") from error
    return Preparation(found, source + clause, clause) if found else _guess(arch)


def _of_timm(config: Mapping[str, Any]) -> tuple[EvalTransform | None, str]:
    """timm's settings as a transform, and a clause on what it cannot express; None where they say too little.

    timm resizes the shorter side to side / crop_pct, rounded down, and cuts the centre (timm.data.create_transform).
    """
    settings = config.get("pretrained_cfg", config)  # timm before 0.9 had them beside the architecture
    if not isinstance(settings, Mapping) or not {"input_size", "mean", "std"} <= settings.keys():
        return None, ""
    _, height, width = settings["input_size"]
    share, side = float(settings.get("crop_pct") or 0.875), int(width)
    if height != width or not 1 <= side <= SIDE_LIMIT or not side / SIDE_LIMIT <= share <= 1:
        raise ValueError("no square of a size that can be")
    said = {
        "interpolation": settings.get("interpolation") or "bicubic",
        "mean": settings["mean"],
        "std": settings["std"],
    }
    mode = settings.get("crop_mode") or "center"
    clause = "" if mode == "center" else f", but for its crop_mode {str(mode)[:20]!r}: the centre is cut"
    return EvalTransform.from_dict(said | {"resize": math.floor(side / share), "crop": side}), clause


def _of_transformers(said: Mapping[str, Any]) -> tuple[EvalTransform, str]:
    """preprocessor_config.json as a transform, and a clause on what it cannot express.

    A shorter side (``shortest_edge``) and a centre crop are followed to the letter. Where images are squashed to a
    square (``height`` and ``width``, or a number without a crop, as in ViTImageProcessor), here the shorter side gets
    that length and the centre is cut: on square images the same.
    """
    told = {name: value for name, value in said.items() if value is not None}
    resizes, rescales, normal = (told.get(f"do_{name}", True) for name in ("resize", "rescale", "normalize"))
    crops, size = told.get("do_center_crop", False), told["size"]
    divides = abs(1 / told.get("rescale_factor", 1 / 255) - 255) < 0.1
    if {resizes, rescales, divides} != {True} or not {normal, crops} <= {True, False}:
        raise ValueError("settings that are not true or false, no resizing, or pixels that are not divided by 255")
    if "crop_size" in told and "do_center_crop" not in told:
        raise ValueError("a crop_size, and nothing says whether do_center_crop is true")
    mean, std = (told["image_mean"], told["image_std"]) if normal else ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    stored = {"interpolation": _FILTERS[told["resample"]], "mean": mean, "std": std}
    stored |= {"resize": _side(size), "crop": _side(told["crop_size"] if crops else size)}
    clause = "" if crops else ", and the centre is cut"
    if "shortest_edge" not in size if isinstance(size, Mapping) else not crops:
        clause = ", but for its squashing of images to squares: the centre is cut"
    return EvalTransform.from_dict(stored), clause


def _side(size: Any) -> int:
    """Pixels: of a number, of ``{"shortest_edge": 256}``, of ``{"height": 224, "width": 224}``."""
    if isinstance(size, Mapping):
        sides = {size["shortest_edge"]} if "shortest_edge" in size else {size["height"], size["width"]}
        size = sides.pop() if len(sides) == 1 else "of no square"
    if type(size) is not int or not 1 <= size <= SIDE_LIMIT:
        raise ValueError(f"a side {size!r:.40}, expected 1 to {SIDE_LIMIT} pixels")
    return size


def _guess(arch: str) -> Preparation:
    shape = vit_shape(arch)
    if shape is not None and shape.layer_scale and shape.patch == 14:
        # Its last weeks of training are at 518 pixels, its evaluations at 256 and 224 (facebookresearch/dinov2, eval).
        return Preparation(EvalTransform(), transform_guess="ImageNet's way, as in DINOv2's evaluations")
    if shape is not None and shape.side != 224:
        transform = dataclasses.replace(EvalTransform(), resize=round(shape.side * 8 / 7), crop=shape.side)
        return Preparation(transform, transform_guess=f"ImageNet's way for {shape.side} pixels, as its positions")
    return Preparation(EvalTransform(), transform_guess="ImageNet's way")
