"""The images on which an export is compared with its original. B batch."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dino_xcit.data import decode, open_source
from dino_xcit.errors import InputError
from dino_xcit.transform import EvalTransform, normalise, to_tensor

LEAST, MOST = 3, 4

_SCIKIT_IMAGE = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
"""Files that scikit-image's package itself holds: its functions may download."""


@dataclass(frozen=True)
class Photographs:
    """At least :data:`LEAST` pictures, and where they are from."""

    origin: str
    images: tuple[Image.Image, ...]

    def batch(self, count: int, size: tuple[int, int], transform: EvalTransform) -> Tensor:
        """[count, 3, height, width], normalised: each picture resized to cover ``size`` and cut at its centre."""
        height, width = size
        fitted = [ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC) for image in self.images[:count]]
        return normalise(torch.stack([to_tensor(image) for image in fitted]), transform.mean, transform.std)


def photographs(url: str = "") -> Photographs:
    """Real images: of ``url`` (whatever :func:`dino_xcit.data.open_source` opens), else scikit-image's where that is
    installed, else the embedded sample's.

    Raises:
        InputError: nothing there, fewer than :data:`LEAST`, or one that cannot be read.
    """
    if not url:
        found = _of_scikit_image()
        if found:
            return found
    source = open_source(url or "sample:fashion-mnist", "val")
    if len(source) < LEAST:
        raise InputError(f"{source.url} holds {len(source)} images, expected at least {LEAST} to compare on")
    chosen = np.unique(np.linspace(0, len(source) - 1, MOST).astype(int))
    return Photographs(source.url, _decoded([source.read(int(i))[0] for i in chosen], [source.name(i) for i in chosen]))


def _of_scikit_image() -> Photographs | None:
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        return None
    paths = [Path(package.origin).parent / "data" / name for name in _SCIKIT_IMAGE]
    there = [path for path in paths if path.is_file()]
    if len(there) < LEAST:
        return None
    return Photographs(
        "scikit-image's photographs", _decoded([path.read_bytes() for path in there], [str(path) for path in there])
    )


def _decoded(items: Sequence[bytes | np.ndarray], names: Sequence[str]) -> tuple[Image.Image, ...]:
    return tuple(decode(item, name) for item, name in zip(items, names, strict=True))
