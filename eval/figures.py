"""One figure of a result with what it is the mean of, and its form in a result file: so that two files can be compared
in pairs, image by image, query by query, or draw by draw."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Setting = str | int | float

MOST_IMAGES = 100_000_000
"""A count beyond is a mistake."""

ALL = "all"
"""The setting ``draws`` of a figure whose only draw took every training image."""


Unit = Literal["image", "query", "draw"]
"""What a figure is a mean over: validation images, queries of a search, draws of a few training images."""


@dataclass(frozen=True)
class Figure:
    """A top-1 accuracy, or another mean of shares such as mAP."""

    name: str
    """What it is called on the screen, such as ``trained k=20 T=0.07 top-1``."""
    settings: Mapping[str, Setting]
    """What tells it from the other figures of its file: two files' figures are alike where these are equal."""
    percent: float
    hits: NDArray[np.bool_] | None
    """[units]: was the first guess right, or was the query's class among the first k? The images are in the order of
    the validation images. None where nobody kept them, or where there are values."""
    baseline: bool = False
    """Whether it is a figure of something else than the weights that were measured."""
    values: NDArray[np.float64] | None = None
    """[units], percent, where a unit is not right or wrong: a query's average precision, a draw's accuracy."""
    unit: Unit = "image"
    which: str = ""
    """SHA-256 of the rows that were queries, or were drawn: figures are paired where these are equal. Empty for images,
    of which all count."""

    @property
    def units(self) -> int | None:
        """How many images, queries or draws it is the mean of; None where nobody kept them."""
        found = self.hits if self.values is None else self.values
        return None if found is None else len(found)

    def to_card(self) -> dict[str, object]:
        """Plain values for JSON: hits eight a byte, values of four bytes each (little-endian float32), both base64."""
        packed = None if self.hits is None else _text(np.packbits(self.hits).tobytes())
        card: dict[str, object] = {"name": self.name, "settings": dict(self.settings), "baseline": self.baseline}
        if self.unit == "image":
            return card | {
                "top1": self.percent,
                "images": self.units,
                "hits": packed,
            }
        return card | {
            "percent": self.percent,
            "unit": self.unit,
            "which": self.which,
            "count": self.units,
            "hits": packed,
            "values": None if self.values is None else _text(self.values.astype("<f4").tobytes()),
        }


def figure(name: str, settings: Mapping[str, Setting], hits: NDArray[np.bool_], baseline: bool = False) -> Figure:
    """A figure from its hits [images].

    Its accuracy is counted as everywhere else in the evaluators, in percent; NaN is never written, no image is 0.
    """
    return Figure(name, settings, _percent_of(hits), hits, baseline)


def query_figure(
    name: str, settings: Mapping[str, Setting], found: NDArray[np.bool_] | NDArray[np.floating], rows: NDArray[np.int64]
) -> Figure:
    """A figure of a search.

    Args:
        found: [queries], hits, or shares in percent.
        rows: [queries], which images asked.
    """
    which = hashlib.sha256(np.ascontiguousarray(rows, dtype="<i8").tobytes()).hexdigest()
    if found.dtype == np.bool_:
        hits = found.astype(np.bool_)
        return Figure(name, settings, _percent_of(hits), hits, unit="query", which=which)
    values = np.clip(np.asarray(found, dtype=np.float64), 0, 100)  # a sum of parts may end in 100.00000000000001
    mean = float(values.mean()) if len(values) else 0.0
    return Figure(name, settings, mean, None, values=values, unit="query", which=which)


def few_shot_figure(model: str, record: Mapping[str, object], draws: int, seed: int) -> Figure:
    """The mean top-1 over the draws of a few images a class; of all images there is one draw, whatever the seed.

    Args:
        model: ``trained``, or the name of a baseline.
        record: one of :func:`eval.knn.few_shot.few_shot`.
        draws, seed: as they were asked for.
    """
    shots, k, temperature = int(str(record["shots"])), int(str(record["k"])), float(str(record["temperature"]))
    found = record["top1_draws"]
    assert isinstance(found, list)
    how: dict[str, Setting] = {"draws": ALL} if record["takes_all"] else {"draws": draws, "seed": seed}
    drawn = "all images" if record["takes_all"] else f"{draws} draws of seed {seed}"
    name = f"{model} {shots} a class, {drawn}, k={k} T={temperature:g} top-1"
    settings: dict[str, Setting] = {"model": model, "shots": shots, **how, "k": k, "T": temperature}
    values = np.array(found, dtype=np.float64)
    return Figure(name, settings, float(values.mean()), None, model != "trained", values, "draw", str(record["drawn"]))


def _percent_of(hits: NDArray[np.bool_]) -> float:
    return 100.0 * float(hits.mean()) if len(hits) else 0.0


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def unpack(packed: str, images: int) -> NDArray[np.bool_]:
    """The hits [images] that :meth:`Figure.to_card` packed.

    Raises:
        ValueError: not base64, or not the bits of so many images.
    """
    raw = _bytes(packed)
    if len(raw) != -(-images // 8):
        raise ValueError(f"{len(raw)} bytes for {images} images")
    bits = np.unpackbits(np.frombuffer(raw, dtype=np.uint8))
    if bits[images:].any():
        raise ValueError(f"bits beyond its {images} images")
    return bits[:images].astype(np.bool_)


def unpack_values(packed: str, count: int) -> NDArray[np.float64]:
    """The values [count] that :meth:`Figure.to_card` packed, percent.

    Raises:
        ValueError: not base64, not so many numbers, or not from 0 to 100 each.
    """
    raw = _bytes(packed)
    if len(raw) != 4 * count:
        raise ValueError(f"{len(raw)} bytes for {count} values")
    values = np.frombuffer(raw, dtype="<f4").astype(np.float64)
    if not ((values >= 0) & (values <= 100)).all():  # which no NaN is
        raise ValueError("a value is no percentage")
    return values


def _bytes(packed: str) -> bytes:
    try:
        return base64.b64decode(packed, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"no base64 ({error})") from error
