"""Where in a Parquet file the bytes of each value of a binary column are, so that one can be read without the others.

Parquet is made for whole columns: the smallest piece that its readers offer is a row group, 100 images where the
Hugging Face hub wrote it. A shuffled epoch that decodes one for each image reads everything a hundred times. But
pages hold the values as they are, each behind its length (encoding PLAIN, also within a dictionary), and Snappy, the
hub's compression, can be entered every 64 KiB. So this walks once through the pages of a column chunk, and notes for
each value the few bytes that it can be had from. What is not understood (other compressions and encodings) is said
so, for the caller to read by row group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dino_xcit.data.parquet import snappy
from dino_xcit.data.parquet.pages import (
    DATA_PAGE,
    DATA_PAGE_V2,
    DICTIONARY_PAGE,
    PLAIN,
    PLAIN_DICTIONARY,
    RLE_DICTIONARY,
    ByteWindow,
    DamagedPage,
    Page,
    pages,
)


class UnknownPage(ValueError):
    """A valid page perhaps, but in no form of which single values could be read."""


@dataclass(frozen=True)
class Chunk:
    """One column of one row group."""

    start: int
    """Absolute, in bytes; the dictionary's page where there is one."""
    size: int
    rows: int
    max_level: int
    """The definition level of a value that is not null; 0 where none can be null."""
    snappy: bool
    """False: not compressed at all."""


Values = NDArray[np.int64]
"""One row a value: :data:`COLUMNS`."""

COLUMNS = ("start", "stored", "unpacked", "skip", "length")
"""Read ``stored`` bytes of the file from ``start``; where ``unpacked`` is not 0, decompress them to so many; leave out
the first ``skip``; the next ``length`` are the value. A length of -1: null."""
_NULL = (0, 0, 0, 0, -1)


def locate(window: ByteWindow, chunk: Chunk, decompress: Callable[[memoryview, int], bytes]) -> Values:
    """Where each of a chunk's values is: [rows, 5] int64, see :data:`COLUMNS`.

    Args:
        window: the file.
        chunk: a column chunk of byte arrays that are not repeated.
        decompress: Snappy: (packed, exact size of the result) to the result.

    Raises:
        DamagedPage: the chunk contradicts itself.
        UnknownPage: its values cannot be read one by one.
    """
    dictionary: Values | None = None
    found: list[Values] = []
    for page in pages(window, chunk.start, chunk.size):
        if page.kind == DICTIONARY_PAGE:
            if page.encoding not in (PLAIN, PLAIN_DICTIONARY):
                raise UnknownPage(f"a dictionary with encoding {page.encoding}")
            body = _Body(window, chunk, page, decompress)
            dictionary = body.plain_values(0, page.values)
        elif page.kind in (DATA_PAGE, DATA_PAGE_V2):
            if page.values > chunk.rows:
                raise DamagedPage("a page claims more values than its row group has rows")
            found.append(_data_page(_Body(window, chunk, page, decompress), dictionary))
    rows = np.concatenate(found) if found else np.empty((0, len(COLUMNS)), np.int64)
    if len(rows) != chunk.rows:
        raise DamagedPage(f"{len(rows)} values for {chunk.rows} rows")
    return rows


def _data_page(body: _Body, dictionary: Values | None) -> Values:
    page, at = body.page, 0
    there = np.ones(page.values, dtype=bool)
    if body.chunk.max_level:
        if page.levels is None:  # version 1: four bytes with their length, then the levels
            length = int.from_bytes(body.data[:4], "little")
            at = 4 + length
            levels = body.data[4:at]
        else:
            levels = body.window.take(*page.levels)
        width = body.chunk.max_level.bit_length()
        there = unpack_hybrid(levels, width, page.values) == body.chunk.max_level
    count = int(there.sum())
    if page.encoding == PLAIN:
        values = body.plain_values(at, count)
    elif page.encoding in (PLAIN_DICTIONARY, RLE_DICTIONARY):
        if dictionary is None:
            raise DamagedPage("a page refers to a dictionary that is not there")
        if count == 0:
            values = dictionary[:0]
        else:
            numbers = unpack_hybrid(body.data[at + 1 :], body.data[at] if at < len(body.data) else 255, count)
            if len(dictionary) <= numbers.max():
                raise DamagedPage("a page refers to a value that its dictionary lacks")
            values = dictionary[numbers]
    else:
        raise UnknownPage(f"encoding {page.encoding}")
    rows = np.tile(np.array(_NULL, np.int64), (page.values, 1))
    rows[there] = values
    return rows


