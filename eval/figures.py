"""One figure of a result, image by image, and its form in a result file: so that two files can be compared in pairs."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Setting = str | int | float

MOST_IMAGES = 100_000_000
"""A count beyond is a mistake."""


@dataclass(frozen=True)
class Figure:
    """A top-1 accuracy."""

    name: str
    """What it is called on the screen, such as ``trained k=20 T=0.07 top-1``."""
    settings: Mapping[str, Setting]
    """What tells it from the other figures of its file: two files' figures are alike where these are equal."""
    top1: float
    """Percent."""
    hits: NDArray[np.bool_] | None
    """[images] in the order of the validation images: was the first guess right? None where nobody kept them."""
    baseline: bool = False
    """Whether it is a figure of something else than the weights that were measured."""

    def to_card(self) -> dict[str, object]:
        """Plain values for JSON; eight images a byte."""
        packed = None if self.hits is None else base64.b64encode(np.packbits(self.hits).tobytes()).decode("ascii")
        return {
            "name": self.name,
            "settings": dict(self.settings),
            "top1": self.top1,
            "baseline": self.baseline,
            "images": None if self.hits is None else len(self.hits),
            "hits": packed,
        }


def figure(name: str, settings: Mapping[str, Setting], hits: NDArray[np.bool_], baseline: bool = False) -> Figure:
    """A figure from its hits [images].

    Its accuracy is counted as everywhere else in the evaluators, in percent; NaN is never written, no image is 0.
    """
    return Figure(name, settings, 100.0 * float(hits.mean()) if len(hits) else 0.0, hits, baseline)


def unpack(packed: str, images: int) -> NDArray[np.bool_]:
    """The hits [images] that :meth:`Figure.to_card` packed.

    Raises:
        ValueError: not base64, or not the bits of so many images.
    """
    try:
        raw = base64.b64decode(packed, validate=True)
    except binascii.Error as error:
        raise ValueError(f"no base64 ({error})") from error
    if len(raw) != -(-images // 8):
        raise ValueError(f"{len(raw)} bytes for {images} images")
    bits = np.unpackbits(np.frombuffer(raw, dtype=np.uint8))
    if bits[images:].any():
        raise ValueError(f"bits beyond its {images} images")
    return bits[:images].astype(np.bool_)
