"""Read a result file that one of the runners wrote (``--json``). Nothing that it says is believed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args

from numpy.typing import NDArray

from dino_xcit.errors import InputError, one_line, printable
from eval.figures import MOST_IMAGES, Figure, Unit, unpack, unpack_values
from eval.protocol import FORMAT

MOST_BYTES = 64 << 20
"""A larger file is no result: a thousand figures of 50,000 images are 8 MB."""

DEEPEST = 20
"""Lists and mappings within each other; a linear probe's results have 6."""

MOST_FIGURES = 10_000
"""In one result; a sweep over 20 pairs of k and T with 5 numbers of shots has 120."""

MOST_SETTINGS = 200
"""Names in a mapping that is compared name by name; a protocol has a dozen."""

LONGEST_WORD = 500
"""Letters of a name or setting."""

MOST_PARTS = 100
"""Sets of images in one result; Copydays has 21."""

_WORDS_OF_IMAGES = ("contents", "labels", "order", "members")
_WORDS_OF_NEWER_CARDS = ("names", "whole", "fingerprint")


@dataclass(frozen=True)
class Result:
    """What was measured, how, and what came of it."""

    label: str
    """What it is called on the screen: the file's path as it was given."""
    measure: str
    """``knn``, ``linear``, ``retrieval folder`` ..."""
    protocol: Mapping[str, object]
    transform: Mapping[str, object]
    weights: str
    """Hash of the backbone's weights; empty for a published figure."""
    data: Mapping[str, Mapping[str, object]]
    """``train`` and ``val``, or the sets of a retrieval benchmark: which images, as
    :func:`eval.protocol.images_card` says."""
    figures: tuple[Figure, ...]
    versions: Mapping[str, object]
    source: str = ""
    """Where a published figure was published; empty for a measured one."""

    def counts(self) -> str:
        """``3,000 validation images``, or of each set of a retrieval benchmark how many."""
        if "val" in self.data:
            return f"{int(str(self.data['val']['images'])):,} validation images"
        return ", ".join(f"{name} {int(str(part['images'])):,}" for name, part in self.data.items())


