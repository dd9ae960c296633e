"""Crop and resize equal Pillow bit for bit, for every shape."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dino_xcit.augment.resample import Resampler


def noise(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    """Random pixels: the hardest image, as it has steps of all sizes and bicubic sums beyond 0 and 255."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)


def by_pillow(
    picture: NDArray[np.uint8], top: int, left: int, height: int, width: int, size: int, flip: bool
) -> NDArray[np.uint8]:
    image = Image.fromarray(np.ascontiguousarray(picture[..., :3]))
    resized = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized)
    return (pixels[:, ::-1] if flip else pixels).transpose(2, 0, 1)


@pytest.mark.parametrize("count", [30, pytest.param(600, marks=pytest.mark.slow)])
def test_random_crops_equal_pillow_bit_for_bit(count: int) -> None:
    rng = np.random.default_rng(1)
    resampler = Resampler()
    rows_first = 0
    for number in range(count):
        width, height = (int(side) for side in rng.integers(1, 300, 2))
        picture = noise(width, height, number)
        resampler.load(picture)
        for _ in range(4):
            crop_width, crop_height = int(rng.integers(1, width + 1)), int(rng.integers(1, height + 1))
            left, top = int(rng.integers(0, width - crop_width + 1)), int(rng.integers(0, height - crop_height + 1))
            size, flip = int(rng.choice([1, 2, 7, 28, 32, 96, 224])), bool(rng.integers(2))
            out = np.empty((3, size, size), dtype=np.uint8)
            resampler.cut(top, left, crop_height, crop_width, flip, out)
            expected = by_pillow(picture, top, left, crop_height, crop_width, size, flip)
            np.testing.assert_array_equal(out, expected, err_msg=f"{width} x {height}: {top, left} {size}")
            rows_first += crop_height > size and crop_height - size > 2 * (crop_width - size)
    assert count / 2 < rows_first < 3.5 * count  # both orders of the two passes occur


@pytest.mark.parametrize(("width", "height"), [(224, 224), (224, 448), (225, 224), (4000, 3), (3, 4000), (1, 1)])
def test_images_of_extreme_shape_equal_pillow(width: int, height: int) -> None:
    picture = noise(width, height)
    resampler = Resampler()
    resampler.load(picture)
    out = np.empty((3, 224, 224), dtype=np.uint8)
    resampler.cut(0, 0, height, width, False, out)
    np.testing.assert_array_equal(out, by_pillow(picture, 0, 0, height, width, 224, False))
