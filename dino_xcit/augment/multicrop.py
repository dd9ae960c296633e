"""DINO's multi-crop augmentation (arXiv 2104.14294, section 4 and appendix). V: number of views."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dino_xcit.augment.channels import ChannelViewMaker
from dino_xcit.augment.compiled import call_first
from dino_xcit.augment.parameters import Distributions, ParameterSampler, ViewKind, ViewParameters
from dino_xcit.augment.views import ViewMaker
from dino_xcit.errors import InputError
from dino_xcit.transform import Channels, pixels_of


class MultiCropAugmentation:
    """Transform an image to V = 2 + local_crops_number views.

    Args:
        global_crops_scale, local_crops_scale: Range (min, max) of a crop's share of the image area, in (0, 1].
        local_crops_number: Number of local views.
        global_crops_size, local_crops_size: Height and width of the views in pixels.
        crop_ratio: Range (min, max) of width / height of a crop, drawn log-uniformly.
        flip: Probability of a horizontal flip.
        jitter: Probability of colour jitter.
        brightness, contrast, saturation, hue: Strengths of the jitter, as in torchvision's ColorJitter.
        gray: Probability of a conversion to grey.
        global_blur: Probabilities of blur for the first and the second global view.
        local_blur: Probability of blur for local views.
        blur_radius: Range (min, max) of the std of the blur, in pixels of the view.
        solarize: Probability of solarisation for the second global view.
        channels: Number of channels of the images.
        channel_gain, channel_drop: Strength of a random gain of each channel, probability that one of them is black.
            With three channels, saturation, hue and gray apply, else these two.

    Raises:
        InputError: A value is out of range.
    """

    def __init__(
        self,
        global_crops_scale: tuple[float, float] = (0.4, 1.0),
        local_crops_scale: tuple[float, float] = (0.05, 0.4),
        local_crops_number: int = 8,
        global_crops_size: int = 224,
        local_crops_size: int = 96,
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        jitter: float = 0.8,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.2,
        hue: float = 0.1,
        gray: float = 0.2,
        global_blur: tuple[float, float] = (1.0, 0.1),
        local_blur: float = 0.5,
        blur_radius: tuple[float, float] = (0.1, 2.0),
        solarize: float = 0.2,
        channels: int = 3,
        channel_gain: float = 0.2,
        channel_drop: float = 0.2,
    ) -> None:
        for name, (least, most) in (
            ("global_crops_scale", global_crops_scale),
            ("local_crops_scale", local_crops_scale),
        ):
            if not 0 < least <= most <= 1:
                raise InputError(f"{name} is {least} {most}, expected 0 < min <= max <= 1, such as 0.4 1")
        if not 0 < crop_ratio[0] <= crop_ratio[1] < float("inf"):
            raise InputError(f"crop_ratio is {crop_ratio}, expected 0 < min <= max, such as 0.75 1.33")
        for name, size in (("global_crops_size", global_crops_size), ("local_crops_size", local_crops_size)):
            if size < 1:
                raise InputError(f"{name} is {size}, expected at least 1 pixel")
        if local_crops_number < 0:
            raise InputError(f"local_crops_number is {local_crops_number}, expected 0 or more")
        probabilities = {"flip": flip, "jitter": jitter, "gray": gray, "local_blur": local_blur, "solarize": solarize}
        probabilities |= {"channel_gain": channel_gain, "channel_drop": channel_drop}
        probabilities |= {"global_blur": min(global_blur), "global_blur ": max(global_blur)}
        for name, probability in probabilities.items():
            if not 0 <= probability <= 1:
                raise InputError(f"{name.strip()} is {probability}, expected a probability between 0 and 1")
        if not 0 <= hue <= 0.5:
            raise InputError(f"hue is {hue}, expected 0 to 0.5 turns of the colour circle")
        for name, strength in (("brightness", brightness), ("contrast", contrast), ("saturation", saturation)):
            if not 0 <= strength <= 100:
                raise InputError(f"{name} is {strength}, expected a strength of 0 to 100, such as 0.4")
        if not 0 <= blur_radius[0] <= blur_radius[1] <= 1000:
            raise InputError(
                f"blur_radius is {blur_radius[0]} {blur_radius[1]}, expected 0 <= min <= max <= 1000, such as 0.1 2"
            )
        self.views = [
            ViewKind(global_crops_size, global_crops_scale, global_blur[0], 0.0),
            ViewKind(global_crops_size, global_crops_scale, global_blur[1], solarize),
        ] + [ViewKind(local_crops_size, local_crops_scale, local_blur, 0.0)] * local_crops_number
        if channels != 3:
            saturation = hue = gray = 0.0
        self.channels, self._gain_and_drop = channels, (channel_gain, channel_drop)
        factors = [(max(0.0, 1 - strength), 1 + strength) for strength in (brightness, contrast, saturation)]
        shared = Distributions(crop_ratio, flip, jitter, gray, (*factors, (-hue, hue)), blur_radius)
        self._sampler = ParameterSampler(self.views, shared, 0 if channels == 3 else channels + 1)

    def compile(self) -> None:
        """Compile the augmentation, or load it from the cache."""
        rgb = self.channels == 3
        image = Image.new("RGB", (8, 8)) if rgb else np.zeros((8, 8, self.channels), dtype=np.float32)
        call_first(lambda: self(image))

    def maker(self) -> ViewMaker | ChannelViewMaker:
        """Return what makes the views of an image."""
        return ViewMaker() if self.channels == 3 else ChannelViewMaker(*self._gain_and_drop)

    def empty(self, *shape: int) -> Tensor:
        """Return memory for views: uint8 for three channels, else float32 from 0 to 1."""
        return torch.empty(shape, dtype=torch.uint8 if self.channels == 3 else torch.float32)

    def draw_rows(self, width: int, height: int, seed: int, epoch: int, index: int) -> NDArray[np.float64]:
        """Draw the parameters of all views of an image of ``width`` x ``height``: [V, columns], see parameters.py.

        The row of view v depends only on (seed, epoch, index, v) and the size of the image.
        """
        return self._sampler.draw(width, height, seed, epoch, index)

    def draw(self, width: int, height: int, seed: int, epoch: int, index: int) -> list[ViewParameters]:
        """Return the rows of :meth:`draw_rows` in readable form."""
        return [ViewParameters.of(row) for row in self.draw_rows(width, height, seed, epoch, index)]

    def __call__(self, image: Image.Image | Channels, seed: int = 0, epoch: int = 0, index: int = 0) -> list[Tensor]:
        """Return the views of an image: V tensors [channels, size, size] as of :meth:`empty`, global ones first."""
        maker = self.maker()
        pixels = pixels_of(image.convert("RGB")) if isinstance(image, Image.Image) else image
        maker.load(pixels)  # type: ignore[arg-type]  # the maker fits the image
        views = [self.empty(self.channels, kind.size, kind.size) for kind in self.views]
        for row, view in zip(self.draw_rows(pixels.shape[1], pixels.shape[0], seed, epoch, index), views, strict=True):
            maker.make(row, view.numpy())
        return views


def group_by_size(sizes: Sequence[int]) -> list[list[int]]:
    """Group view numbers by crop size, in order of first appearance, for one backbone call per group."""
    groups: dict[int, list[int]] = {}
    for view, size in enumerate(sizes):
        groups.setdefault(size, []).append(view)
    return list(groups.values())
