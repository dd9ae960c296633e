"""The evaluation transform: an image to the input of a frozen backbone. B: batch size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dino_xcit.errors import InputError, one_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WHITE = (1 << 16) - 1
"""Default white level of 16-bit images (``--white-level``)."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

RGB = tuple[float, float, float]

INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")
"""Values of torchvision's InterpolationMode."""

MAX_ASPECT = 16
"""Aspect ratio above which only the region of the centre crop is resized."""

SIDE_LIMIT = 1 << 14
"""Maximum ``resize`` and ``crop`` in stored transforms: an image of this size takes 800 MB."""
_MAX_VALUE = 1e6
"""Maximum of a stored mean or std, and inverse of the minimum std: beyond it, float32 loses the pixel values."""


@dataclass(frozen=True)
class EvalTransform:
    """Resize the shorter side, crop the centre, normalise.

    The defaults are those of DINO's and XCiT's published results (resize 256 bicubic, centre crop 224).
    """

    resize: int = 256
    """Shorter side in pixels."""
    crop: int = 224
    """Height and width of the centre crop in pixels. Narrower images are padded with black."""
    interpolation: str = "bicubic"
    """One of :data:`INTERPOLATIONS`."""
    mean: RGB = IMAGENET_MEAN
    std: RGB = IMAGENET_STD
    white_level: int = WHITE
    """Value of 16-bit images that maps to white, for :func:`dino_xcit.data.decode`."""

    def __call__(self, image: Image.Image) -> Tensor:
        """Resize and crop to [3, crop, crop] uint8. For the normalisation on the device see :func:`normalise`."""
        # torchvision takes two seconds to import, and training does not need it.
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as TF

        short, long = sorted(image.size)
        if long > MAX_ASPECT * short:
            resized = self._resized_centre(image)
        else:
            resized = TF.resize(image, [self.resize], InterpolationMode(self.interpolation))
        return to_tensor(TF.center_crop(resized, [self.crop, self.crop]))

    def _resized_centre(self, image: Image.Image) -> Image.Image:
        """Resize only the region of the centre crop, as the whole resized image could take gigabytes."""
        short, long = sorted(image.size)
        length = int(self.resize * long / short)
        first = round((length - self.crop) / 2)
        begin, end = first * long / length, (first + self.crop) * long / length
        size, box = (self.crop, self.resize), (begin, 0.0, end, float(short))
        if image.height > image.width:
            size, box = size[::-1], (0.0, begin, float(short), end)
        return image.resize(size, Image.Resampling[self.interpolation.partition("-")[0].upper()], box)

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON or a checkpoint. The default white level is omitted, as in version 0.1."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("white_level", WHITE)}

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> EvalTransform:
        """Invert :meth:`to_dict`. The values come from files and are validated.

        Raises:
            InputError: A value is missing or invalid.
        """
        if not isinstance(values, Mapping):
            raise InputError(f"the stored evaluation transform is a {type(values).__name__}, expected a dictionary")
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
            if not all(value >= 1 / _MAX_VALUE for value in std):
                raise ValueError(f"std is {_shown(std)}, expected more than 0")
        except KeyError as error:
            raise InputError(f"the stored evaluation transform lacks {error.args[0]}") from error
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # RuntimeError: a tensor
            raise InputError(f"the stored evaluation transform: {one_line(error)}") from error
        return cls(resize, crop, interpolation, mean, std, white_level)


def _rgb(name: str, values: object) -> RGB:
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise ValueError(f"{name} is not a list of three numbers")
    red, green, blue = (float(value) for value in values)
    if not all(abs(value) <= _MAX_VALUE for value in (red, green, blue)):  # also false for NaN
        raise ValueError(f"{name} is {_shown((red, green, blue))}, expected numbers such as 0.5")
    return red, green, blue


def _shown(values: RGB) -> str:
    return ", ".join(f"{value:g}" for value in values)


def pixels_of(image: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels of an RGB image as [height, width, 4], the last byte unused: Pillow's memory layout."""
    return np.frombuffer(image.tobytes("raw", "RGBX"), dtype=np.uint8).reshape(image.height, image.width, 4)


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to uint8 [3, height, width]."""
    import torch  # settings are imported without PyTorch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalise(images: Tensor, mean: RGB, std: RGB) -> Tensor:
    """Compute (images / 255 - mean) / std on the device of the images.

    Args:
        images: [B, 3, height, width] uint8.
        mean, std: RGB values, for pixels in [0, 1].

    Returns:
        float32 of the same shape.
    """
    import torch

    scale, shift = _scale_and_shift(mean, std, images.device)
    return images.to(torch.float32).mul_(scale).add_(shift)


@lru_cache(maxsize=16)
def _scale_and_shift(mean: RGB, std: RGB, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return factors and offsets of :func:`normalise`, [1, 3, 1, 1]; cached, because copying them to a GPU waits."""
    import torch

    scale, shift = [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
    with torch.inference_mode(False):  # inference tensors could not be used in training
        return tuple(torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (scale, shift))  # type: ignore[return-value]
