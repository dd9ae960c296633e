"""Leave-one-out retrieval in a labelled set: every image is a query for the others of its class.

Recall@k, R-precision and mean average precision at R as Musgrave et al. define them (A Metric Learning Reality Check,
arXiv 2003.08505, section 3.2). N images, D features, R the number of other images of the query's class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dino_xcit.errors import InputError
from dino_xcit.runtime.logging import progress_bar
from eval.search import build_index, unit_rows

KS = (1, 2, 4, 8)

_CELLS_AT_ONCE = 4_000_000
"""Neighbours held at a time: each takes some 40 bytes here (similarity, row, and what is counted with them)."""
_QUERIES_AT_MOST = 1024


@dataclass(frozen=True)
class Recall:
    """Figures from 0 to 1, a value a query."""

    queries: NDArray[np.int64]
    """Rows that were queries, ascending: all but those that are alone in their class."""
    alone: int
    """Images that are the only one of their class: no query, but among what the others may find."""
    hits: dict[int, NDArray[np.bool_]]
    """k to: is one of the k nearest others of the query's class?"""
    r_precision: NDArray[np.float64]
    """Share of the query's class among its R nearest."""
    map_at_r: NDArray[np.float64]
    """Mean over the first R places of the precision so far where that place is right, and 0 where it is wrong."""


def leave_one_out(
    features: NDArray[np.float32], labels: NDArray[np.int64] | None, ks: Sequence[int] = KS, progress: bool = False
) -> Recall:
    """Search every image among all others, by cosine, exactly.

    Besides the features there is one copy of them (the index, N x D x 4 bytes), and some 160 MB for what is found; a
    query's neighbours are as many as its class needs, so that a large class costs in proportion to its size squared.

    Args:
        features: [N, D], not necessarily normalised; may be memory-mapped.
        labels: [N].
        ks: each at least 1.

    Raises:
        InputError: labels are missing or of another length, a k below 1, features that are not finite, or no class
            with two images.
    """
    if labels is None or len(labels) != len(features):
        raise InputError(f"{len(features)} features but {0 if labels is None else len(labels)} labels")
    if not ks or min(ks) < 1:
        raise InputError(f"k is {min(ks) if ks else 'missing'}, expected 1 or more, such as 1 2 4 8")
    _, position, counts = np.unique(labels, return_inverse=True, return_counts=True)
    others = counts[position] - 1
    queries = np.flatnonzero(others > 0)
    if not len(queries):
        raise InputError(f"each of the {len(counts):,} classes has one image: there is nothing that a query could find")
    index = build_index(features)
    hits = {k: np.zeros(len(queries), dtype=np.bool_) for k in ks}
    r_precision, map_at_r = np.zeros(len(queries)), np.zeros(len(queries))
    # Queries of small classes together, as all of a chunk are searched as deep as its largest class demands.
    by_size = np.argsort(others[queries], kind="stable")
    with progress_bar(len(queries), "search", shown=progress) as bar:
        for chunk in _chunks(others[queries[by_size]], max(ks), len(labels) - 1):
            places = by_size[chunk]
            rows, wanted = queries[places], others[queries[places]]
            depth = _depth(int(wanted.max()), max(ks), len(labels) - 1)
            _, found = index.search(unit_rows(features[rows]), depth + 1)
            right = position[_without_itself(found, rows)] == position[rows][:, None]
            for k in ks:
                hits[k][places] = right[:, :k].any(axis=1)
            right &= np.arange(depth) < wanted[:, None]
            so_far = right.cumsum(axis=1, dtype=np.float32) / np.arange(1, depth + 1, dtype=np.float32)
            r_precision[places] = right.sum(axis=1) / wanted
            map_at_r[places] = (so_far * right).sum(axis=1, dtype=np.float64) / wanted
            bar.update(len(rows))
    return Recall(queries, int((others == 0).sum()), hits, r_precision, map_at_r)


def _depth(others: int, k: int, most: int) -> int:
    return min(max(others, k), most)


def _chunks(others: NDArray[np.int64], k: int, most: int) -> list[slice]:
    """Consecutive queries, ascending by size of class, whose neighbours fit into the memory together; one at least."""
    chunks, start = [], 0
    while start < len(others):
        end = min(start + _QUERIES_AT_MOST, len(others))
        while end - start > 1 and (end - start) * _depth(int(others[end - 1]), k, most) > _CELLS_AT_ONCE:
            end = start + (end - start) // 2
        chunks.append(slice(start, end))
        start = end
    return chunks


def _without_itself(found: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """[queries, depth + 1] neighbours to [queries, depth]: without the query, or, where exact copies of it have pushed
    it out, without the last."""
    itself = found == rows[:, None]
    itself[~itself.any(axis=1), -1] = True
    return found[~itself].reshape(len(rows), -1)
