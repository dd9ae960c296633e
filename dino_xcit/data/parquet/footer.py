"""The end of a Parquet file: where each column of each row group lies, and how it is compressed.

FileMetaData in https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift. pyarrow offers the
same, but ends the whole process over some damaged footers (a codec it does not know, histograms of another length).
"""

from __future__ import annotations

from dataclasses import dataclass

from dino_xcit.data import files
from dino_xcit.data.parquet import thrift
from dino_xcit.data.parquet.pages import DamagedPage
from dino_xcit.errors import InputError

UNCOMPRESSED, SNAPPY = 0, 1
CODECS = {2: "gzip", 3: "LZO", 4: "Brotli", 5: "LZ4", 6: "Zstandard", 7: "LZ4"}
"""Other compressions, by Parquet's numbers."""
LEAST_ROW = 16
"""Bytes: a file that claims more rows than it has room for is refused. No image is smaller."""

MOST_ROWS = 20_000_000
"""Of one file. A file may seem as large as it likes without taking room on the disk."""

_MOST_BYTES = 16 << 20
"""A footer's structures take up to a hundred times its bytes in memory."""


@dataclass(frozen=True)
class ColumnChunk:
    """One column of one row group."""

    start: int
    """Absolute, in bytes; the dictionary's page where there is one."""
    size: int
    codec: int


@dataclass(frozen=True)
class RowGroup:
    """Some rows, and where their columns are."""

    rows: int
    columns: list[ColumnChunk]


def read_footer(path: str, size: int) -> list[RowGroup]:
    """The row groups of a file of ``size`` bytes.

    Raises:
        DamagedPage, NotThrift: it has no such footer, or one that claims what the file has no room for.
        InputError: it cannot be read, or has more than :data:`MOST_ROWS` rows.
    """
    length = int.from_bytes(files.read_range(path, size - 8, 4), "little") if size >= 12 else size
    if length > min(_MOST_BYTES, size - 8):
        raise DamagedPage(f"an end of {length:,} bytes")
    footer, _ = thrift.structure(memoryview(files.read_range(path, size - 8 - length, length)), 0)
    groups = [_row_group(fields, size) for fields in thrift.listed(footer, 4)]
    rows = sum(group.rows for group in groups)
    if rows != thrift.number(footer, 3):
        raise DamagedPage("its row groups have other rows than it claims")
    if rows > MOST_ROWS:
        raise InputError(f"{path} has {rows:,} rows, more than {MOST_ROWS:,}: write it anew as several files")
    return groups


def _row_group(fields: thrift.Fields, size: int) -> RowGroup:
    rows = thrift.number(fields, 3)
    if not 0 <= rows <= size // LEAST_ROW:
        raise DamagedPage(f"it claims {rows:,} rows in {size:,} bytes")
    return RowGroup(rows, [_column(chunk, size) for chunk in thrift.listed(fields, 1)])


def _column(fields: thrift.Fields, size: int) -> ColumnChunk:
    if 1 in fields:
        raise DamagedPage("its data are said to be in another file")
    meta = thrift.inner(fields, 3)
    start, length = thrift.number(meta, 9), thrift.number(meta, 7)
    if meta.get(11):  # some writers say 0 where there is no dictionary
        start = min(start, thrift.number(meta, 11))
    if not (0 <= start <= size and 0 <= length <= size - start):
        raise DamagedPage("a column claims to be where the file is not")
    return ColumnChunk(start, length, thrift.number(meta, 4))