def read_result(path: str) -> Result:
    """Read and check a result file.

    Raises:
        InputError: no such file, no result, of another format, or damaged.
    """

    def refuse(why: str) -> NoReturn:
        raise InputError(
            f"{path} {why}; expected a file that run_knn.py, run_linear.py or run_retrieval.py wrote with --json"
        )

    try:
        with open(Path(path).expanduser(), "rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        refuse(f"cannot be read: {one_line(error)}")
    if len(raw) > MOST_BYTES:
        refuse(f"is larger than {MOST_BYTES >> 20} MB")
    try:
        content = json.loads(raw, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        refuse(f"is no JSON ({one_line(error)})")
    if _deeper_than(content, DEEPEST):
        refuse(f"has lists or mappings more than {DEEPEST} within each other")
    if not isinstance(content, dict) or not isinstance(content.get("measure"), str):
        refuse("is no result")
    if content.get("format") != FORMAT:
        raise InputError(
            f"{path} has format {shown(content.get('format', 'none'))}, expected {FORMAT}: it was written by another "
            "version; measure again (kept features make that quick)"
        )
    if not content.get("figures"):
        raise InputError(
            f"{path} is a result of {shown(content['measure'])} without figures image by image or query by query: "
            "either there are none of these, or it is of before they were kept; then measure again"
        )
    try:
        return _result(path, content)
    except (KeyError, TypeError, ValueError) as error:
        refuse(f"is damaged ({one_line(error)})")


def _result(path: str, content: Mapping[str, Any]) -> Result:
    protocol, transform = _plain(content, "protocol"), _plain(content, "transform")
    weights = _word(_part(content, "weights"), "hash")
    parts = _plain(content, "data")
    if not 0 < len(parts) <= MOST_PARTS:
        raise ValueError(f"data has {len(parts)} sets of images, expected 1 to {MOST_PARTS}")
    data = {name: _plain(parts, name) for name in parts}
    for name, part in data.items():
        _count(part, "images")
        for key in (*_WORDS_OF_IMAGES, *(key for key in _WORDS_OF_NEWER_CARDS if part.get(key) is not None)):
            _word(part, key)
        if part["classes"] is not None:
            _count(part, "classes", f"data.{name}")
    found = content["figures"]
    if not isinstance(found, list):
        raise ValueError("figures is no list")
    if len(found) > MOST_FIGURES:
        raise ValueError(f"{len(found):,} figures, expected at most {MOST_FIGURES:,}")
    figures = tuple(_figure(one, data) for one in found)
    if len({one.name for one in figures}) < len(figures):
        raise ValueError("two of its figures have one name")
    return Result(
        path, _word(content, "measure"), protocol, transform, weights, data, figures, _plain(content, "versions")
    )


def _figure(content: object, data: Mapping[str, Mapping[str, Any]]) -> Figure:
    if not isinstance(content, Mapping):
        raise ValueError("a figure is no mapping")
    name, settings, unit = _word(content, "name"), _plain(content, "settings"), content.get("unit", "image")
    if unit not in get_args(Unit):
        raise ValueError(f"{name}: unit is {shown(unit)}, expected {', '.join(get_args(Unit))}")
    key = "top1" if unit == "image" else "percent"
    percent = content[key]
    if not isinstance(percent, (int, float)) or isinstance(percent, bool) or not 0 <= percent <= 100:
        raise ValueError(f"{name}: {key} is {shown(percent)}, expected percent")
    for setting, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, (str, int, float)) or len(str(value)) > LONGEST_WORD:
            raise ValueError(f"{name}: {shown(setting)} is {shown(value)}, expected a word or a number")
    hits, values = content["hits"], content.get("values")
    baseline, which = content["baseline"] is True, "" if unit == "image" else _word(content, "which")
    if hits is not None:
        count = _units(content, name, unit, data)
        right = unpack(str(hits), count)
        _check_mean(name, right, percent, 1e-9)
        return Figure(name, dict(settings), float(percent), right, baseline, None, unit, which)
    if values is not None and unit != "image":
        shares = unpack_values(str(values), _count(content, "count", name))
        _check_mean(name, shares / 100, percent, 1e-4)  # kept with the seven digits of float32
        return Figure(name, dict(settings), float(percent), None, baseline, shares, unit, which)
    return Figure(name, dict(settings), float(percent), None, baseline, None, unit, which)


def _units(content: Mapping[str, Any], name: str, unit: str, data: Mapping[str, Mapping[str, Any]]) -> int:
    """How many hits a figure has to have."""
    if unit != "image":
        return _count(content, "count", name)
    images = int(data["val"]["images"])
    if content["images"] != images:
        raise ValueError(f"{name}: hits of {shown(content['images'])} images, expected {images}")
    return images


def _check_mean(name: str, shares: NDArray[Any], percent: float, tolerance: float) -> None:
    mean = 100.0 * float(shares.mean())
    if not math.isclose(mean, percent, abs_tol=tolerance):
        raise ValueError(f"{name}: its hits make {mean:.4f}, but it says {percent:.4f}")


def _part(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = content[key]
    if not isinstance(value, dict):
        raise ValueError(f"{key} is no mapping")
    return value


def _plain(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A mapping whose keys can be shown on a screen; its values are shown by :func:`shown` alone."""
    part = _part(content, key)
    if len(part) > MOST_SETTINGS:
        raise ValueError(f"{key} has {len(part):,} names, expected at most {MOST_SETTINGS}")
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


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:20]} is too large a number")
    return number


def _deeper_than(value: object, most: int) -> bool:
    """Whether there are more than so many lists and mappings within each other; looked at level by level, as a
    function that calls itself is what such a value would bring down."""
    level = [value]
    for _ in range(most):
        level = [
            part
            for one in level
            if isinstance(one, (list, dict))
            for part in (one.values() if isinstance(one, dict) else one)
        ]
    return any(isinstance(one, (list, dict)) for one in level)


def shown(value: object, within: int = 0) -> str:
    """A value of a file, which may be of any length and hold anything, for a sentence: a list as its first values, a
    mapping as its first names with their values; of what lies deeper, that there is something."""
    if value is None:
        return "not set"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple, Mapping)) and value and within > 1:
        return "..."
    if isinstance(value, Mapping):
        text = ", ".join(f"{name} {shown(value[name], within + 1)}" for name in list(value)[:20])
    elif isinstance(value, (list, tuple)):
        text = " ".join(shown(one, within + 1) for one in value[:20])
    else:
        text = str(value)
    text = printable(text)
    return text if len(text) <= 160 else f"{text[:157]}..."
