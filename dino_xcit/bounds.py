"""What a setting may be, noted beside it: ``epochs: Annotated[int, Ge(1)] = 100``.

The bounds are those of the package annotated_types (Ge, Gt, Le, Lt, MinLen). Of a tuple they hold for each element.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from annotated_types import Ge, Lt, MinLen

from dino_xcit.errors import InputError


class IsPath:
    """Mark of a path on this machine: the command line expands its ``~``."""


class Positional:
    """Mark of a setting that words without a flag belong to; several such settings take them in their order."""


class Repeatable:
    """Mark of a setting whose flag may be given several times: its values add up."""


class Unique:
    """Mark of a tuple whose elements differ, also as they are shown: results are known by them."""


class ZeroIsAuto:
    """Mark of a number whose 0 may be typed as ``auto``."""


@dataclass(frozen=True)
class Group:
    """Mark of the first setting of a group: ``--help`` shows it and those that follow under this heading."""

    heading: str


@dataclass(frozen=True)
class Suffix:
    """Mark of a file whose name ends in this."""

    ending: str


FilePath = Annotated[str, IsPath]
Seed = Annotated[int, Ge(0), Lt(1 << 63)]
"""What all generators of random numbers take."""

_COMPARISONS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
"""Functions of ``operator`` and the attributes of annotated_types that hold their limits."""


@cache
def annotations_of(config: type) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Each field's type and the notes beside it."""
    out = {}
    hints = get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        out[field.name] = (hint.__origin__, hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())
    return out


def marked(config: type, mark: object) -> tuple[str, ...]:
    """The fields that have this mark."""
    return tuple(name for name, (_, notes) in annotations_of(config).items() if mark in notes)


def check_bounds(config: Any) -> None:
    """Check each field of a dataclass by itself: its bounds, its choices, and that its numbers are finite.

    Raises:
        InputError: names the field, its value and what is expected.
    """
    kind: type = type(config)
    for name, notes in annotations_of(kind).items():
        value = getattr(config, name)
        if expected := _unmet(value, *notes):
            raise refusal(kind, name, value, expected)


def refusal(config: type, name: str, value: object, expected: str) -> InputError:
    """The error for a setting whose value cannot be; its default is the example."""
    default = getattr(config, name)
    example = f", such as {shown(default)}" if default not in ("", ()) else ""
    return InputError(f"{name} is {shown(value)}, expected {expected}{example}")


def _unmet(value: Any, kind: Any, notes: Iterable[Any]) -> str:
    """What is expected instead of the value; empty where it will do."""
    parts = value if isinstance(value, tuple) else (value,)
    if get_origin(kind) is Literal and value not in get_args(kind):
        return f"one of {', '.join(filter(None, get_args(kind)))}"
    if any(isinstance(part, float) and not math.isfinite(part) for part in parts):
        return "finite numbers"
    bounds = [(word, getattr(note, word)) for note in notes for word in _COMPARISONS if hasattr(note, word)]
    if not all(getattr(operator, word)(part, limit) for word, limit in bounds for part in parts):
        return " and ".join(f"{_COMPARISONS[word]} {shown(limit)}" for word, limit in bounds)
    for note in notes:
        if isinstance(note, MinLen) and len(value) < note.min_length:
            return f"at least {note.min_length} values" if note.min_length > 1 else "a value"
        if note is Unique and len({shown(part) for part in parts}) < len(parts):
            return "each once"
        if isinstance(note, Suffix) and value and not value.lower().endswith(note.ending):
            return f"a file name that ends in {note.ending}"
    return ""


def refuse_changed(config: Any, names: Iterable[str], where: str) -> None:
    """Refuse settings that are not at their defaults where they have no effect.

    Raises:
        InputError: names the first of them, its value, and ``where`` it has no effect.
    """
    for name in names:
        value = getattr(config, name)
        if value != getattr(type(config), name):
            raise InputError(f"{name} is {shown(value)}, which has no effect {where}: leave it out")


def shown(value: object) -> str:
    """A setting's value as it is typed."""
    if isinstance(value, tuple):
        return " ".join(map(shown, value)) or "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) or "empty"
