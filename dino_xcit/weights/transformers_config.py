"""What Hugging Face transformers says about weights: ``config.json`` and ``preprocessor_config.json`` beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dino_xcit.errors import InputError
from dino_xcit.transform import EvalTransform
from dino_xcit.weights.printing import shown
from dino_xcit.weights.timm_config import SIDE_LIMIT

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Pillow's numbers of its filters (PIL.Image.Resampling)."""


class _Processor(NamedTuple):
    """What a class of transformers' image processors does where its settings do not say it."""

    crops: bool
    resample: int
    squares: bool
    """Whether a size that is one number is both sides of a square, not the shorter side."""


_PROCESSORS = {
    "ViT": _Processor(crops=False, resample=2, squares=True),
    "DeiT": _Processor(crops=True, resample=3, squares=True),
    "Bit": _Processor(crops=True, resample=3, squares=False),
    "CLIP": _Processor(crops=True, resample=3, squares=False),
}
_LARGEST_EPSILON = 1e-6
"""Of LayerNorm, and ours. ViTConfig has 1e-12: the same to a millionth where the variance of features is 1 or more."""


@dataclass(frozen=True)
class TransformersFolder:
    """Settings that were read and not yet looked into: only where the weights are transformers' too do they count."""

    where: str
    """The folder or repository, for messages."""
    config: Mapping[str, Any]
    preprocessor: Mapping[str, Any] | None

    def heads(self) -> int:
        """Attention heads; 0 where nothing is said.

        Raises:
            InputError: settings of a network that is not computed here.
        """
        for name, expected in (("hidden_act", "gelu"), ("qkv_bias", True), ("use_swiglu_ffn", False)):
            found = self.config.get(name, expected)
            if found != expected:
                raise InputError(
                    f"{self.where}: {CONFIG} has {name} {shown([found])}, expected {expected}: networks with another "
                    "are not read here"
                )
        epsilon = self.config.get("layer_norm_eps", _LARGEST_EPSILON)
        if not isinstance(epsilon, (int, float)) or not 0 <= epsilon <= _LARGEST_EPSILON:
            raise InputError(
                f"{self.where}: {CONFIG} has layer_norm_eps {shown([epsilon])}, expected at most {_LARGEST_EPSILON}: "
                "networks with another are not read here"
            )
        heads = self.config.get("num_attention_heads", 0)
        if type(heads) is not int or not 0 <= heads <= 99:  # JSON's true is an int too
            raise InputError(f"{self.where}: {CONFIG} has num_attention_heads {shown([heads])}, expected 1 to 99")
        return heads

    def transform(self) -> tuple[EvalTransform | None, str]:
        """How images are prepared, and a clause on what cannot be followed; None where too little is said.

        A shorter side (``shortest_edge``) and a centre crop are followed to the letter. Where images are squashed to a
        square (``height`` and ``width``, or a number without a crop, as in ViTImageProcessor), here the shorter side
        gets that length and the centre is cut: on square images the same.

        Raises:
            InputError: values that cannot be.
        """
        said = self.preprocessor
        if said is None or "size" not in said:
            return None, ""
        try:
            divisor = 1 / float(said.get("rescale_factor", 1 / 255))
            rescales = _whether(said, "do_rescale", True)
            if not _whether(said, "do_resize", True) or not rescales or abs(divisor - 255) > 0.1:
                raise ValueError("images that keep their size, or pixels that are not divided by 255")
            processor = _processor(said)
            if processor is None and said.get("do_center_crop") is None and said.get("crop_size") is not None:
                raise ValueError("a crop_size, and nothing says whether do_center_crop is true")
            crops = _whether(said, "do_center_crop", processor is not None and processor.crops)
            if crops and said.get("crop_size") is None:
                raise ValueError("a centre crop without its crop_size")
            size = said["size"]
            squares = processor.squares if processor else not crops
            squashes = squares if isinstance(size, int) else "shortest_edge" not in size
            resize = _side(size)
            normalises = _whether(said, "do_normalize", True)
            transform = EvalTransform.from_dict(
                {
                    "resize": resize,
                    "crop": _side(said["crop_size"]) if crops else resize,
                    "interpolation": _FILTERS[said.get("resample", processor.resample if processor else 2)],
                    "mean": said["image_mean"] if normalises else (0.0, 0.0, 0.0),
                    "std": said["image_std"] if normalises else (1.0, 1.0, 1.0),
                }
            )
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise InputError(
                f"{self.where}: the evaluation transform in {PREPROCESSOR} cannot be read "
                f"({shown([' '.join(str(error).split())])})"
            ) from error
        if squashes:
            return transform, ", but for its squashing of images to squares: the centre is cut"
        return transform, "" if crops else ", and the centre is cut"


def _processor(said: Mapping[str, Any]) -> _Processor | None:
    """The class that the settings were written by; None: not named, or not known here."""
    name = said.get("image_processor_type") or said.get("feature_extractor_type")
    found = re.fullmatch(r"(\w{1,20}?)(ImageProcessor|FeatureExtractor)(Fast|Pil)?", name if type(name) is str else "")
    return _PROCESSORS.get(found[1]) if found else None


def _whether(said: Mapping[str, Any], name: str, default: bool) -> bool:
    """A setting that is true or false; without it, or null, the class's default counts."""
    value = said.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} is {shown([value])}, expected true or false")
    return default if value is None else value


def _side(size: Any) -> int:
    """Pixels: of a number, of ``{"shortest_edge": 256}``, of ``{"height": 224, "width": 224}``."""
    if isinstance(size, Mapping):
        sides = {size["shortest_edge"]} if "shortest_edge" in size else {size["height"], size["width"]}
        if len(sides) != 1:
            raise ValueError(f"{shown([dict(size)])} is no square")
        (size,) = sides
    if type(size) is not int or not 1 <= size <= SIDE_LIMIT:
        raise ValueError(f"a side of {shown([size])}, expected 1 to {SIDE_LIMIT} pixels")
    return size
