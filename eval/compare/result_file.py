"""Read a result file that run_knn.py or run_linear.py wrote (``--json``). Nothing that it says is believed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dino_xcit.console import printable
from dino_xcit.errors import InputError, one_line
from eval.figures import MOST_IMAGES, Figure, unpack
from eval.protocol import FORMAT

MOST_BYTES = 256 << 20
"""A larger file is no result: a thousand figures of 50,000 images are 8 MB."""

LONGEST_WORD = 500
"""Letters of a name or setting."""


@dataclass(frozen=True)
class Result:
    """What was measured, how, and what came of it."""

    label: str
    """What it is called on the screen: the file's path as it was given."""
    measure: str
    """``knn`` or ``linear``."""
    protocol: Mapping[str, object]
    transform: Mapping[str, object]
    weights: str
    """Hash of the backbone's weights; empty for a published figure."""
    data: Mapping[str, Mapping[str, object]]
    """``val`` and, where there is one, ``train``: which images, as :func:`eval.protocol.images_card` says."""
    figures: tuple[Figure, ...]
    versions: Mapping[str, object]
    source: str = ""
    """Where a published figure was published; empty for a measured one."""

    @property
    def images(self) -> int:
        """How many validation images."""
        return int(str(self.data["val"]["images"]))


def read_result(path: str) -> Result:
    """Read and check a result file.

    Raises:
        InputError: no such file, no result, of another format, or damaged.
    """

    def refuse(why: str) -> NoReturn:
        raise InputError(f"{path} {why}; expected a file that run_knn.py or run_linear.py wrote with --json")

    try:
        with open(Path(path).expanduser(), "rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        refuse(f"cannot be read: {one_line(error)}")
    if len(raw) > MOST_BYTES:
        refuse(f"is larger than {MOST_BYTES >> 20} MB")
    try:
        content = json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        refuse(f"is no JSON ({one_line(error)})")
    if not isinstance(content, dict) or not isinstance(content.get("measure"), str):
        refuse("is no result")
    if content.get("format") != FORMAT:
        raise InputError(
            f"{path} has format {shown(content.get('format', 'none'))}, expected {FORMAT}: it was written by another "
            "version; measure again (kept features make that quick)"
        )
    if not content.get("figures"):
        raise InputError(f"{path} is a result of {shown(content['measure'])}, which has no figures image by image")
    try:
        return _result(path, content)
    except (KeyError, TypeError, ValueError) as error:
        refuse(f"is damaged ({one_line(error)})")


def _result(path: str, content: Mapping[str, Any]) -> Result:
    protocol, transform = _plain(content, "protocol"), _plain(content, "transform")
    weights = _word(_part(content, "weights"), "hash")
    data = {name: _plain(_part(content, "data"), name) for name in ("train", "val") if name in content["data"]}
    for name, part in data.items():
        _count(part, "images")
        for key in ("contents", "labels", "order", "members"):
            _word(part, key)
        if part["classes"] is not None:
            _count(part, "classes", f"data.{name}")
    found = content["figures"]
    if not isinstance(found, list):
        raise ValueError("figures is no list")
    images = int(data["val"]["images"])
    figures = tuple(_figure(one, images) for one in found)
    if len({one.name for one in figures}) < len(figures):
        raise ValueError("two of its figures have one name")
    return Result(
        path, _word(content, "measure"), protocol, transform, weights, data, figures, _plain(content, "versions")
    )


def _figure(content: object, images: int) -> Figure:
    if not isinstance(content, Mapping):
        raise ValueError("a figure is no mapping")
    name, settings, top1 = _word(content, "name"), _part(content, "settings"), content["top1"]
    if not isinstance(top1, (int, float)) or isinstance(top1, bool) or not 0 <= top1 <= 100:
        raise ValueError(f"{name}: top1 is {shown(top1)}, expected percent")
    for key, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, (str, int, float)) or len(str(value)) > LONGEST_WORD:
            raise ValueError(f"{name}: {shown(key)} is {shown(value)}, expected a word or a number")
    hits = None
    if content["hits"] is not None:
        if content["images"] != images:
            raise ValueError(f"{name}: hits of {shown(content['images'])} images, expected {images}")
        hits = unpack(str(content["hits"]), images)
        if images and not math.isclose(100.0 * float(hits.mean()), top1, abs_tol=1e-9):
            raise ValueError(f"{name}: its hits make {100 * hits.mean():.4f}, but it says {top1:.4f}")
    return Figure(name, dict(settings), float(top1), hits, content["baseline"] is True)


def _part(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = content[key]
    if not isinstance(value, dict):
        raise ValueError(f"{key} is no mapping")
    return value


def _plain(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A mapping whose keys can be shown on a screen; its values are shown by :func:`shown` alone."""
    part = _part(content, key)
    if any(not name.isprintable() or len(name) > LONGEST_WORD for name in part):
        raise ValueError(f"{key} has a name that cannot be shown")
    return dict(part)


def _word(content: Mapping[str, Any], key: str) -> str:
    value = content[key]
    if not isinstance(value, str) or len(value) > LONGEST_WORD or not value.isprintable():
        raise ValueError(f"{key} is {shown(value)}, expected a word")
    return value


def _count(content: Mapping[str, Any], key: str, holder: str = "data") -> int:
    value = content[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MOST_IMAGES:
        raise ValueError(f"{holder}.{key} is {shown(value)}, expected a count")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def shown(value: object) -> str:
    """A value of a file, which may be of any length and hold anything, for a sentence."""
    if isinstance(value, float):
        return f"{value:g}"
    text = " ".join(map(shown, value[:20])) if isinstance(value, (list, tuple)) else str(value)
    text = printable(text)
    return text if len(text) <= 160 else f"{text[:157]}..."
