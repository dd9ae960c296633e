"""DINO's multi-crop augmentation (arXiv 2104.14294, section 4 and appendix). V views.

Two steps, kept apart: all random parameters of all views of a sample are drawn at once from (seed, epoch, sample
index), then Pillow applies them. So the same sample gets the same views in any process, and the parameters can be
tested, drawn or handed to a device on their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import functional as TF

from dino_xcit.errors import InputError
from dino_xcit.transform import to_tensor

CROP_ATTEMPTS = 10
_NUMBERS_A_VIEW = 2 * CROP_ATTEMPTS + 16


@dataclass(frozen=True)
class ViewKind:
    """What one kind of view looks like."""

    size: int
    """Pixels a side."""
    scale: tuple[float, float]
    """Share of the image's area that the crop covers."""
    blur: float
    """Probability of Gaussian blur."""
    solarize: float
    """Probability of solarisation."""


@dataclass(frozen=True)
class ViewParameters:
    """What was drawn for one view."""

    top: int
    left: int
    height: int
    width: int
    flip: bool
    jitter: tuple[tuple[str, float], ...]
    """(operation, factor) in the order of application; empty where the jitter was not drawn."""
    gray: bool
    blur_radius: float | None
    """Standard deviation in pixels, as Pillow counts it."""
    solarize: bool


