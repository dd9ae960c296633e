"""One Parquet file, looked through once: where each image's bytes are, its name, and its label."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dino_xcit.data import files
from dino_xcit.data.parquet.columns import Columns, choose
from dino_xcit.data.parquet.footer import CODECS, SNAPPY, UNCOMPRESSED, ColumnChunk, RowGroup, read_footer
from dino_xcit.data.parquet.pages import DELTA_BYTE_ARRAY, DICTIONARY_PAGE, MAX_PAGE, ByteWindow, DamagedPage, pages
from dino_xcit.data.parquet.snappy import NoPieces, NotSnappy
from dino_xcit.data.parquet.thrift import NotThrift
from dino_xcit.data.parquet.values import COLUMNS, Chunk, UnknownPage, Values, locate
from dino_xcit.data.source import MOST_CLASSES
from dino_xcit.errors import InputError, one_line

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

BY_GROUP = -1
"""In place of ``unpacked``: the value is row ``skip`` of row group ``start``, which has to be decoded as a whole."""
MAX_GROUP = MAX_PAGE
"""Bytes of images in a row group that has to be decoded as a whole."""

_MAX_NAME = 200
"""Letters of an image's own path that are kept."""
_MAX_DICTIONARY = 4 << 20
"""Bytes of different names in a row group; where there are more, images go by their number alone."""


@dataclass(frozen=True)
class Scanned:
    """What was found in one file."""

    values: Values
    """[rows, 5]: see :data:`dino_xcit.data.parquet.values.COLUMNS` and :data:`BY_GROUP`."""
    names: list[str]
    """[rows], the last part of each image's own path; empty texts where it has none."""
    labels: NDArray[np.int64] | None
    """[rows], -1 without one; numbers of :attr:`words` where labels are words."""
    words: list[str]
    slow: str
    """Why some images can only be read by row group; empty where none has to."""


