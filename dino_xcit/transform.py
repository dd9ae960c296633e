"""The evaluation transform: an image to the input of a frozen backbone. B: batch size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dino_xcit.bounds import refuse_changed, shown
from dino_xcit.errors import InputError, one_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WHITE = (1 << 16) - 1
"""Default white level of 16-bit images (``--white-level``)."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Channels = NDArray[np.float32]
"""An image of other than three channels: [height, width, channels] from 0 (black) to 1 (white)."""

INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")
"""Values of torchvision's InterpolationMode."""

MAX_ASPECT = 16
"""Aspect ratio above which only the region of the centre crop is resized."""

SIDE_LIMIT = 1 << 14
"""Maximum ``resize`` and ``crop`` in stored transforms: an image of this size takes 800 MB."""
_MAX_VALUE = 1e6
"""Maximum of a stored mean or std, and inverse of the minimum std: beyond it, float32 loses the pixel values."""


@dataclass(frozen=True)
class PixelFormat:
    """How the values of an image file become pixels."""

    channels: int = 3
    white_level: int = WHITE
    """Value of 16-bit images that maps to white. Larger values are clipped."""
    value_range: tuple[float, ...] = ()
    """Values that map to black and white in images of other types than 8 and 16 bits; not for three channels."""
    show_channels: tuple[int, ...] = ()
    """Indices (from 0) of the channels that pictures show as red, green and blue; (): see :attr:`shown_channels`."""

    @property
    def shown_channels(self) -> tuple[int, ...]:
        """``show_channels``, by default the first three; of one or two channels, the first as grey."""
        return self.show_channels or ((0, 1, 2) if self.channels >= 3 else (0, 0, 0))

    def check(self) -> None:
        """Check the values.

        Raises:
            InputError: A value is invalid.
        """
        if self.channels == 3:
            refuse_changed(self, ("value_range", "show_channels"), "with 3 channels")
        if self.value_range and not (len(self.value_range) == 2 and self.value_range[0] < self.value_range[1]):
            raise InputError(f"value_range is {shown(self.value_range)}, expected the values of black and white: 0 1")
        chosen = self.shown_channels
        if len(chosen) != 3 or not all(0 <= number < self.channels for number in chosen):
            default = shown(PixelFormat(self.channels).shown_channels)
            raise InputError(
                f"show_channels is {shown(chosen)}, expected three numbers from 0 to {self.channels - 1}, such as "
                f"{default}"
            )

    def rgb_side(self, side: int) -> int:
        """Return the side of an RGB image of uint8 with the bytes of an image of ``side`` pixels in this format."""
        return side if self.channels == 3 else math.ceil(side * math.sqrt(4 * self.channels / 3))


RGB = PixelFormat()


