"""Structures in Thrift's compact protocol, which Parquet's headers and footers are written in: reading them.

https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from __future__ import annotations

from typing import Any

from dino_xcit.data.parquet.snappy import varint

Fields = dict[int, Any]
"""A structure: the number of a field to its value. Byte strings, which nobody asks for here, are None."""


class NotThrift(ValueError):
    """The bytes are no such structure, or not the one expected."""


def structure(data: memoryview, at: int) -> tuple[Fields, int]:
    """The structure that begins at byte ``at``, and where it ends.

    Raises:
        NotThrift: there is none.
    """
    try:
        return _structure(data, at)
    except (IndexError, RecursionError) as error:
        raise NotThrift("cut short") from error


def number(fields: Fields, key: int) -> int:
    """A field that is a number. Raises NotThrift where it is missing or something else."""
    value = fields.get(key)
    if not isinstance(value, int):
        raise NotThrift(f"field {key} is no number")
    return value


def inner(fields: Fields, key: int) -> Fields:
    """A field that is a structure. Raises NotThrift where it is missing or something else."""
    value = fields.get(key)
    if not isinstance(value, dict):
        raise NotThrift(f"field {key} is no structure")
    return value


def listed(fields: Fields, key: int) -> list[Fields]:
    """A field that is a list of structures. Raises NotThrift where it is missing or something else."""
    value = fields.get(key)
    if not isinstance(value, list) or not all(isinstance(element, dict) for element in value):
        raise NotThrift(f"field {key} is no list of structures")
    return value


def _structure(data: memoryview, at: int) -> tuple[Fields, int]:
    fields: Fields = {}
    key = 0
    while data[at] != 0:
        kind, step = data[at] & 15, data[at] >> 4
        at += 1
        if step:
            key += step
        else:
            key, at = _zigzag(data, at)
        if kind in (1, 2):  # a truth is its field's type
            fields[key] = kind == 1
        else:
            fields[key], at = _value(data, at, kind)
    return fields, at + 1


def _value(data: memoryview, at: int, kind: int) -> tuple[Any, int]:
    match kind:
        case 1 | 2:  # in a list
            return data[at] == 1, at + 1
        case 3:
            return data[at], at + 1
        case 4 | 5 | 6:
            return _zigzag(data, at)
        case 7:
            return None, at + 8
        case 8:
            length, at = varint(data, at)
            return None, at + length
        case 9 | 10:
            return _list(data, at)
        case 12:
            return _structure(data, at)
    raise NotThrift(f"a value of kind {kind}")


def _list(data: memoryview, at: int) -> tuple[list[Any], int]:
    count, kind = data[at] >> 4, data[at] & 15
    at += 1
    if count == 15:
        count, at = varint(data, at)
    values = []
    for _ in range(count):  # each takes a byte at least, so that the data bound it
        if at >= len(data):
            raise IndexError("cut short")
        value, at = _value(data, at, kind)
        values.append(value)
    return values, at


def _zigzag(data: memoryview, at: int) -> tuple[int, int]:
    value, at = varint(data, at)
    return value >> 1 ^ -(value & 1), at
