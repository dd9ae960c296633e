"""The pages of a Parquet file: what their headers say, and where they are.

A column chunk is a row of pages, each behind a header in Thrift's compact protocol (parquet.thrift: PageHeader;
https://parquet.apache.org/docs/file-format). Nothing a header says is believed: sizes are compared with what there is
before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dino_xcit.data.snappy import varint

MAX_PAGE = 1 << 29
"""Bytes, packed or unpacked; larger pages are refused."""

DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3
"""Kinds of page, by Parquet's numbers."""
PLAIN, PLAIN_DICTIONARY, DELTA_BYTE_ARRAY, RLE_DICTIONARY = 0, 2, 7, 8
"""Encodings, likewise."""

_MAX_HEADER = 1 << 20
_AT_ONCE = 32 << 20


class DamagedPage(ValueError):
    """The column chunk contradicts itself, or is cut short."""


@dataclass(frozen=True)
class Page:
    """What a page's header says, and where its body is."""

    kind: int
    values: int
    """Nulls included."""
    encoding: int
    start: int
    """Of the body, absolute, after the levels where those are stored apart (data page version 2)."""
    stored: int
    """Bytes of the body in the file."""
    unpacked: int
    """Bytes of the body after decompression."""
    levels: tuple[int, int] | None
    """(start, bytes) of the definition levels where those are stored apart; otherwise they begin the body."""
    compressed: bool


class ByteWindow:
    """Reads forward through a part of a file, some 32 MiB at once."""

    def __init__(self, read_range: Callable[[int, int], bytes], start: int, size: int) -> None:
        """``read_range(start, length)`` gives exactly those bytes or raises."""
        self._read, self._end = read_range, start + size
        self._start, self._held = start, b""

    def take(self, start: int, length: int) -> memoryview:
        """These bytes. Raises DamagedPage where they are not within the part."""
        if length < 0 or start + length > self._end:
            raise DamagedPage("a page reaches beyond its column chunk")
        if start < self._start or start + length > self._start + len(self._held):
            self._held = b""  # first, so that there is never room for two
            self._held = self._read(start, max(length, min(_AT_ONCE, self._end - start)))
            self._start = start
        return memoryview(self._held)[start - self._start : start - self._start + length]


def pages(window: ByteWindow, start: int, size: int) -> Iterator[Page]:
    """The headers of all pages of a column chunk, in order.

    Raises:
        DamagedPage: not such headers, or sizes beyond the chunk's end or :data:`MAX_PAGE`.
    """
    at, end = start, start + size
    while at < end:
        header = window.take(at, min(_MAX_HEADER, end - at))
        try:
            fields, length = _struct(header, 0)
            page = _page(fields, at + length)
        except (IndexError, KeyError, TypeError, RecursionError) as error:
            raise DamagedPage("no page header where one should be") from error
        if min(page.stored, page.unpacked, page.values) < 0 or page.start + page.stored > end:
            raise DamagedPage("a page claims a size that it cannot have")
        if max(page.stored, page.unpacked) > MAX_PAGE:
            raise DamagedPage(f"a page of {max(page.stored, page.unpacked):,} bytes, more than {MAX_PAGE:,}")
        yield page
        at = page.start + page.stored


def _page(fields: Fields, start: int) -> Page:
    """From Thrift's fields (PageHeader in parquet.thrift) to a :class:`Page`; ``start`` is where the header ends."""
    kind, unpacked, stored = _number(fields, 1), _number(fields, 2), _number(fields, 3)
    if kind in (DICTIONARY_PAGE, DATA_PAGE):
        inner = _inner(fields, 7 if kind == DICTIONARY_PAGE else 5)
        return Page(kind, _number(inner, 1), _number(inner, 2), start, stored, unpacked, None, True)
    if kind == DATA_PAGE_V2:
        inner = _inner(fields, 8)
        defined, repeated = _number(inner, 5), _number(inner, 6)
        if min(defined, repeated) < 0:
            raise DamagedPage("a page claims levels of a negative size")
        apart = defined + repeated
        levels, start = (start + repeated, defined), start + apart
        values, encoding, compressed = _number(inner, 1), _number(inner, 4), bool(inner.get(7, True))
        return Page(kind, values, encoding, start, stored - apart, unpacked - apart, levels, compressed)
    return Page(kind, 0, PLAIN, start, stored, unpacked, None, True)  # an index page: passed over


Fields = dict[int, Any]
"""Of a Thrift structure, by number."""


def _number(fields: Fields, key: int) -> int:
    if not isinstance(fields[key], int):
        raise TypeError("another type")
    return int(fields[key])


def _inner(fields: Fields, key: int) -> Fields:
    if not isinstance(fields[key], dict):
        raise TypeError("another type")
    return dict(fields[key])


def _struct(data: memoryview, at: int) -> tuple[Fields, int]:
    """A structure of Thrift's compact protocol as {number of the field: value}, and where it ends.

    Only what page headers consist of: numbers, truths, byte strings, structures.
    """
    fields: Fields = {}
    key = 0
    while data[at] != 0:
        kind, step = data[at] & 15, data[at] >> 4
        at += 1
        if step:
            key += step
        else:
            key, at = _zigzag(data, at)
        if kind in (1, 2):
            fields[key] = kind == 1
        elif kind in (4, 5, 6):
            fields[key], at = _zigzag(data, at)
        elif kind == 8:
            length, at = varint(data, at)
            fields[key], at = None, at + length  # the statistics' least and greatest value: of no use here
        elif kind == 12:
            fields[key], at = _struct(data, at)
        else:
            raise TypeError("a type that page headers do not have")
    return fields, at + 1


def _zigzag(data: memoryview, at: int) -> tuple[int, int]:
    value, at = varint(data, at)
    return value >> 1 ^ -(value & 1), at