class _Body:
    """A page's body: what it holds, and where in the file that is."""

    def __init__(
        self, window: ByteWindow, chunk: Chunk, page: Page, decompress: Callable[[memoryview, int], bytes]
    ) -> None:
        self.window, self.chunk, self.page = window, chunk, page
        packed = window.take(page.start, page.stored)
        self._pieces: list[int] | None = None
        if chunk.snappy and page.compressed and page.unpacked:
            if page.unpacked > snappy.MAX_EXPANSION * page.stored:
                raise DamagedPage("a page claims to hold more than its bytes could")
            self._pieces = snappy.pieces(packed, page.unpacked)
            self.data = memoryview(decompress(packed, page.unpacked))
        elif page.unpacked in (0, page.stored):  # Snappy makes one byte of none
            self.data = packed[: page.unpacked]
        else:
            raise DamagedPage("a page that is not compressed claims another size than it has")

    def plain_values(self, at: int, count: int) -> Values:
        """The places of ``count`` values of encoding PLAIN from ``at`` on."""
        data, end = self.data, len(self.data)
        if count > end // 4:
            raise DamagedPage("a page claims more values than it has room for")
        places = np.empty((count, 2), np.int64)
        for value in range(count):
            length = int.from_bytes(data[at : at + 4], "little")
            if at + 4 + length > end:
                raise DamagedPage("a value reaches beyond its page")
            places[value] = at + 4, length
            at += 4 + length
        starts, lengths = places.T
        if self._pieces is None:
            zero = np.zeros_like(starts)
            return np.stack([self.page.start + starts, lengths, zero, zero, lengths], axis=1)
        # The pieces that hold the value: whole ones, and perhaps the page's last, which is shorter.
        edges = np.asarray(self._pieces, np.int64)
        first, last = starts // snappy.PIECE, -(-(starts + lengths) // snappy.PIECE)
        last = np.maximum(last, first)
        unpacked = np.minimum(last * snappy.PIECE, end) - first * snappy.PIECE
        return np.stack(
            [
                self.page.start + edges[first],
                edges[last] - edges[first],
                unpacked,
                starts - first * snappy.PIECE,
                lengths,
            ],
            axis=1,
        )


def unpack_hybrid(data: memoryview, width: int, count: int) -> NDArray[np.int64]:
    """The first ``count`` numbers of Parquet's mixture of run lengths and bit packing, ``width`` bits each: [count].

    Raises:
        DamagedPage: there are fewer.
    """
    if width > 32:
        raise DamagedPage("numbers of more than 32 bits")
    out = np.zeros(count, np.int64)
    powers = 1 << np.arange(width, dtype=np.int64)
    done, at = 0, 0
    while done < count:
        try:
            header, at = snappy.varint(data, at)
        except IndexError as error:
            raise DamagedPage("a page has fewer numbers than values") from error
        packed, run = header & 1, header >> 1
        taken = min(8 * run if packed else run, count - done)
        # Groups of eight numbers, the lowest bit first; or one number, many times.
        size = -(-taken // 8) * width if packed else -(-width // 8)
        numbers = np.frombuffer(data[at : at + size], np.uint8)
        if len(numbers) < size:
            raise DamagedPage("a page has fewer numbers than values")
        if packed and width:
            bits = np.unpackbits(numbers, bitorder="little").reshape(-1, width)
            out[done : done + taken] = (bits @ powers)[:taken]
        else:
            out[done : done + taken] = int.from_bytes(numbers.tobytes(), "little")
        at += run * width if packed else size
        done += taken
    return out