def import_pyarrow() -> None:
    """Raises InputError where pyarrow, an optional dependency, is missing."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise InputError(f"reading Parquet needs pyarrow ({error}): pip install pyarrow") from error


@contextmanager
def opened(path: str, unchanged: files.Stamp | None = None, **options: Any) -> Iterator[pq.ParquetFile]:
    """A Parquet file, for a while; whatever pyarrow stumbles over becomes one sentence.

    Raises:
        InputError: no Parquet file, damaged, or it cannot be reached.
    """
    import pyarrow.parquet as pq

    with files.open_file(path, unchanged) as file:
        try:
            with pq.ParquetFile(file, **options) as parquet:
                yield parquet
        except InputError:
            raise
        except (DamagedPage, NotSnappy, NotThrift) as error:
            raise InputError(f"{path} is damaged: {error}; fetch it anew") from error
        except Exception as error:  # of any class: parsers of damaged files stumble over whatever they meet
            raise InputError(f"{path} is no Parquet file that can be read: {one_line(error)}; fetch it anew") from error


def look(path: str, image: str, label: str) -> tuple[int, Columns]:
    """How many rows a file claims, and which of its columns are meant; quick, as only its end is read.

    Args:
        path: local, or a URL for fsspec.
        image, label: columns, or empty texts: see :func:`dino_xcit.data.parquet.columns.choose`.

    Raises:
        InputError: it is no Parquet file, is damaged, or has no such columns.
    """
    size, _ = files.stamp(path)
    with opened(path) as parquet:
        rows = sum(group.rows for group in read_footer(path, size))
        return rows, choose(parquet.schema_arrow, image, label, path)


def scan(path: str, rows: int, columns: Columns, advance: Callable[[int], None]) -> Scanned:
    """Look through one file.

    Args:
        path: local, or a URL for fsspec.
        rows, columns: from :func:`look`.
        advance: told how many images have been found since the last call.

    Raises:
        InputError: it is damaged, or cannot be reached.
    """
    size, _ = files.stamp(path)
    with opened(path) as parquet:
        leaves = {parquet.schema.column(number).path: number for number in range(len(parquet.schema.names))}
        groups = read_footer(path, size)
        values, slow = _values(parquet, path, groups, leaves[columns.image], advance)
        if len(values) != rows:
            raise DamagedPage(f"{len(values):,} images for {rows:,} rows")
        names = [""] * rows
        own = columns.names
        if own is not None and _dictionary_size(path, groups, leaves[own]) <= _MAX_DICTIONARY:
            names = list(_last_parts(parquet, own))
        if columns.label is not None:
            _dictionary_size(path, groups, leaves[columns.label])
    # Words are then there once, however many rows have them.
    with opened(path, read_dictionary=[columns.label] if columns.text_label else []) as parquet:
        labels, words = _labels(parquet, columns, path)
    if len(names) != rows or (labels is not None and len(labels) != rows):
        raise InputError(f"{path} is damaged: its columns are not of the same length; fetch it anew")
    return Scanned(values, names, labels, words, slow)


def _values(
    parquet: pq.ParquetFile, path: str, groups: list[RowGroup], leaf: int, advance: Callable[[int], None]
) -> tuple[Values, str]:
    """Where all images are, and why some can only be read by row group."""
    import pyarrow as pa

    snappy = pa.Codec("snappy")
    levels = parquet.schema.column(leaf).max_definition_level
    repeated = parquet.schema.column(leaf).max_repetition_level > 0
    slow = ""
    found = [np.empty((0, len(COLUMNS)), np.int64)]
    for number, group in enumerate(groups):
        if group.rows == 0:
            continue
        column = _column(group, leaf)
        window = _window(path, column)
        chunk = Chunk(column.start, column.size, group.rows, levels, column.codec == SNAPPY)
        try:
            if column.codec not in (UNCOMPRESSED, SNAPPY):
                raise UnknownPage(f"compressed with {CODECS.get(column.codec, 'an unknown codec')}")
            if repeated:
                raise UnknownPage("several images a row")
            found.append(locate(window, chunk, lambda data, count: snappy.decompress(data, count, asbytes=True)))
        except (UnknownPage, NoPieces) as error:
            unpacked = sum(page.unpacked for page in pages(window, column.start, column.size))
            if unpacked > MAX_GROUP:
                raise InputError(
                    f"{path} has a row group of {unpacked:,} bytes that can only be decoded as a whole ({error}); at "
                    f"most {MAX_GROUP:,} are: write it anew with smaller row groups, or with compression 'none'"
                ) from error
            slow = str(error)
            places = np.zeros((group.rows, len(COLUMNS)), np.int64)
            places[:, 0], places[:, 2], places[:, 3] = number, BY_GROUP, np.arange(group.rows)
            found.append(places)
        advance(group.rows)
    return np.concatenate(found), slow


def _column(group: RowGroup, leaf: int) -> ColumnChunk:
    if leaf >= len(group.columns):
        raise DamagedPage("a row group has fewer columns than the schema")
    return group.columns[leaf]


def _window(path: str, column: ColumnChunk) -> ByteWindow:
    return ByteWindow(lambda at, count: files.read_range(path, at, count), column.start, column.size)


def _dictionary_size(path: str, groups: list[RowGroup], leaf: int) -> int:
    """Before pyarrow decodes labels or names: bytes of the largest dictionary.

    Raises:
        DamagedPage: the column could be much larger than it looks.
    """
    total, largest = 0, 0
    for group in groups:
        column = _column(group, leaf)
        for page in pages(_window(path, column), column.start, column.size if group.rows else 0):
            total += page.unpacked
            if page.encoding == DELTA_BYTE_ARRAY:  # each text may repeat a million letters of the one before
                raise DamagedPage("labels or names in an encoding that is not read (DELTA_BYTE_ARRAY)")
            if total > MAX_PAGE or page.values > max(group.rows, page.unpacked):
                raise DamagedPage("labels or names that are larger than any")
            if page.kind == DICTIONARY_PAGE:
                largest = max(largest, page.unpacked)
    return largest


def _last_parts(parquet: pq.ParquetFile, leaf: str) -> Iterator[str]:
    """``c.jpg`` of each ``a/b/c.jpg``: a name to show, not a place."""
    import pyarrow as pa

    for batch in parquet.iter_batches(256, columns=[leaf], use_threads=False):
        for text in _flat(pa.Table.from_batches([batch])).to_pylist():
            yield (text or "").replace("\\", "/").rpartition("/")[2][-_MAX_NAME:]


def _labels(parquet: pq.ParquetFile, columns: Columns, path: str) -> tuple[NDArray[np.int64] | None, list[str]]:
    """[rows] with -1 for no label, and what the numbers mean where labels are words."""
    if columns.label is None:
        return None, []
    column = parquet.read(columns=[columns.label], use_threads=False).column(0)
    if columns.text_label:
        column = column.unify_dictionaries()
        words = [str(word) for word in column.chunk(0).dictionary.to_pylist()] if column.num_chunks else []
        parts = [chunk.indices.fill_null(-1).to_numpy(zero_copy_only=False) for chunk in column.chunks]
        return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64), words
    labels = column.cast("int64").fill_null(-1).to_numpy().astype(np.int64)
    most = len(columns.classes) if columns.classes else MOST_CLASSES
    if len(labels) and not -1 <= labels.min() <= labels.max() < most:
        wrong = labels.min() if labels.min() < -1 else labels.max()
        raise InputError(
            f"column {columns.label!r} of {path} has the label {wrong}: expected 0 to {most - 1:,}"
            f"{', as its metadata name so many classes' if columns.classes else ''}; ?label=none reads without labels"
        )
    return labels, []


def decode_group(path: str, group: int, leaf: str, unchanged: files.Stamp) -> list[bytes | None]:
    """All images of one row group of a file that still has this stamp; None for null.

    Raises:
        InputError: damaged, replaced, or more than :data:`MAX_GROUP` bytes.
    """
    import pyarrow as pa

    with opened(path, unchanged) as parquet:
        images: list[bytes | None] = []
        total = 0
        # One row at once: a dictionary may stand for much more than its pages hold.
        for batch in parquet.iter_batches(1, row_groups=[group], columns=[leaf], use_threads=False):
            found = _flat(pa.Table.from_batches([batch])).to_pylist()
            images += found
            total += sum(len(image) for image in found if image is not None)
            if total > MAX_GROUP:
                raise DamagedPage(f"row group {group} decodes to more than {MAX_GROUP:,} bytes")
        return images


def _flat(table: pa.Table) -> pa.ChunkedArray:
    """The only column of a table, or the only field of its structure."""
    return table.flatten().column(0)
