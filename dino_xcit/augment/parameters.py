"""Random parameters of the views of an image, drawn from (seed, epoch, image index). V: number of views.

An image has the same views in every process. Parameters are separate from their application, so that they can be
tested, plotted or sent to a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dino_xcit.augment.compiled import compiled
from dino_xcit.augment.photometric import BRIGHTNESS, CONTRAST, HUE, SATURATION, box_radius

OPERATIONS: Final = {"brightness": BRIGHTNESS, "contrast": CONTRAST, "saturation": SATURATION, "hue": HUE}
"""The jitter's operations and their codes."""

CROP_ATTEMPTS = 10
_NUMBERS_A_VIEW = 2 * CROP_ATTEMPTS + 16

# ---- columns of the parameters, one row of float64 per view
TOP, LEFT, HEIGHT, WIDTH, FLIP = range(5)
JITTER_FIRST = 5
JITTER = slice(JITTER_FIRST, 13)
"""(code, factor) of the four operations in the order of application. Code -1: none."""
GRAY, SIGMA, SOLARIZE = range(13, 16)
"""SIGMA: std of the blur in pixels, as in Pillow. -1: no blur."""
COLUMNS = 16

# ---- columns of the plan, which a device reads, one row of float32 per view
FACTOR, REACH, WHOLE, EDGE = 8, 16, 17, 18
"""From 0 the codes of eight operations, see :func:`device_plan`; their factors, for hue a shift of 0 to 255 levels; the
blur's pixels in each direction, and the weights of the inner and of the two outermost pixels in 24-bit fixed point."""
PLAN_COLUMNS = 19
TO_GRAY, TO_SOLARIZE = 4, 5
"""Codes of the operations that are not the jitter's."""


@dataclass(frozen=True)
class ViewKind:
    """Settings of one kind of view."""

    size: int
    """Height and width in pixels."""
    scale: tuple[float, float]
    """Range (min, max) of the crop's share of the image area."""
    blur: float
    """Probability of Gaussian blur."""
    solarize: float
    """Probability of solarisation."""


@dataclass(frozen=True)
class ViewParameters:
    """Parameters of one view, in readable form."""

    top: int
    left: int
    height: int
    width: int
    flip: bool
    jitter: tuple[tuple[str, float], ...]
    """(operation, factor) in the order of application; empty without jitter."""
    gray: bool
    blur_radius: float | None
    """Std in pixels, as in Pillow; None: no blur."""
    solarize: bool

    @classmethod
    def of(cls, row: NDArray[np.float64]) -> ViewParameters:
        """Convert a row of parameters."""
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
class Distributions:
    """Settings shared by all views: probabilities and ranges."""

    ratio: tuple[float, float]
    """Range (min, max) of width / height of a crop, drawn log-uniformly."""
    flip: float
    jitter: float
    gray: float
    ranges: tuple[tuple[float, float], ...]
    """Range (min, max) of the factor of each of :data:`OPERATIONS`. An operation with min = max is skipped."""
    blur_radius: tuple[float, float]


class ParameterSampler:
    """Draws the parameters of the views of an image."""

    def __init__(self, kinds: list[ViewKind], distributions: Distributions, further: int = 0) -> None:
        """``further``: number of random numbers in [0, 1) that follow in each row."""
        self._further = further
        self._kinds = np.array([(*kind.scale, kind.blur, kind.solarize) for kind in kinds])
        # Probabilities of flip, jitter and gray; least and largest blur radius.
        self._shared = np.array(
            [distributions.flip, distributions.jitter, distributions.gray, *distributions.blur_radius]
        )
        self._log_ratio = np.log(np.array(distributions.ratio))
        self._ranges = np.array(distributions.ranges)

    def draw(self, width: int, height: int, seed: int, epoch: int, index: int) -> NDArray[np.float64]:
        """Draw the parameters for an image of ``width`` x ``height`` pixels: [V, COLUMNS + further numbers].

        The row of view v depends only on (seed, epoch, index, v), the kind of the view and the size of the image.
        """
        key = np.array([seed & 0xFFFFFFFFFFFFFFFF, (epoch << 40) | index], dtype=np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key))
        numbers = rng.random((len(self._kinds), _NUMBERS_A_VIEW))
        rows = np.empty((len(self._kinds), COLUMNS))
        _fill(rows, numbers, width, height, self._kinds, self._shared, self._log_ratio, self._ranges)
        return np.hstack([rows, rng.random((len(rows), self._further))]) if self._further else rows


