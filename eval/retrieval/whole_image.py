"""Whole pictures for retrieval, where cutting the centre out would lose what is looked for."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from dino_xcit.transform import EvalTransform, to_tensor


@dataclass(frozen=True)
class LongerSide(EvalTransform):
    """The whole picture in its own proportions, its longer side reduced to ``crop`` pixels and never enlarged.

    As revisitop and DINO prepare Revisited Oxford and Paris: Pillow's ``thumbnail`` with Lanczos. Pictures come out in
    many sizes, so that they go through the network one by one.
    """

    def __call__(self, image: Image.Image) -> Tensor:
        """[3, height, width] uint8, the longer of both at most ``crop``."""
        small = image.copy()  # thumbnail changes the picture itself
        small.thumbnail((self.crop, self.crop), Image.Resampling.LANCZOS)
        return to_tensor(small)

    def to_dict(self) -> dict[str, object]:
        return super().to_dict() | {"shape": "whole picture, longer side reduced to crop"}


@dataclass(frozen=True)
class Square(EvalTransform):
    """The whole picture squeezed into a square of ``crop`` pixels, bicubic, as DINO prepares Copydays."""

    def __call__(self, image: Image.Image) -> Tensor:
        """[3, crop, crop] uint8."""
        return to_tensor(image.resize((self.crop, self.crop), Image.Resampling.BICUBIC))

    def to_dict(self) -> dict[str, object]:
        return super().to_dict() | {"shape": "whole picture squeezed into a square of crop"}


def longer_side(stored: EvalTransform, pixels: int) -> LongerSide:
    """With the normalisation of ``stored``."""
    return LongerSide(pixels, pixels, "lanczos", stored.mean, stored.std)


def square(stored: EvalTransform, pixels: int) -> Square:
    """With the normalisation of ``stored``."""
    return Square(pixels, pixels, "bicubic", stored.mean, stored.std)
