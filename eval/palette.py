"""Colours of classes, and segmentations drawn over their images. h, w: size of an image."""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray
from PIL import Image

OPACITY = 0.6
"""Share of the class colour in an overlay."""
_GOLDEN = (5**0.5 - 1) / 2
_SHADES = ((0.75, 1.0), (0.9, 0.65), (0.4, 0.95), (1.0, 0.42), (0.55, 0.75))
"""Saturation and value of successive rounds of hues."""
_HUES = 5
"""Hues in a round."""


def colours(n: int) -> NDArray[np.uint8]:
    """Return ``n`` distinct RGB colours, [n, 3]; the first ones do not depend on ``n``.

    Steps of the golden ratio spread the hues, so that classes with close numbers have different hues.
    """
    shades = [_SHADES[number // _HUES % len(_SHADES)] for number in range(n)]
    rows = [colorsys.hsv_to_rgb(number * _GOLDEN % 1, *shade) for number, shade in enumerate(shades)]
    return (255 * np.array(rows).reshape(-1, 3)).round().astype(np.uint8)


def overlay(
    image: Image.Image, labels: NDArray[np.integer], colours: NDArray[np.uint8], ignore: int = 255
) -> Image.Image:
    """Blend the class colours of ``labels`` [h, w] into an RGB image of the same size; ignored pixels stay as they are.

    Args:
        colours: [K, 3], one colour for each label.
    """
    pixels = np.array(image.convert("RGB"), dtype=np.float32)
    shown = labels != ignore
    pixels[shown] += OPACITY * (colours[labels[shown]] - pixels[shown])
    return Image.fromarray(pixels.round().astype(np.uint8))
