"""Find the evaluation transform of weights: from the checkpoint, timm's or transformers' settings, or a guess."""

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
"""Maximum image size in settings, in pixels."""
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Values of PIL.Image.Resampling."""


class Preparation(NamedTuple):
    """A transform with its origin or, for a guess, its description. See :class:`dino_xcit.weights.load.Provenance`."""

    transform: EvalTransform
    transform_from: str = ""
    transform_exception: str = ""
    transform_guess: str = ""


def preparation(file: WeightsFile, arch: str, where: str, of_transformers: bool) -> Preparation:
    """Return the transform of the checkpoint, else of the settings beside it, else a guess by the architecture.

    Args:
        file: Content of the checkpoint and of the files beside it.
        arch: Architecture.
        where: Name of the file, for errors.
        of_transformers: Whether to use ``preprocessor_config.json``.

    Raises:
        InputError: The stored transform is invalid.
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
    """Convert timm's settings to a transform and its deviation; None if they are incomplete.

    timm resizes the shorter side to side / crop_pct, rounded down, and crops the centre (timm.data.create_transform).
    """
    settings = config.get("pretrained_cfg", config)  # timm before 0.9 had them beside the architecture
    if not isinstance(settings, Mapping) or not {"input_size", "mean", "std"} <= settings.keys():
        return None, ""
    _, height, width = settings["input_size"]
    share, side = float(settings.get("crop_pct") or 0.875), int(width)
    if height != width or not 1 <= side <= SIDE_LIMIT or not side / SIDE_LIMIT <= share <= 1:
        raise ValueError(f"input_size or crop_pct is invalid, expected a square of at most {SIDE_LIMIT} pixels")
    values = {
        "interpolation": settings.get("interpolation") or "bicubic",
        "mean": settings["mean"],
        "std": settings["std"],
    }
    mode = settings.get("crop_mode") or "center"
    clause = "" if mode == "center" else f", but with a centre crop instead of crop_mode {str(mode)[:20]!r}"
    return EvalTransform.from_dict(values | {"resize": math.floor(side / share), "crop": side}), clause


def _of_transformers(settings: Mapping[str, Any]) -> tuple[EvalTransform, str]:
    """Convert preprocessor_config.json to a transform and its deviation.

    A shorter side (``shortest_edge``) and a centre crop are applied exactly. Processors that squash images to a square
    (``height`` and ``width``, or a number without a crop, as in ViTImageProcessor) are replaced by a resize of the
    shorter side and a centre crop, which is the same for square images.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    resizes, rescales, normal = (given.get(f"do_{name}", True) for name in ("resize", "rescale", "normalize"))
    crops, size = given.get("do_center_crop", False), given["size"]
    divides = abs(1 / given.get("rescale_factor", 1 / 255) - 255) < 0.1
    if {resizes, rescales, divides} != {True} or not {normal, crops} <= {True, False}:
        raise ValueError("expected do_resize and do_rescale true, rescale_factor 1/255, and other do_... true or false")
    if "crop_size" in given and "do_center_crop" not in given:
        raise ValueError("it has crop_size but not do_center_crop")
    mean, std = (given["image_mean"], given["image_std"]) if normal else ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    stored = {"interpolation": _FILTERS[given["resample"]], "mean": mean, "std": std}
    stored |= {"resize": _side(size), "crop": _side(given["crop_size"] if crops else size)}
    clause = "" if crops else ", with a centre crop"
    if "shortest_edge" not in size if isinstance(size, Mapping) else not crops:
        clause = ", but with a centre crop instead of squashing images to squares"
    return EvalTransform.from_dict(stored), clause


def _side(size: Any) -> int:
    """Return the pixels of a number, of ``{"shortest_edge": 256}``, or of ``{"height": 224, "width": 224}``."""
    if isinstance(size, Mapping):
        sides = {size["shortest_edge"]} if "shortest_edge" in size else {size["height"], size["width"]}
        size = sides.pop() if len(sides) == 1 else "not square"
    if type(size) is not int or not 1 <= size <= SIDE_LIMIT:
        raise ValueError(f"a size is {size!r:.40}, expected 1 to {SIDE_LIMIT} pixels")
    return size


def _guess(arch: str) -> Preparation:
    shape = vit_shape(arch)
    if shape is not None and shape.layer_scale and shape.patch == 14:
        # Trained at 518 pixels in the end, evaluated with resize 256 and crop 224 (facebookresearch/dinov2, eval).
        return Preparation(EvalTransform(), transform_guess="ImageNet's transform, as in DINOv2's evaluations")
    if shape is not None and shape.side != 224:
        transform = dataclasses.replace(EvalTransform(), resize=round(shape.side * 8 / 7), crop=shape.side)
        return Preparation(transform, transform_guess=f"ImageNet's transform at {shape.side} pixels, as its positions")
    return Preparation(EvalTransform(), transform_guess="ImageNet's transform")