@compiled
def _fill(rows, numbers, width, height, kinds, shared, log_ratio, ranges):  # type: ignore[no-untyped-def]
    """Convert uniform numbers in [0, 1), one row per view, to parameters."""
    for view in range(len(rows)):
        row, number = rows[view], numbers[view]
        _crop(row, number, width, height, kinds[view], log_ratio)
        flip, jitter, gray, blur, sigma, solarize = number[2 * CROP_ATTEMPTS + 2 : 2 * CROP_ATTEMPTS + 8]
        row[FLIP] = flip < shared[0]
        # ---- jitter: four factors in random order
        order = np.argsort(number[-8:-4])
        for place in range(4):
            code = order[place]
            least, most = ranges[code]
            drawn = least < most and jitter < shared[1]
            row[JITTER_FIRST + 2 * place] = code if drawn else -1
            row[JITTER_FIRST + 2 * place + 1] = least + (most - least) * number[-4 + code] if drawn else 1.0
        row[GRAY] = gray < shared[2]
        row[SIGMA] = shared[3] + (shared[4] - shared[3]) * sigma if blur < kinds[view, 2] else -1.0
        row[SOLARIZE] = solarize < kinds[view, 3]


@compiled
def _crop(row, number, width, height, kind, log_ratio):  # type: ignore[no-untyped-def]
    """Draw a crop as torchvision's RandomResizedCrop: the first of ten attempts that fits into the image.

    Each attempt draws an area uniformly and an aspect ratio log-uniformly. If none fits, the crop is the largest
    centred one with an allowed ratio.
    """
    for attempt in range(CROP_ATTEMPTS):
        area = width * height * (kind[0] + (kind[1] - kind[0]) * number[attempt])
        ratio = np.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * number[CROP_ATTEMPTS + attempt])
        crop_width, crop_height = int(np.rint(np.sqrt(area * ratio))), int(np.rint(np.sqrt(area / ratio)))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            row[TOP] = int(number[2 * CROP_ATTEMPTS] * (height - crop_height + 1))
            row[LEFT] = int(number[2 * CROP_ATTEMPTS + 1] * (width - crop_width + 1))
            row[HEIGHT], row[WIDTH] = crop_height, crop_width
            return
    least, most = np.exp(log_ratio[0]), np.exp(log_ratio[1])
    crop_width, crop_height = width, height
    if width / height < least:
        crop_height = min(height, int(np.rint(width / least)))
    elif width / height > most:
        crop_width = min(width, int(np.rint(height * most)))
    crop_height, crop_width = max(1, crop_height), max(1, crop_width)
    row[TOP], row[LEFT] = (height - crop_height) // 2, (width - crop_width) // 2
    row[HEIGHT], row[WIDTH] = crop_height, crop_width


def device_plan(rows: NDArray[np.float64]) -> NDArray[np.float32]:
    """Convert the photometric parameters of views to what :mod:`dino_xcit.kernels.photometric` reads.

    Args:
        rows: [n, COLUMNS].

    Returns:
        [n, PLAN_COLUMNS]. Operations: none, the four of the jitter, grey, solarisation (after the blur), none.
        All numbers but the factors are whole and at most 2**24, so float32 has them exactly. -1: none.
    """
    plan = np.full((len(rows), PLAN_COLUMNS), -1, dtype=np.float32)
    codes, factors = rows[:, JITTER][:, 0::2], rows[:, JITTER][:, 1::2]
    plan[:, 1:5] = codes
    plan[:, 5] = np.where(rows[:, GRAY], TO_GRAY, -1)
    plan[:, 6] = np.where(rows[:, SOLARIZE], TO_SOLARIZE, -1)
    plan[:, FACTOR + 1 : FACTOR + 5] = np.where(codes == HUE, (factors * 255).astype(np.int64) & 255, factors)
    for row, sigma in zip(plan, rows[:, SIGMA], strict=True):
        if sigma >= 0:
            radius = np.float32(box_radius(sigma))  # Numba returns a Python float
            whole = int(np.float32(1 << 24) / (radius * np.float32(2) + np.float32(1)))
            row[REACH:] = int(radius), whole, ((1 << 24) - (2 * int(radius) + 1) * whole) // 2
    return plan
