"""Image descriptors: pooling of tokens and averaging over scales.

Unlike DINO's ``eval_image_retrieval.py``, which normalises the sum of the raw features of all scales, each scale's
vector is normalised before the mean, so that all scales have the same weight, and image sides are rounded to whole
patches.

B batch, N patch tokens, D features of the backbone, E features of the vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt, Le, MinLen
from torch import Tensor, nn
from torch.nn import functional as F

from dino_xcit.bounds import Unique, check_bounds
from dino_xcit.errors import InputError
from dino_xcit.methods.student_teacher import choose_precision
from eval.config import Pooling

EPS = 1e-6
"""Lower bound of the tokens in GeM, whose power is undefined for negative numbers."""


@dataclass(frozen=True)
class Descriptor:
    """Map from images to vectors through a backbone.

    Patch tokens are the output of the last block that mixes patches (:class:`dino_xcit.models.BackboneOutput`): for
    XCiT, the last XCA block before class attention.
    """

    pooling: Pooling = "cls"
    """``cls``: the class token after the final norm. ``mean``: mean of the patch tokens. ``gem``: their generalised
    mean, see :func:`gem`. ``cls+mean``, ``cls+gem``: class token and mean, each of unit length, concatenated."""
    gem_p: Annotated[float, Gt(0), Le(100)] = 3.0
    """Exponent of the generalised mean."""
    scales: Annotated[tuple[float, ...], Gt(0), Le(8), MinLen(1), Unique] = (1.0,)
    """Factors of the sides of the transformed image. With more than one, the vector is the normalised mean of the
    normalised vectors of all scales."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the backbone's products."""

    def check(self) -> None:
        """Check all values.

        Raises:
            InputError: with field name, value and expected value.
        """
        check_bounds(self)

    def width(self, embed_dim: int) -> int:
        """Return E for a backbone of ``embed_dim`` features."""
        return 2 * embed_dim if "+" in self.pooling else embed_dim

    def __call__(self, backbone: nn.Module, images: Tensor) -> Tensor:
        """Compute vectors [B, E] in float32.

        Args:
            backbone: module that returns :class:`dino_xcit.models.BackboneOutput`.
            images: [B, channels, height, width], normalised.
        """
        vectors = [self._at(scale, backbone, images) for scale in self.scales]
        if len(vectors) == 1:
            return vectors[0]
        return F.normalize(torch.stack([F.normalize(vector, dim=1) for vector in vectors]).mean(dim=0), dim=1)

    def _at(self, scale: float, backbone: nn.Module, images: Tensor) -> Tensor:
        with autocast(self.precision, images.device):
            out = backbone(rescaled(images, scale, patch_size_of(backbone)))
        cls_token, tokens = out.cls_token.float(), out.patch_tokens.float()
        if self.pooling == "cls":
            return cls_token
        pooled = gem(tokens, self.gem_p) if "gem" in self.pooling else tokens.mean(dim=1)
        if self.pooling in ("mean", "gem"):
            return pooled
        return torch.cat([F.normalize(cls_token, dim=1), F.normalize(pooled, dim=1)], dim=1)

    def describe(self) -> str:
        """Describe the vector for logs and metadata."""
        mean = f"generalised mean (p = {self.gem_p:g})" if "gem" in self.pooling else "mean"
        what = "class token after the final norm" if self.pooling == "cls" else f"{mean} of the patch tokens"
        if "+" in self.pooling:
            what = f"class token and {what}, each of length 1"
        if self.scales != (1.0,):
            what += f"; image scaled by {', '.join(f'{scale:g}' for scale in self.scales)}"
        what += ", vectors averaged" if len(self.scales) > 1 else ""
        return what + (f"; backbone in {self.precision}" if self.precision != "fp32" else "")

    def to_dict(self) -> dict[str, object]:
        """Return the settings as plain values."""
        exponent = {"gem_p": self.gem_p} if "gem" in self.pooling else {}
        precision = {"precision": self.precision} if self.precision != "fp32" else {}
        return {"pooling": self.pooling, **exponent, "scales": list(self.scales), **precision}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Descriptor:
        """Invert :meth:`to_dict`.

        Raises:
            InputError: a value is missing or invalid.
        """
        try:
            scales = tuple(map(float, values["scales"]))
            exponent, precision = float(values.get("gem_p", cls.gem_p)), values.get("precision", cls.precision)
            found = cls(values["pooling"], exponent, scales, precision)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"the stored descriptor {str(values)[:200]} is invalid: {error!r:.100}") from error
        found.check()
        return found


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return a context that computes products on ``device`` in ``precision``."""
    dtype = choose_precision(precision, device)
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype)


CLASS_TOKEN = Descriptor()
"""The descriptor of k-NN and the linear probe."""


def gem(tokens: Tensor, p: float) -> Tensor:
    """Generalised mean over patch tokens, (mean(clamp(x, 1e-6)^p))^(1/p) (arXiv 1711.02512, equation 3).

    Args:
        tokens: [B, N, D] float32.
        p: 1 gives the mean of the clamped tokens, infinity the maximum.

    Returns:
        [B, D].
    """
    clamped = tokens.clamp(min=EPS)
    # Divide by the maximum so that the power does not overflow.
    largest = clamped.amax(dim=1, keepdim=True)
    return (clamped / largest).pow(p).mean(dim=1).pow(1 / p) * largest[:, 0]


def rescaled(images: Tensor, scale: float, patch_size: int) -> Tensor:
    """Rescale images bilinearly, as in DINO's and cirtorch's code, but to whole patches; scale 1 returns the input.

    Args:
        images: [B, channels, height, width].
        patch_size: side of a patch in pixels; 1 if unknown.
    """
    if scale == 1.0:
        return images
    height, width = (max(1, round(side * scale / patch_size)) * patch_size for side in images.shape[2:])
    return F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False)


def patch_size_of(backbone: nn.Module) -> int:
    """Return the side of a patch in pixels, also for timm models; 1 if unknown."""
    embed = getattr(getattr(backbone, "model", None), "patch_embed", None)
    size: Any = getattr(backbone, "patch_size", None) or getattr(embed, "patch_size", 1)
    return int(size[0] if isinstance(size, (tuple, list)) else size)
