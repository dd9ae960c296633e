"""What is drawn for the views of a sample: all numbers of all views at once, from (seed, epoch, sample index).

So the same sample has the same views in any process, and what was drawn can be tested, drawn into a picture, or sent to
a device, apart from its application. V views.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dino_xcit.augment.photometric import BRIGHTNESS, CONTRAST, HUE, SATURATION, box_radius

OPERATIONS: Final = {"brightness": BRIGHTNESS, "contrast": CONTRAST, "saturation": SATURATION, "hue": HUE}
"""The jitter's operations and their codes."""

CROP_ATTEMPTS = 10
_NUMBERS_A_VIEW = 2 * CROP_ATTEMPTS + 16

# ---- the columns of what is drawn for a view: one row of float64
TOP, LEFT, HEIGHT, WIDTH, FLIP = range(5)
JITTER = slice(5, 13)
"""(code, factor) of the four operations in the order of application; code -1: none."""
GRAY, SIGMA, BOX, SOLARIZE = range(13, 17)
"""SIGMA: the blur's standard deviation in pixels, as Pillow counts it; BOX: the box radius that makes it; -1: none."""
COLUMNS = 17


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
    """What was drawn for one view, for people."""

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

    @classmethod
    def of(cls, row: NDArray[np.float64]) -> ViewParameters:
        """Read a row."""
        names = list(OPERATIONS)
        jitter = row[JITTER].reshape(4, 2).tolist()
        return cls(
            top=int(row[TOP]),
            left=int(row[LEFT]),
            height=int(row[HEIGHT]),
            width=int(row[WIDTH]),
            flip=bool(row[FLIP]),
            jitter=tuple((names[int(code)], factor) for code, factor in jitter if code >= 0),
            gray=bool(row[GRAY]),
            blur_radius=float(row[SIGMA]) if row[SIGMA] >= 0 else None,
            solarize=bool(row[SOLARIZE]),
        )


@dataclass(frozen=True)
class Chances:
    """What all views share: probabilities, and ranges to draw from."""

    ratio: tuple[float, float]
    """Width / height of a crop, drawn log-uniformly."""
    flip: float
    jitter: float
    gray: float
    ranges: tuple[tuple[float, float], ...]
    """(least, most) factor of each of :data:`OPERATIONS`; one whose range is a point is left out."""
    blur_radius: tuple[float, float]


def draw(
    kinds: list[ViewKind], chances: Chances, width: int, height: int, seed: int, epoch: int, index: int
) -> NDArray[np.float64]:
    """What each view of one sample of ``width`` x ``height`` pixels shall be: [V, COLUMNS].

    View v's row depends on (seed, epoch, index, v), the view's kind and the picture's size alone.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed & 0xFFFFFFFFFFFFFFFF, (epoch << 40) | index]))
    numbers = rng.random((len(kinds), _NUMBERS_A_VIEW))
    rows = np.empty((len(kinds), COLUMNS))
    rows[:, : WIDTH + 1] = _crops(kinds, chances, width, height, numbers)
    flip, jitter, gray, blur, sigma, solarize = numbers[:, 2 * CROP_ATTEMPTS + 2 : 2 * CROP_ATTEMPTS + 8].T
    rows[:, FLIP] = flip < chances.flip
    # ---- jitter: four factors, in the order of four more numbers
    order = np.argsort(numbers[:, -8:-4], axis=1)
    least, most = np.asarray(chances.ranges).T
    factors = np.take_along_axis(least + (most - least) * numbers[:, -4:], order, axis=1)
    left_out = (least == most)[order] | (jitter >= chances.jitter)[:, None]
    rows[:, JITTER][:, 0::2] = np.where(left_out, -1, order)
    rows[:, JITTER][:, 1::2] = np.where(left_out, 1.0, factors)
    # ---- the rest
    rows[:, GRAY] = gray < chances.gray
    least_sigma, most_sigma = chances.blur_radius
    drawn = least_sigma + (most_sigma - least_sigma) * sigma
    sharp = blur >= np.asarray([kind.blur for kind in kinds])
    rows[:, SIGMA] = np.where(sharp, -1.0, drawn)
    rows[:, BOX] = np.where(sharp, -1.0, box_radius(drawn))
    rows[:, SOLARIZE] = solarize < np.asarray([kind.solarize for kind in kinds])
    return rows


def _crops(
    kinds: list[ViewKind], chances: Chances, width: int, height: int, numbers: NDArray[np.float64]
) -> NDArray[np.int64]:
    """[V, 4] top, left, height, width: the first of ten tries that fits, as RandomResizedCrop does it.

    Each try draws an area uniformly and an aspect ratio log-uniformly; where none fits, the largest centred crop
    whose ratio is allowed.
    """
    tries = numbers[:, : 2 * CROP_ATTEMPTS].reshape(-1, 2, CROP_ATTEMPTS)
    scales = np.asarray([kind.scale for kind in kinds])
    least, most = scales[:, :1], scales[:, 1:]
    area = width * height * (least + (most - least) * tries[:, 0])
    low, high = np.log(chances.ratio)
    ratio = np.exp(low + (high - low) * tries[:, 1])
    widths = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    heights = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    views = np.arange(len(kinds))
    chosen = fits.argmax(axis=1)
    crop_widths, crop_heights = widths[views, chosen], heights[views, chosen]
    tops = (numbers[:, 2 * CROP_ATTEMPTS] * (height - crop_heights + 1)).astype(np.int64)
    lefts = (numbers[:, 2 * CROP_ATTEMPTS + 1] * (width - crop_widths + 1)).astype(np.int64)
    crops = np.stack([tops, lefts, crop_heights, crop_widths], axis=1)
    if not fits.any(axis=1).all():
        crop_width, crop_height = _largest(width, height, float(np.exp(low)), float(np.exp(high)))
        centred = [(height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width]
        crops[~fits.any(axis=1)] = centred
    return crops


def _largest(width: int, height: int, low: float, high: float) -> tuple[int, int]:
    if width / height < low:
        return width, min(height, round(width / low))
    if width / height > high:
        return min(width, round(height * high)), height
    return width, height
