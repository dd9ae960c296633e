"""Stand-in for the reader of masks."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


class Masks:
    """One part of a folder set."""

    labels = None

    def __init__(self, root: Path, part: str) -> None:
        self.url = f"{root}/{part}"
        self._images = sorted((root / "images" / part).glob("*"))
        self._masks = root / "masks" / part
        self.classes = tuple((root / "classes.txt").read_text().split("\n"))

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> tuple[bytes, None]:
        return self._images[index].read_bytes(), None

    def name(self, index: int) -> str:
        return self._images[index].name

    def mask(self, index: int) -> NDArray[np.uint8]:
        """Read a mask."""
        return np.asarray(Image.open(self._masks / f"{self._images[index].stem}.png"))

    def fingerprint(self) -> str:
        return hashlib.sha256(b"".join(self.read(index)[0] for index in range(len(self)))).hexdigest()


def open_masks(path: str) -> tuple[Masks, Masks]:
    """Open both parts."""
    return Masks(Path(path), "train"), Masks(Path(path), "val")
