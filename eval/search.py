"""Vectors of length 1, and search among them by cosine similarity (faiss).

D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import faiss
import numpy as np
from numpy.typing import NDArray

from dino_xcit.errors import InputError
from dino_xcit.runtime.logging import progress_bar

_ROWS_AT_ONCE = 16_384
_DAMAGED = "the features are not finite numbers (NaN or infinite): the weights are damaged, or their training diverged"


class Index(Protocol):
    """What can be searched: faiss's indices by inner product, and :class:`eval.faiss_index.WithVectors`."""

    def search(self, queries: NDArray[np.float32], top: int, /) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Inner products and row numbers, [queries, top] each, best first; row -1 where there is no more."""
        ...


def unit_rows(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length 1 in float32; a zero row stays zero. Besides what it returns it takes 20 bytes a number of
    16,384 rows, so that the features may be memory-mapped.

    Args:
        features: [rows, D].

    Raises:
        InputError: a feature is not a finite number.
    """
    found: NDArray[np.float32] = np.empty(features.shape, dtype=np.float32)
    for start in range(0, len(features), _ROWS_AT_ONCE):
        rows = np.ascontiguousarray(features[start : start + _ROWS_AT_ONCE], dtype=np.float32)
        length = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
        if not np.isfinite(length).all():
            raise InputError(_DAMAGED)
        found[start : start + _ROWS_AT_ONCE] = rows / np.maximum(length, 1e-12)
    return found


class UnitRows:
    """Features [N, D] as rows of length 1 in float32, made when they are asked for; a zero row stays zero.

    Keeps 4 bytes a row: the features may be memory-mapped.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, features: NDArray[np.float32]) -> None:
        """Raises:
        InputError: a feature is not a finite number.
        """
        self._features, self.shape = features, (len(features), features.shape[1])
        self._lengths: NDArray[np.float32] = np.empty(len(features), dtype=np.float32)
        for start in range(0, len(features), _ROWS_AT_ONCE):
            piece = slice(start, start + _ROWS_AT_ONCE)
            length = np.linalg.norm(np.asarray(features[piece], dtype=np.float64), axis=1)
            if not np.isfinite(length).all():
                raise InputError(_DAMAGED)
            self._lengths[piece] = np.maximum(length, 1e-12)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """[*rows, D]."""
        chosen = self._features[rows]
        # Rows by their numbers are a copy already.
        found: NDArray[np.float32] = (np.array if isinstance(rows, slice) else np.asarray)(chosen, dtype=np.float32)
        found /= self._lengths[rows][..., None]
        return found


def build_index(features: NDArray[np.float32]) -> faiss.IndexFlatIP:
    """An exact inner-product index of L2-normalised rows, filled in pieces, so that a memory-mapped [rows, D] file is
    never copied whole besides the index itself (rows * D * 4 bytes)."""
    index = faiss.IndexFlatIP(features.shape[1])
    for start in range(0, len(features), _ROWS_AT_ONCE):
        index.add(unit_rows(features[start : start + _ROWS_AT_ONCE]))
    return index


def search(
    index: Index, queries: NDArray[np.float32], k: int, chunk: int = 1024, progress: bool = False
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Cosine similarities and row numbers, [chunk, k] each, best first, a chunk of queries at a time.

    An approximate index may find fewer than k: the places left over have row -1.
    """
    with progress_bar(len(queries), f"search, k = {k}", shown=progress) as bar:
        for start in range(0, len(queries), chunk):
            rows = unit_rows(queries[start : start + chunk])
            similarities, found = index.search(rows, k)
            yield similarities, found
            bar.update(len(rows))