class MultiCropAugmentation:
    """An image to V = 2 + local_crops_number views.

    Args:
        global_crops_scale, local_crops_scale: share of the image's area, (least, most), 0 < least <= most <= 1.
        local_crops_number: how many local views.
        global_crops_size, local_crops_size: pixels a side.
        crop_ratio: width / height of a crop, (least, most), drawn log-uniformly.
        flip: probability of a horizontal flip.
        jitter: probability of colour jitter; brightness, contrast, saturation, hue: its strengths as torchvision's
            ColorJitter takes them.
        gray: probability of losing the colour.
        global_blur: probabilities of blur for the first and the second global view; local_blur: for local views.
        blur_radius: (least, most) standard deviation in pixels of the view.
        solarize: probability for the second global view alone.

    Raises:
        InputError: a value that cannot be, by name.
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
    ) -> None:
        for name, (least, most) in (
            ("global_crops_scale", global_crops_scale),
            ("local_crops_scale", local_crops_scale),
        ):
            if not 0 < least <= most <= 1:
                raise InputError(f"{name} is {least} {most}, expected 0 < least <= most <= 1, such as 0.4 1")
        if not 0 < crop_ratio[0] <= crop_ratio[1] < float("inf"):
            raise InputError(f"crop_ratio is {crop_ratio}, expected 0 < least <= most, such as 0.75 1.33")
        for name, size in (("global_crops_size", global_crops_size), ("local_crops_size", local_crops_size)):
            if size < 1:
                raise InputError(f"{name} is {size}, expected a number of pixels of at least 1")
        if local_crops_number < 0:
            raise InputError(f"local_crops_number is {local_crops_number}, expected 0 or more")
        chances = {"flip": flip, "jitter": jitter, "gray": gray, "local_blur": local_blur, "solarize": solarize}
        chances |= {"global_blur": min(global_blur), "global_blur ": max(global_blur)}
        for name, chance in chances.items():
            if not 0 <= chance <= 1:
                raise InputError(f"{name.strip()} is {chance}, expected a probability between 0 and 1")
        if not 0 <= hue <= 0.5:
            raise InputError(f"hue is {hue}, expected 0 to 0.5 turns of the colour circle")
        for name, strength in (("brightness", brightness), ("contrast", contrast), ("saturation", saturation)):
            if not 0 <= strength < float("inf"):
                raise InputError(f"{name} is {strength}, expected a strength of at least 0, such as 0.4")
        if not 0 <= blur_radius[0] <= blur_radius[1] < float("inf"):
            raise InputError(
                f"blur_radius is {blur_radius[0]} {blur_radius[1]}, expected 0 <= least <= most, such as 0.1 2"
            )
        self.views = [
            ViewKind(global_crops_size, global_crops_scale, global_blur[0], 0.0),
            ViewKind(global_crops_size, global_crops_scale, global_blur[1], solarize),
        ] + [ViewKind(local_crops_size, local_crops_scale, local_blur, 0.0)] * local_crops_number
        self.flip, self.jitter, self.gray = flip, jitter, gray
        self.strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
        self.blur_radius = blur_radius
        self._log_ratio = np.log(np.asarray(crop_ratio))
        self._scales = np.asarray([view.scale for view in self.views])

    def draw(self, width: int, height: int, seed: int, epoch: int, index: int) -> list[ViewParameters]:
        """The parameters of all views of one sample of ``width`` x ``height`` pixels.

        View v's parameters depend on (seed, epoch, index, v) and the picture's size alone.
        """
        rng = np.random.Generator(np.random.Philox(key=[seed & 0xFFFFFFFFFFFFFFFF, (epoch << 40) | index]))
        numbers = rng.random((len(self.views), _NUMBERS_A_VIEW))
        crops = self._crops(width, height, numbers[:, : 2 * CROP_ATTEMPTS + 2])
        return [
            self._parameters(view, crop, row)
            for view, crop, row in zip(self.views, crops, numbers[:, 2 * CROP_ATTEMPTS + 2 :].tolist(), strict=True)
        ]

    def _crops(self, width: int, height: int, numbers: NDArray[np.float64]) -> list[list[int]]:
        """(top, left, height, width) a view: the first of ten tries that fits, as RandomResizedCrop does it.

        Each try draws an area uniformly and an aspect ratio log-uniformly; where none fits, the largest centred crop
        whose ratio is allowed.
        """
        tries = numbers[:, : 2 * CROP_ATTEMPTS].reshape(-1, 2, CROP_ATTEMPTS)
        least, most = self._scales[:, :1], self._scales[:, 1:]
        area = width * height * (least + (most - least) * tries[:, 0])
        low, high = self._log_ratio
        ratio = np.exp(low + (high - low) * tries[:, 1])
        widths = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        heights = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
        crops = []
        for view, attempt in enumerate(fits.argmax(axis=1)):
            if fits[view, attempt]:
                crop_width, crop_height = int(widths[view, attempt]), int(heights[view, attempt])
                top = int(numbers[view, -2] * (height - crop_height + 1))
                left = int(numbers[view, -1] * (width - crop_width + 1))
            else:
                crop_width, crop_height = self._fallback(width, height)
                top, left = (height - crop_height) // 2, (width - crop_width) // 2
            crops.append([top, left, crop_height, crop_width])
        return crops

    def _fallback(self, width: int, height: int) -> tuple[int, int]:
        low, high = np.exp(self._log_ratio)
        if width / height < low:
            return width, min(height, round(width / low))
        if width / height > high:
            return min(width, round(height * high)), height
        return width, height

    def _parameters(self, view: ViewKind, crop: list[int], numbers: list[float]) -> ViewParameters:
        flip, jitter, gray, blur, radius, solarize, *rest = numbers
        operations: list[tuple[float, str, float]] = []  # (sort key, name, factor)
        if jitter < self.jitter:
            for key, share, (name, strength) in zip(rest[:4], rest[4:8], self.strengths.items(), strict=True):
                if strength == 0:
                    continue
                least, most = (-strength, strength) if name == "hue" else (max(0.0, 1 - strength), 1 + strength)
                operations.append((key, name, least + (most - least) * share))
        least, most = self.blur_radius
        top, left, height, width = crop
        return ViewParameters(
            top,
            left,
            height,
            width,
            flip=flip < self.flip,
            jitter=tuple((name, factor) for _, name, factor in sorted(operations)),
            gray=gray < self.gray,
            blur_radius=least + (most - least) * radius if blur < view.blur else None,
            solarize=solarize < view.solarize,
        )

    def __call__(self, image: Image.Image, seed: int = 0, epoch: int = 0, index: int = 0) -> list[Tensor]:
        """The views of an RGB picture: V uint8 tensors [3, size, size], the two global ones first."""
        drawn = self.draw(image.width, image.height, seed, epoch, index)
        return [to_tensor(apply_view(image, kind, view)) for kind, view in zip(self.views, drawn, strict=True)]


def _adjust_contrast(image: Image.Image, factor: float) -> Image.Image:
    """What ``torchvision.transforms.functional.adjust_contrast`` gives, bit for bit: a blend with the mean grey.

    numpy finds that mean several times faster than Pillow's statistics, which dominate the jitter of a small crop.
    """
    mean = int(np.asarray(image.convert("L")).mean() + 0.5)
    return Image.blend(Image.new("RGB", image.size, (mean, mean, mean)), image, factor)


_ADJUST = {
    "brightness": TF.adjust_brightness,
    "contrast": _adjust_contrast,
    "saturation": TF.adjust_saturation,
    "hue": TF.adjust_hue,
}


def apply_view(image: Image.Image, kind: ViewKind, drawn: ViewParameters) -> Image.Image:
    """One view of an RGB picture, in the reference's order: crop, flip, jitter, gray, blur, solarise."""
    box = (drawn.left, drawn.top, drawn.left + drawn.width, drawn.top + drawn.height)
    view = image.crop(box).resize((kind.size, kind.size), Image.Resampling.BICUBIC)
    if drawn.flip:
        view = ImageOps.mirror(view)
    for name, factor in drawn.jitter:
        view = _ADJUST[name](view, factor)
    if drawn.gray:
        view = view.convert("L").convert("RGB")
    if drawn.blur_radius is not None:
        view = view.filter(ImageFilter.GaussianBlur(drawn.blur_radius))
    if drawn.solarize:
        view = ImageOps.solarize(view, threshold=128)
    return view


def group_by_size(sizes: Sequence[int]) -> list[list[int]]:
    """View numbers grouped by crop size, in order of first appearance: one backbone call a group."""
    groups: dict[int, list[int]] = {}
    for view, size in enumerate(sizes):
        groups.setdefault(size, []).append(view)
    return list(groups.values())


if __name__ == "__main__":
    from dino_xcit.preview import command

    command()
