"""The pages of a Parquet file: what their headers say, and where they are.

A column chunk is a row of pages, each behind a header: PageHeader in
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift. Nothing that one says is believed:
sizes are compared with what there is before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dino_xcit.data.parquet import thrift

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
            fields, length = thrift.structure(header, 0)
            page = _page(fields, at + length)
        except thrift.NotThrift as error:
            raise DamagedPage("no page header where one should be") from error
        if min(page.stored, page.unpacked, page.values) < 0 or page.start + page.stored > end:
            raise DamagedPage("a page claims a size that it cannot have")
        if max(page.stored, page.unpacked) > MAX_PAGE:
            raise DamagedPage(f"a page of {max(page.stored, page.unpacked):,} bytes, more than {MAX_PAGE:,}")
        yield page
        at = page.start + page.stored


def _page(fields: thrift.Fields, start: int) -> Page:
    """From Thrift's fields (PageHeader in parquet.thrift) to a :class:`Page`; ``start`` is where the header ends."""
    kind, unpacked, stored = thrift.number(fields, 1), thrift.number(fields, 2), thrift.number(fields, 3)
    if kind in (DICTIONARY_PAGE, DATA_PAGE):
        inner = thrift.inner(fields, 7 if kind == DICTIONARY_PAGE else 5)
        return Page(kind, thrift.number(inner, 1), thrift.number(inner, 2), start, stored, unpacked, None, True)
    if kind == DATA_PAGE_V2:
        inner = thrift.inner(fields, 8)
        defined, repeated = thrift.number(inner, 5), thrift.number(inner, 6)
        if min(defined, repeated) < 0:
            raise DamagedPage("a page claims levels of a negative size")
        apart = defined + repeated
        levels, start = (start + repeated, defined), start + apart
        values, encoding, compressed = thrift.number(inner, 1), thrift.number(inner, 4), bool(inner.get(7, True))
        return Page(kind, values, encoding, start, stored - apart, unpacked - apart, levels, compressed)
    return Page(kind, 0, PLAIN, start, stored, unpacked, None, True)  # an index page: passed over
