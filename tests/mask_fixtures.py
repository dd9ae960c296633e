"""Small data sets with masks of rendered shapes, in the layouts that run_segment.py reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NAMES = ("ground", "disc", "square", "cross, diagonal")


def scene(rng: np.random.Generator, height: int = 64, width: int = 64) -> tuple[Image.Image, NDArray[np.uint8]]:
    """Render a disc, a square and a cross, each with its own range of colours, on a noisy ground; 255 on outlines."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels, mask = rng.normal(110, 12, (height, width, 3)), np.zeros((height, width), dtype=np.uint8)
    for label in rng.permutation([1, 2, 3]).tolist():
        size = rng.uniform(0.12, 0.22) * min(height, width)
        x, y = columns - rng.uniform(0.2, 0.8) * width, rows - rng.uniform(0.2, 0.8) * height
        diagonals = np.minimum(abs(x - y), abs(x + y)) * 2 + np.maximum(abs(x), abs(y)) / 2
        distance = {1: np.hypot(x, y), 2: np.maximum(abs(x), abs(y)), 3: diagonals}[label]
        mask[distance < size + 1] = 255
        mask[distance < size] = label
        pixels[distance < size] = np.eye(3)[label - 1] * 120 + rng.uniform(40, 120, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask


def save_mask(path: Path, mask: NDArray[np.uint8], palette: bool = True) -> None:
    image = Image.fromarray(mask)
    if palette:
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def shapes(
    root: Path, layout: str = "folder", train: int = 12, val: int = 5, side: int = 64, names: bool = True
) -> Path:
    """Write a data set of scenes; their sizes differ by a few pixels.

    Args:
        layout: ``folder``, ``parts`` (train/images ...), ``voc`` or ``ade20k``; the latter has labels from 1, and 0 on
            the outlines.
    """
    rng = np.random.default_rng(7)
    long = {"train": "training", "val": "validation"}
    for part, count in (("train", train), ("val", val)):
        images, masks = {
            "folder": (root / "images" / part, root / "masks" / part),
            "parts": (root / part / "images", root / part / "masks"),
            "voc": (root / "JPEGImages", root / "SegmentationClass"),
            "ade20k": (root / "images" / long[part], root / "annotations" / long[part]),
        }[layout]
        images.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image, mask = scene(rng, side + int(rng.integers(0, 9)), side + int(rng.integers(0, 9)))
            name = f"{part}_{number:03d}"
            image.save(images / f"{name}.jpg", quality=95)
            save_mask(masks / f"{name}.png", mask + np.uint8(1) if layout == "ade20k" else mask, layout == "voc")
        if layout == "voc":
            listing = root / "ImageSets" / "Segmentation" / f"{part}.txt"
            listing.parent.mkdir(parents=True, exist_ok=True)
            listing.write_text("".join(f"{part}_{number:03d}\n" for number in range(count)))
    if names and layout in ("folder", "parts"):
        (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return root