def require_rgb(format: PixelFormat, weights: str) -> None:
    """Raise InputError if the weights are not for images of three channels."""
    if format.channels != 3:
        raise InputError(
            f"{weights} is for images of {format.channels} channels, but only RGB images are supported here: give "
            "weights for 3 channels"
        )


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
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean of each channel; their number is that of the channels."""
    std: tuple[float, ...] = IMAGENET_STD
    white_level: int = WHITE
    """See :class:`PixelFormat`."""
    value_range: tuple[float, ...] = ()
    """See :class:`PixelFormat`."""
    show_channels: tuple[int, ...] = ()
    """See :class:`PixelFormat`."""

    @property
    def channels(self) -> int:
        """Number of channels of the images."""
        return len(self.mean)

    @property
    def pixel_format(self) -> PixelFormat:
        """Format of the images."""
        return PixelFormat(self.channels, self.white_level, self.value_range, self.show_channels)

    def __call__(self, image: Image.Image | Channels) -> Tensor:
        """Resize and crop to [channels, crop, crop]: uint8 for images of Pillow, float32 for arrays.

        For the normalisation on the device see :func:`normalise`.
        """
        from torchvision.transforms import functional as TF  # takes two seconds to import, training does not need it

        height, width = size_of(image)
        if isinstance(image, np.ndarray):
            length = MAX_ASPECT * min(height, width)
            top, left = (max(0, side - length) // 2 for side in (height, width))
            resized = self.resized(image[top : top + length, left : left + length], [self.resize])
        elif max(height, width) <= MAX_ASPECT * min(height, width):
            resized = self.resized(image, [self.resize])
        else:
            resized = to_tensor(self._resized_centre(image))
        return TF.center_crop(resized, [self.crop, self.crop])

    def resized(self, image: Image.Image | Channels, size: Sequence[int]) -> Tensor:
        """Resize to [height, width], or to [shorter side], with antialiasing.

        Returns:
            [channels, height, width], uint8 for images of Pillow, float32 for arrays.
        """
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as TF

        mode = InterpolationMode(self.interpolation)
        if not isinstance(image, np.ndarray):
            return to_tensor(TF.resize(image, list(size), mode))
        if mode not in (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC):
            raise InputError(f"interpolation {mode.value} is for three channels: expected bilinear or bicubic")
        return TF.resize(to_tensor(image), list(size), mode, antialias=True).clamp_(0, 1)  # bicubic overshoots

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
        """Return plain values for JSON or a checkpoint. Default formats of pixels are omitted, as in version 0.1."""
        omitted = (("white_level", WHITE), ("value_range", ()), ("show_channels", ()))
        return {name: value for name, value in asdict(self).items() if (name, value) not in omitted}

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
            stored = {"value_range": (), "show_channels": (), **values}
            mean, std, value_range, show_channels = (
                _numbers(stored, name) for name in ("mean", "std", "value_range", "show_channels")
            )
            if not mean or len(mean) != len(std):
                raise ValueError(f"mean has {len(mean)} numbers and std {len(std)}, expected one each per channel")
            if not all(value >= 1 / _MAX_VALUE for value in std):
                raise ValueError(f"std is {shown(std)}, expected more than 0")
            found = cls(
                resize, crop, interpolation, mean, std, white_level, value_range, tuple(map(int, show_channels))
            )
            found.pixel_format.check()
            return found
        except KeyError as error:
            raise InputError(f"the stored evaluation transform lacks {error.args[0]}") from error
        except (InputError, TypeError, ValueError, OverflowError, RuntimeError) as error:  # RuntimeError: a tensor
            raise InputError(f"the stored evaluation transform: {one_line(error)}") from error


def _numbers(values: Mapping[str, Any], name: str) -> tuple[float, ...]:
    found = values[name]
    if not isinstance(found, (list, tuple)):
        raise ValueError(f"{name} is not a list of numbers")
    numbers = tuple(float(value) for value in found)
    if not all(abs(value) <= _MAX_VALUE for value in numbers):  # also false for NaN
        raise ValueError(f"{name} is {shown(numbers)}, expected numbers such as 0.5")
    return numbers


def size_of(image: Image.Image | Channels) -> tuple[int, int]:
    """Return height and width."""
    height, width = image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]
    return height, width


def pixels_of(image: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels of an RGB image as [height, width, 4], the last byte unused: Pillow's memory layout."""
    return np.frombuffer(image.tobytes("raw", "RGBX"), dtype=np.uint8).reshape(image.height, image.width, 4)


def to_tensor(image: Image.Image | NDArray[Any]) -> Tensor:
    """Copy an RGB image or pixels [height, width, channels] to [channels, height, width] of the same dtype."""
    import torch  # settings are imported without PyTorch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Compute (images - mean) / std on the device of the images, for pixels in [0, 1].

    Args:
        images: [B, channels, height, width], uint8 for 0 to 255, or float32 from 0 to 1.
        mean, std: of each channel.

    Returns:
        float32 of the same shape.
    """
    import torch

    scale, shift = _scale_and_shift(mean, std, 255 if images.dtype == torch.uint8 else 1, images.device)
    return images.to(torch.float32, copy=True).mul_(scale).add_(shift)


@lru_cache(maxsize=16)
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], white: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return factors and offsets of :func:`normalise`, [1, channels, 1, 1]; cached, because copying to a GPU waits."""
    import torch

    scale, shift = [1 / (white * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
    with torch.inference_mode(False):  # inference tensors could not be used in training
        return tuple(torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (scale, shift))  # type: ignore[return-value]
