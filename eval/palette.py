"""Colours of classes, and segmentations drawn over their images. K: classes; h, w: size of an image."""

from __future__ import annotations

import colorsys
import os
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dino_xcit.data.masks import IGNORE
from eval.sheet import Cell, draw_sheet

OPACITY = 0.6
"""Share of the class colour in an overlay."""
Segmented = tuple[str, Image.Image, Mapping[str, NDArray[np.uint8]]]
"""Name of an image, the image, and classes [h, w] of it by title."""
SIDE = 320
"""Longer side of an image in a sheet, in pixels."""
_GOLDEN = (5**0.5 - 1) / 2
_FIRST = 0.6
"""Hue of the first class, often a background: blue."""
_SHADES = ((0.75, 1.0), (0.9, 0.65), (0.4, 0.95), (1.0, 0.42), (0.55, 0.75))
"""Saturation and value of successive rounds of hues."""
_HUES = 5
"""Hues in a round."""


def colours(n: int) -> NDArray[np.uint8]:
    """Return ``n`` distinct RGB colours, [n, 3]; the first ones do not depend on ``n``.

    Steps of the golden ratio spread the hues, so that classes with close numbers have different hues.
    """
    shades = [_SHADES[number // _HUES % len(_SHADES)] for number in range(n)]
    rows = [colorsys.hsv_to_rgb((_FIRST + number * _GOLDEN) % 1, *shade) for number, shade in enumerate(shades)]
    return (255 * np.array(rows).reshape(-1, 3)).round().astype(np.uint8)


def to_palette(labels: NDArray[np.uint8], palette: NDArray[np.uint8]) -> Image.Image:
    """Convert labels [h, w] to an image with a palette [256, 3]."""
    image = Image.fromarray(labels)
    image.putpalette(palette.tobytes())
    return image


def overlay(
    image: Image.Image, labels: NDArray[np.integer], palette: NDArray[np.uint8], ignore: int = IGNORE
) -> Image.Image:
    """Blend the class colours of ``labels`` [h, w] into an RGB image of the same size; ignored pixels stay as they are.

    Args:
        palette: [K, 3], one colour for each label.
    """
    pixels = np.array(image.convert("RGB"), dtype=np.float32)
    shown = labels != ignore
    pixels[shown] += OPACITY * (palette[labels[shown]] - pixels[shown])
    return Image.fromarray(pixels.round().astype(np.uint8))


def segmentation_sheet(images: Sequence[Segmented], classes: Sequence[str], ignore: int = IGNORE) -> Image.Image:
    """Draw a row for each image (the image, then each segmentation over it), and a legend of the classes in them."""
    ink, rows, present = colours(len(classes)), [], set[int]()
    for name, image, segmentations in images:
        scale = SIDE / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        small = image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)
        rows.append([Cell(small, os.path.basename(name), f"{image.width} x {image.height}")])
        for title, labels in segmentations.items():
            present |= set(np.unique(labels).tolist()) - {ignore}
            shown = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
            rows[-1].append(Cell(overlay(small, shown, ink, ignore), title, ""))
    legend = [Cell(Image.new("RGB", (SIDE, 14), tuple(ink[label])), classes[label], "") for label in sorted(present)]
    columns = max(map(len, rows))
    return draw_sheet([*rows, *(legend[first : first + columns] for first in range(0, len(legend), columns))])
