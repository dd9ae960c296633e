"""What the tests of run_retrieval.py share: weights, photographs, and pictures that nothing else looks like."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from eval_fixtures import image_tree, tiny_checkpoint
from numpy.typing import NDArray
from PIL import Image


class Place(NamedTuple):
    """Where weights and photographs are."""

    weights: Path
    photos: Path
    """``photos``/{train,val}/{bars,dots,waves}."""


def new_place(folder: Path) -> Place:
    """Photographs of three classes, and weights that were trained on them."""
    tree = image_tree(folder / "photos", train=5, val=4)
    return Place(tiny_checkpoint(folder / "run", tree), tree)


def noise(seed: int, width: int = 40, height: int = 32) -> NDArray[np.uint8]:
    """A picture like no other: coarse blocks of random colours."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return blocks.repeat(8, axis=0).repeat(8, axis=1)


def save(pixels: NDArray[np.uint8], path: Path, quality: int = 95) -> None:
    """Write a picture, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=quality)
