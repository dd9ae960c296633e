"""Cosine similarities of all pairs between two sets, a piece at a time. D features."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from eval.search import unit_rows

_QUERIES_AT_ONCE = 1024
_ROWS_AT_ONCE = 16_384


def rows_of_similarity(
    queries: NDArray[np.float32], *database: NDArray[np.float32], queries_at_once: int = 64
) -> Iterator[NDArray[np.float32]]:
    """For each query its cosine with every row of the database, [rows].

    Args:
        queries: [queries, D], not necessarily normalised.
        database: [rows, D], likewise; perhaps in several sets, whose rows follow each other. Takes one copy of them,
            and ``queries_at_once`` x rows numbers.
    """
    others = [unit_rows(rows).T for rows in database]
    for start in range(0, len(queries), queries_at_once):
        some = unit_rows(queries[start : start + queries_at_once])
        yield from np.concatenate([some @ rows for rows in others], axis=1)


def blocks_of_similarity(
    first: NDArray[np.float32], second: NDArray[np.float32] | None
) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
    """The whole table of cosines in blocks: the block's first row, its first column, and the block.

    Takes 64 MB for a block, and as much again for its rows and columns at D = 384, however long the sets are: both
    may be memory-mapped.

    Args:
        first, second: [rows, D], not necessarily normalised. Without a second, the first with itself: then no block
            begins left of the diagonal, as the table is symmetric.
    """
    others = first if second is None else second
    for row in range(0, len(first), _QUERIES_AT_ONCE):
        left = unit_rows(first[row : row + _QUERIES_AT_ONCE])
        for column in range(row if second is None else 0, len(others), _ROWS_AT_ONCE):
            yield row, column, left @ unit_rows(others[column : column + _ROWS_AT_ONCE]).T
