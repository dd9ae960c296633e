"""How an image is prepared for a frozen backbone. B batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dino_xcit.errors import InputError, one_line

if TYPE_CHECKING:
    from torch import Tensor

WHITE = (1 << 16) - 1
"""The value of a 16-bit image that is white, unless ``--white-level`` says otherwise."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

RGB = tuple[float, float, float]

INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")
"""torchvision's words."""

MAX_ASPECT = 16
"""Of an image's sides: a longer image is resized only where the centre crop is."""

SIDE_LIMIT = 1 << 14
"""Pixels a side that stored values may ask for: 800 MB of a picture are somebody's mistake."""
_LARGEST = 1e6
"""Of a stored mean or deviation, and 1 over it the least deviation: beyond, float32 keeps nothing of the pixels."""


@dataclass(frozen=True)
class EvalTransform:
    """Resize the shorter side, cut the centre, normalise: the field's evaluation transform.

    The defaults are those of DINO's and XCiT's published figures (REFERENCE: resize 256 bicubic, centre crop 224).
    """

    resize: int = 256
    """Pixels of the shorter side."""
    crop: int = 224
    """Pixels a side of the centre crop; an image narrower than that is padded with black."""
    interpolation: str = "bicubic"
    """bicubic, bilinear or lanczos."""
    mean: RGB = IMAGENET_MEAN
    std: RGB = IMAGENET_STD
    white_level: int = WHITE
    """Value of 16-bit images that is white: for :func:`dino_xcit.data.decode`."""

    def __call__(self, image: Image.Image) -> Tensor:
        """[3, crop, crop] uint8: normalisation happens on the device, see :func:`normalise`."""
        # Here, because training does not need them: torchvision takes two seconds to import.
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as TF

        short, long = sorted(image.size)
        if long > MAX_ASPECT * short:
            resized = self._resized_centre(image)
        else:
            resized = TF.resize(image, [self.resize], InterpolationMode(self.interpolation))
        return to_tensor(TF.center_crop(resized, [self.crop, self.crop]))

    def _resized_centre(self, image: Image.Image) -> Image.Image:
        """What the centre crop needs of the resized image: all of it could be gigabytes."""
        short, long = sorted(image.size)
        length = int(self.resize * long / short)
        first = round((length - self.crop) / 2)
        begin, end = first * long / length, (first + self.crop) * long / length
        size, box = (self.crop, self.resize), (begin, 0.0, end, float(short))
        if image.height > image.width:
            size, box = size[::-1], (0.0, begin, float(short), end)
        return image.resize(size, Image.Resampling[self.interpolation.partition("-")[0].upper()], box)

    def to_dict(self) -> dict[str, object]:
        """Plain values for a JSON card or a checkpoint. The usual white level is left out: 0.1 knew no other."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("white_level", WHITE)}

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> EvalTransform:
        """The inverse of :meth:`to_dict`. Nothing of it is believed: it comes from files.

        Raises:
            InputError: a value that is missing, or cannot be.
        """
        if not isinstance(values, Mapping):
            raise InputError(f"the stored evaluation transform is of type {type(values).__name__}, expected names")
        try:
            resize, crop = int(str(values["resize"])), int(str(values["crop"]))
            for name, side in (("resize", resize), ("crop", crop)):
                if not 1 <= side <= SIDE_LIMIT:
                    raise ValueError(f"{name} is not from 1 to {SIDE_LIMIT:,} pixels")
            white_level = int(str(values.get("white_level", WHITE)))
            if not 1 <= white_level <= WHITE:
                raise ValueError(f"white_level is not from 1 to {WHITE:,}")
            interpolation = str(values["interpolation"])
            if interpolation not in INTERPOLATIONS:
                raise ValueError(f"interpolation is {interpolation!r:.40}, expected one of {', '.join(INTERPOLATIONS)}")
            mean, std = _rgb("mean", values["mean"]), _rgb("std", values["std"])
            if not all(value >= 1 / _LARGEST for value in std):
                raise ValueError(f"std is {_shown(std)}, expected more than 0")
        except KeyError as error:
            raise InputError(f"the stored evaluation transform lacks {error.args[0]}") from error
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # the last: of a tensor among the values
            raise InputError(f"the stored evaluation transform: {one_line(error)}") from error
        return cls(resize, crop, interpolation, mean, std, white_level)


def _rgb(name: str, values: object) -> RGB:
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise ValueError(f"{name} is no list, expected three numbers")
    red, green, blue = (float(value) for value in values)
    if not all(abs(value) <= _LARGEST for value in (red, green, blue)):  # NaN is not, either
        raise ValueError(f"{name} is {_shown((red, green, blue))}, expected numbers such as 0.5")
    return red, green, blue


def _shown(values: RGB) -> str:
    return ", ".join(f"{value:g}" for value in values)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as uint8 [3, height, width]."""
    import torch  # here, because settings need none of it

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalise(images: Tensor, mean: RGB, std: RGB) -> Tensor:
    """(images / 255 - mean) / std, on the images' device.

    Args:
        images: [B, 3, height, width] uint8.

    Returns:
        float32 of the same shape.
    """
    import torch

    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device).view(1, 3, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images.device).view(1, 3, 1, 1)
    return images.to(torch.float32).mul_(scale).add_(shift)
