"""faiss indices of vectors: how each kind is built, trained, filled and searched, and how much it misses.

N vectors, D features, Q queries, all compared by inner product.

- ``flat``: every vector; exact.
- ``ivf``: vectors in lists around the centres of k-means, of which a query looks into some; for vectors of length 1.
- ``hnsw``: vectors in a graph that a query walks along (Malkov and Yashunin, arXiv 1603.09320).
- ``ivfpq``: codes of about D / 4 bytes in such lists (Jégou, Douze and Schmid, TPAMI 2011), with 16 code words for two
  numbers, which take a hundredth of the time that 256 take to learn. What they find is put in order by the vectors
  themselves, which may stay in a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import faiss
import numpy as np
from numpy.typing import NDArray

from dino_xcit.runtime.logging import progress_bar
from eval.search import UnitRows

Kind = Literal["flat", "ivf", "hnsw", "ivfpq"]
Rows = NDArray[np.float16] | NDArray[np.float32] | UnitRows
"""Vectors [N, D], of which some are read at a time."""
Found = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Inner products and row numbers, [Q, top] each, best first; row -1 where an approximate index found no more."""

LINKS = 32
"""Of a vector in the graph; 64 in its lowest layer."""
_EF_CONSTRUCTION = 80
_PASSES_OF_K_MEANS = 10
_VECTORS_A_LIST_TO_LEARN, _LEAST_TO_LEARN = 64, 10_000
_ROWS_AT_ONCE = 16_384
_NUMBERS_AT_ONCE = 1 << 22
"""Of vectors that are gathered for some queries."""
_CANDIDATES, _CANDIDATES_A_NEIGHBOUR = 100, 4
"""Of product codes, which the vectors put in order."""
_QUIET = 100_000
"""Fewer vectors are indexed before anybody looks for a bar."""
_UNIT = 2e-3
"""How far a vector's length may be from 1 to count as normalised, float16's rounding included."""


