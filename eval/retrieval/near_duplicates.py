"""Pictures of one set that another holds too, as they are or nearly: what of the test images was trained on?"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from dino_xcit.data.source import Source
from dino_xcit.errors import InputError
from dino_xcit.runtime import atomic
from dino_xcit.runtime.logging import progress_bar
from eval.collection.contact_sheet import Tile, draw_sheet
from eval.retrieval.similarity import blocks_of_similarity

COLUMNS = ("first", "second", "similarity", "kind")
IDENTICAL, NEAR, UNKNOWN = "identical file", "near", "unknown"

SHEET_ROWS, SHEET_COLUMNS = 20, 5
"""In the picture of pairs: images of the second set, and images of the first beside each."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of images, the most similar first; equal ones in the order of the sets."""

    first: NDArray[np.int64]
    """[pairs] rows of the first set."""
    second: NDArray[np.int64]
    """[pairs] rows of the second."""
    similarity: NDArray[np.float32]
    """[pairs] cosine."""

    def __len__(self) -> int:
        return len(self.similarity)


_ROUNDING = 1e-6
"""Of the products of two unit vectors in float32: an image and its copy may come to a little less than 1."""


def find_pairs(
    first: NDArray[np.float32],
    second: NDArray[np.float32] | None,
    threshold: float,
    most: int,
    progress: bool = False,
) -> Pairs:
    """All pairs whose cosine similarity is at least ``threshold``, exactly.

    Args:
        first: [images, D], not necessarily normalised; may be memory-mapped.
        second: likewise; None: pairs within the first set, each once and none of an image with itself.
        threshold: between -1 and 1.
        most: pairs that are kept in memory (20 bytes each).

    Raises:
        InputError: there are more pairs than ``most``, or the sets' features differ in their width.
    """
    others = first if second is None else second
    if first.shape[1] != others.shape[1]:
        raise InputError(
            f"features of {first.shape[1]} and {others.shape[1]} numbers cannot be compared: extract both sets alike"
        )
    found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]] = []
    count = 0
    with progress_bar(len(first), "compare", shown=progress) as bar:
        for row, column, block in blocks_of_similarity(first, second):
            bar.update(row - bar.n)
            rows, columns = np.nonzero(block >= threshold - _ROUNDING)
            if second is None:
                above = columns + column > rows + row
                rows, columns = rows[above], columns[above]
            count += len(rows)
            if count > most:
                raise InputError(
                    f"more than {most:,} pairs are at least {threshold:g} alike, after {row:,} of {len(first):,} "
                    "images: raise --threshold, or --most-pairs"
                )
            found.append((rows + row, columns + column, block[rows, columns]))
    if not found:
        found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    left, right, similarity = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((right, left, -similarity))
    return Pairs(left[order], right[order], similarity[order])


def identical(pairs: Pairs, first: Source, second: Source, progress: bool = False) -> NDArray[np.bool_]:
    """[pairs]: whether both have the same bytes (of an image that is no file: the same pixels).

    Reads each image of a pair once.
    """
    total = len(np.unique(pairs.first)) + len(np.unique(pairs.second))
    with progress_bar(total, "read the pairs' files", shown=progress) as bar:

        def digests(source: Source, rows: NDArray[np.int64]) -> dict[int, bytes]:
            out = {}
            for row in np.unique(rows).tolist():
                item, _ = source.read(row)
                shape = b"" if isinstance(item, bytes) else repr(item.shape).encode()
                out[row] = hashlib.sha256(shape + (item if isinstance(item, bytes) else item.tobytes())).digest()
                bar.update(1)
            return out

        left, right = digests(first, pairs.first), digests(second, pairs.second)
    same = [left[one] == right[other] for one, other in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)]
    return np.array(same, dtype=np.bool_)


class _Utf8:
    """What a csv.writer needs of a text file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        return self._file.write(text.encode("utf-8", "surrogateescape"))


def write_pairs(path: Path, pairs: Pairs, kinds: Sequence[str], first: Sequence[str], second: Sequence[str]) -> None:
    """A CSV file, a pair a line: both names, the similarity and the kind. UTF-8; names' other bytes as they are.

    Args:
        kinds: [pairs].
        first, second: names of all images of the sets, by row.

    Raises:
        InputError: it cannot be written there.
    """

    def fill(file: BinaryIO) -> None:
        table = csv.writer(_Utf8(file))
        table.writerow(COLUMNS)
        rows = zip(pairs.first.tolist(), pairs.second.tolist(), pairs.similarity.tolist(), kinds, strict=True)
        for one, other, similarity, kind in rows:
            table.writerow((first[one], second[other], f"{similarity:.6f}", kind))

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, fill)
    except (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another --csv") from error


def draw_pairs(
    pairs: Pairs,
    kinds: Sequence[str],
    first: Callable[[int], Tile],
    second: Callable[[int], Tile],
    path: Path,
) -> None:
    """The images of the second set that are most alike to one of the first, each beside those that it resembles.

    Args:
        kinds: [pairs].
        first, second: a row to its image, with its name.

    Raises:
        InputError: the picture cannot be written there.
    """
    beside: dict[int, list[int]] = {}
    for pair, row in enumerate(pairs.second.tolist()):  # the most similar pairs come first
        if row in beside or len(beside) < SHEET_ROWS:
            beside.setdefault(row, []).append(pair)
    blocks = []
    for row, found in beside.items():
        tiles = []
        for pair in found[:SHEET_COLUMNS]:
            tile = first(int(pairs.first[pair]))
            tiles.append(Tile(tile.image, f"{pairs.similarity[pair]:.4f}  {kinds[pair]}", tile.name))
        blocks.append((second(row), tiles))
    draw_sheet(blocks, path)
