"""Bounds of settings as annotations: ``epochs: Annotated[int, Ge(1)] = 100``.

Bounds come from the package annotated_types (Ge, Gt, Le, Lt, MinLen). For a tuple they apply to each element.
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
    """Marks a local path: the command line expands ``~``."""


class Positional:
    """Marks a setting that takes words without a flag; several of them are filled in order."""


class Repeatable:
    """Marks a setting whose flag may be repeated: the values are concatenated."""


class Unique:
    """Marks a tuple with distinct elements (as formatted by :func:`shown`), because they identify results."""


class ZeroIsAuto:
    """Marks a number that accepts ``auto`` for 0."""


@dataclass(frozen=True)
class Group:
    """Marks the first setting of a group, which ``--help`` shows under this heading."""

    heading: str


@dataclass(frozen=True)
class Suffix:
    """Marks a file name with this ending."""

    ending: str


FilePath = Annotated[str, IsPath]
Seed = Annotated[int, Ge(0), Lt(1 << 63)]
"""Range that all random number generators accept."""

_COMPARISONS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
"""Names of functions in ``operator``, which are also the attributes of annotated_types with the limits."""


@cache
def annotations_of(config: type) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Return the type and the annotations of each field."""
    out = {}
    hints = get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        out[field.name] = (hint.__origin__, hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())
    return out


def marked(config: type, mark: object) -> tuple[str, ...]:
    """Return the fields with this mark."""
    return tuple(name for name, (_, notes) in annotations_of(config).items() if mark in notes)


def check_bounds(config: Any) -> None:
    """Check the bounds, the choices and the finiteness of each field of a dataclass.

    Raises:
        InputError: with the field, its value and the expected values.
    """
    kind: type = type(config)
    for name, notes in annotations_of(kind).items():
        value = getattr(config, name)
        if expected := _unmet(value, *notes):
            raise refusal(kind, name, value, expected)


def refusal(config: type, name: str, value: object, expected: str) -> InputError:
    """Return the error for an invalid value of a setting, with its default as an example."""
    default = getattr(config, name)
    example = f", such as {shown(default)}" if default not in ("", ()) else ""
    return InputError(f"{name} is {shown(value)}, expected {expected}{example}")


def _unmet(value: Any, kind: Any, notes: Iterable[Any]) -> str:
    """Return a description of the expected values, or an empty string if the value is valid."""
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
    """Reject non-default values of settings that have no effect.

    Args:
        where: the condition under which they have no effect, such as ``with --no-cache``.

    Raises:
        InputError: with the first such setting and its value.
    """
    for name in names:
        value = getattr(config, name)
        if value != getattr(type(config), name):
            raise InputError(f"{name} is {shown(value)}, which has no effect {where}: leave it out")


def shown(value: object) -> str:
    """Format a value as on the command line."""
    if isinstance(value, tuple):
        return " ".join(map(shown, value)) or "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) or "empty"