def build(kind: Kind, vectors: Rows, probes: int = 0, k: int = 10) -> faiss.Index:
    """An index of vectors [N, D], kept in the numbers that they have; read a piece at a time.

    Args:
        vectors: float32 or float16; may be memory-mapped.
        probes: how much a query looks at: lists (no more than there are), or candidates in the graph. 0: a sixteenth
            of the lists, 16 at least; 128 candidates, or twice ``k``.
        k: how many neighbours will be asked for; the graph looks at so many candidates at least.
    """
    count, width = vectors.shape
    lists = max(1, round(2 * count**0.5))
    half = vectors.dtype == np.float16
    index: Any  # faiss's own types have none of these attributes in common
    if kind == "flat":
        index = faiss.index_factory(width, "SQfp16" if half else "Flat", faiss.METRIC_INNER_PRODUCT)
    elif kind == "hnsw":
        storage = "SQfp16" if half else "Flat"
        index = faiss.index_factory(width, f"HNSW{LINKS},{storage}", faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = _EF_CONSTRUCTION
        index.hnsw.efSearch = max(probes or max(128, 2 * k), k)
    elif kind == "ivf":
        # Lists by distance: by inner product the longest centres would take all.
        index = faiss.IndexIVFFlat(faiss.IndexFlatL2(width), width, lists, faiss.METRIC_INNER_PRODUCT)
    else:
        # Features of one network often share a large common part. Codes of what is left beside a list's centre do not
        # see it; codes of the vectors themselves, as inner products need them, see little else.
        by_distance = _have_length_one(vectors)
        metric = faiss.METRIC_L2 if by_distance else faiss.METRIC_INNER_PRODUCT
        index = faiss.index_factory(width, f"IVF{lists},PQ{_codes(width)}x4fs", metric)
        index.by_residual = by_distance
    if kind in ("ivf", "ivfpq"):
        index.nprobe = min(probes or max(16, lists // 16), lists)
        index.cp.niter = _PASSES_OF_K_MEANS
        index.cp.min_points_per_centroid = 1  # no warning on a handful of rows: recall tells
    if not index.is_trained:
        wanted = max(_VECTORS_A_LIST_TO_LEARN * lists, _LEAST_TO_LEARN)
        # Evenly spread: a source is often sorted by class.
        chosen = np.linspace(0, count - 1, min(count, wanted)).astype(np.int64)
        index.train(vectors[np.unique(chosen)].astype(np.float32))
    add_rows(index, vectors)
    return index


def add_rows(index: faiss.Index, vectors: Rows) -> None:
    """Put vectors [some, D] behind those that are there."""
    with progress_bar(len(vectors), "index", shown=len(vectors) >= _QUIET, unit="vec") as bar:
        for start in range(0, len(vectors), _ROWS_AT_ONCE):
            piece = np.ascontiguousarray(vectors[start : start + _ROWS_AT_ONCE], dtype=np.float32)
            index.add(piece)
            bar.update(len(piece))


@dataclass(frozen=True)
class WithVectors:
    """An index that :func:`build` built, and the vectors in it, for :func:`eval.search.search`."""

    index: faiss.Index
    vectors: Rows

    def search(self, queries: NDArray[np.float32], top: int) -> Found:
        """As :func:`search`."""
        return search(self.index, self.vectors, queries, top)


def search(index: faiss.Index, vectors: Rows, queries: NDArray[np.float32], top: int) -> Found:
    """The best ``top`` rows that the index finds; what product codes find is scored anew by the vectors themselves.

    Args:
        vectors: [N, D], those in the index; may be memory-mapped.
        queries: [Q, D] float32.
    """
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIVFPQFastScan):
        return _search_codes(index, vectors, queries, top)
    if isinstance(index, faiss.IndexHNSW):
        # Among fewer candidates than are asked for there are not so many neighbours.
        looked_at: Any = faiss.SearchParametersHNSW(efSearch=max(index.hnsw.efSearch, top))  # type: ignore[attr-defined]
        scores, rows = index.search(queries, top, params=looked_at)
    else:
        scores, rows = index.search(queries, top)
    return scores, rows


def _search_codes(index: faiss.Index, vectors: Rows, queries: NDArray[np.float32], top: int) -> Found:
    candidates = min(len(vectors), _CANDIDATES + _CANDIDATES_A_NEIGHBOUR * top)
    best = np.empty((len(queries), min(top, candidates)), dtype=np.float32)
    nearest = np.empty(best.shape, dtype=np.int64)
    for part in _parts(len(queries), candidates * vectors.shape[1]):
        _, rows = index.search(queries[part], candidates)
        found = vectors[np.maximum(rows, 0)].astype(np.float32, copy=False)  # [Q, candidates, D]
        scores = np.matmul(found, queries[part, :, None])[:, :, 0]
        scores[rows < 0] = np.finfo(np.float32).min  # as faiss scores what it did not find
        order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
        best[part], nearest[part] = (np.take_along_axis(what, order, axis=1) for what in (scores, rows))
    return best, nearest


def exact_search(vectors: Rows, queries: NDArray[np.float32], top: int) -> Found:
    """The best ``top`` of vectors [N, D] by inner product, without an index: in pieces, so that none is copied whole.

    Returns:
        Scores and row numbers, [Q, min(top, N)] each, best first.
    """
    top = min(top, len(vectors))
    best = np.empty((len(queries), 0), dtype=np.float32)
    rows = np.empty((len(queries), 0), dtype=np.int64)
    with progress_bar(len(vectors), "exact search", shown=len(vectors) >= _QUIET, unit="vec") as bar:
        for start in range(0, len(vectors), _ROWS_AT_ONCE):
            piece = np.ascontiguousarray(vectors[start : start + _ROWS_AT_ONCE], dtype=np.float32)
            scores, near = faiss.knn(queries, piece, min(top, len(piece)), metric=faiss.METRIC_INNER_PRODUCT)
            best, rows = np.concatenate([best, scores], axis=1), np.concatenate([rows, near + start], axis=1)
            order = np.argsort(-best, axis=1, kind="stable")[:, :top]
            best, rows = np.take_along_axis(best, order, axis=1), np.take_along_axis(rows, order, axis=1)
            bar.update(len(piece))
    return best, rows


def percent_found(
    vectors: Rows, queries: NDArray[np.float32], exact: NDArray[np.int64], found: NDArray[np.int64]
) -> float:
    """Recall: the share of each query's exact k nearest rows that were found, in the mean over the queries.

    Vectors as near as the k-th are as good as it: which of several copies is found says nothing of an index. Compared
    in float64, in which copies of one vector are equally near and nothing else is: cosines of a network's features may
    all lie within 1e-5 of each other.

    Args:
        queries: [Q, D].
        exact, found: rows, [Q, k] each; in ``found``, -1 where there was no more.
    """
    near = 0
    for part in _parts(len(queries), 2 * exact.shape[1] * vectors.shape[1]):
        wanted = _products(vectors, queries[part], exact[part]).min(axis=1, keepdims=True)
        reached = np.where(found[part] < 0, -np.inf, _products(vectors, queries[part], found[part]))
        near += int((reached >= wanted).sum())
    return 100.0 * near / found.size if found.size else float("nan")


def _products(vectors: Rows, queries: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Inner products of each query with its rows [Q, k]."""
    chosen = vectors[np.maximum(rows, 0)].astype(np.float64)
    products: NDArray[np.float64] = (chosen * queries[:, None, :].astype(np.float64)).sum(axis=2)
    return products


def _parts(queries: int, numbers: int) -> list[slice]:
    """All queries, so many at a time that ``numbers`` for each of them fit into memory."""
    at_once = max(1, _NUMBERS_AT_ONCE // max(1, numbers))
    return [slice(start, start + at_once) for start in range(0, queries, at_once)]


def _have_length_one(vectors: Rows) -> bool:
    """Whether a thousand of them, evenly spread, do; a vector of zeros has none."""
    some = vectors[np.linspace(0, len(vectors) - 1, min(len(vectors), 1000)).astype(np.int64)].astype(np.float32)
    length = np.linalg.norm(some, axis=1)
    return bool(((np.abs(length - 1) < _UNIT) | (length == 0)).all())


def _codes(width: int) -> int:
    """Codes a vector, half a byte each: the largest divisor of D that is at most D / 2."""
    return max(parts for parts in range(1, max(1, width // 2) + 1) if width % parts == 0)
