"""card.json of a collection, read back: nothing in it is believed before every field that is used was looked at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from dino_xcit.transform import EvalTransform
from eval.collection.card import FORMATS, data_of, images_in
from eval.collection.index import IndexType
from eval.pooling import Descriptor

_MOST_BYTES = 64 << 20
"""A source takes some kilobytes, with the names of a hundred images that could not be read."""
_MOST_IMAGES = 1 << 40
_MOST_NUMBERS = 1 << 24
"""In a vector."""
_INDEX_TYPES = get_args(IndexType)

_TYPES: dict[type, str] = {
    str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "an object",
    type(None): "nothing",
}  # fmt: skip
"""As JSON's own words would be, for people."""


def read_card(path: Path) -> dict[str, Any]:
    """The card of a collection.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too long or no JSON; a field is missing, of another type, or beyond all bounds; or its counts
            of images contradict each other.
    """
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path.name} is longer than {_MOST_BYTES >> 20} MiB")
    try:
        card = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error
    if not isinstance(card, dict):
        raise ValueError(f"{path.name} holds {_TYPES[type(card)]}, expected an object")
    found = card.get("format")
    if found not in FORMATS:
        raise ValueError(f"its format is {found!r:.40}, expected one of {', '.join(FORMATS)}")
    _check_making(card)
    _check_images(card)
    return card


def _check_making(card: dict[str, Any]) -> None:
    """How the vectors were made, and how they are kept."""
    _field(card, "normalised", bool)
    weights = _field(card, "weights", dict)
    for name in ("hash", "path"):
        _field(weights, name, str, "weights.")
    for name in ("network", "arch"):
        _optional(weights, name, str, "weights.")
    if not all(isinstance(word, str) for word in _optional(weights, "allowed", list, "weights.") or []):
        raise ValueError("its weights.allowed holds something other than texts")
    EvalTransform.from_dict(_field(card, "transform", dict))
    if "dimension" in card:
        _whole(card, "dimension", _MOST_NUMBERS)
    if "dtype" in card and _field(card, "dtype", str) not in ("fp32", "fp16"):
        raise ValueError(f"its dtype is {card['dtype']!r:.40}, expected fp32 or fp16")
    if (whitening := _optional(card, "whitening", dict)) is not None:
        _field(whitening, "hash", str, "whitening.")
    index = _optional(card, "index", dict)
    if index is not None and _field(index, "type", str, "index.") not in _INDEX_TYPES:
        raise ValueError(f"its index.type is {index['type']!r:.40}, expected one of {', '.join(_INDEX_TYPES)}")
    if "descriptor" in card:
        try:
            Descriptor.from_dict(_field(card, "descriptor", dict))
        except OverflowError as error:  # a whole number of hundreds of digits
            raise ValueError("its descriptor has a number beyond all bounds") from error


def _check_images(card: dict[str, Any]) -> None:
    """Which images, and that every row of the vectors has a source."""
    count = _whole(card, "count", _MOST_IMAGES)
    _field(card, "data", dict)
    _optional(card, "added", list)
    for number, data in enumerate(data_of(card)):
        if not isinstance(data, dict):
            raise ValueError(f"its added[{number - 1}] is {_TYPES[type(data)]}, expected an object")
        where = f"added[{number - 1}]." if number else "data."
        for name in ("url", "fingerprint"):
            _field(data, name, str, where)
        for name in ("absolute_url", "names_start_from"):
            _optional(data, name, str, where)
        images = _whole(data, "images", _MOST_IMAGES, where)
        if (unreadable := _optional(data, "unreadable", dict, where)) is not None:
            _whole(unreadable, "count", images, f"{where}unreadable.")
    rows = sum(map(images_in, data_of(card)))
    if rows != count:
        raise ValueError(f"its count is {count:,}, and its sources have {rows:,} images that could be read")


def _field(holder: Mapping[str, Any], name: str, kind: type, where: str = "") -> Any:
    if name not in holder:
        raise ValueError(f"its card lacks {where}{name}")
    value = holder[name]
    if type(value) is not kind:  # not isinstance: true and false are whole numbers in Python
        raise ValueError(f"its {where}{name} is {_TYPES[type(value)]}, expected {_TYPES[kind]}")
    return value


def _optional(holder: Mapping[str, Any], name: str, kind: type, where: str = "") -> Any:
    return None if holder.get(name) is None else _field(holder, name, kind, where)


def _whole(holder: Mapping[str, Any], name: str, most: int, where: str = "") -> int:
    value: int = _field(holder, name, int, where)
    if not 0 <= value <= most:
        raise ValueError(f"its {where}{name} is not from 0 to {most:,}")
    return value
