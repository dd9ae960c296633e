"""What Hugging Face transformers says about weights: ``config.json`` and ``preprocessor_config.json`` beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dino_xcit.errors import InputError
from dino_xcit.transform import EvalTransform
from dino_xcit.weights.printing import shown
from dino_xcit.weights.timm_config import SIDE_LIMIT

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Pillow's numbers of its filters (PIL.Image.Resampling)."""
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
        if not isinstance(heads, int) or not 0 <= heads <= 99:
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
            if said.get("do_resize", True) is not True or abs(divisor - 255) > 0.1:
                raise ValueError("images that keep their size, or pixels that are not divided by 255")
            crops = said.get("do_center_crop") is True
            size = said["size"]
            squashes = not crops if isinstance(size, int) else "shortest_edge" not in size
            resize = _side(size)
            normalises = said.get("do_normalize", True) is True
            transform = EvalTransform.from_dict(
                {
                    "resize": resize,
                    "crop": _side(said["crop_size"]) if crops else resize,
                    "interpolation": _FILTERS[said.get("resample", 2)],
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


def _side(size: Any) -> int:
    """Pixels: of a number, of ``{"shortest_edge": 256}``, of ``{"height": 224, "width": 224}``."""
    if isinstance(size, Mapping):
        sides = {size["shortest_edge"]} if "shortest_edge" in size else {size["height"], size["width"]}
        if len(sides) != 1:
            raise ValueError(f"{shown([dict(size)])} is no square")
        (size,) = sides
    if not isinstance(size, int) or not 1 <= size <= SIDE_LIMIT:
        raise ValueError(f"a side of {shown([size])}, expected 1 to {SIDE_LIMIT} pixels")
    return size
