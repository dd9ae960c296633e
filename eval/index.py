"""Vectors of length 1, and search among them: exact or by an approximate faiss index, and how much that misses.

N vectors, D features, Q queries. All indices compare inner products.

- ``flat``: every vector; exact.
- ``ivf``: vectors in lists around the centres of k-means, of which a query visits some; for vectors of length 1.
- ``hnsw``: vectors in a graph that a query walks along (Malkov and Yashunin, arXiv 1603.09320).
- ``ivfpq``: codes of about D / 4 bytes in such lists (Jégou, Douze and Schmid, TPAMI 2011), with 16 code words for two
  numbers, which take a hundredth of the time that 256 take to learn. The vectors themselves, which may stay in a file,
  reorder what the codes find.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import faiss
import numpy as np
from numpy.typing import NDArray

from dino_xcit.data.workers import usable_cores
from dino_xcit.errors import InputError
from dino_xcit.runtime import distributed
from dino_xcit.runtime.logging import progress_bar

Kind = Literal["flat", "ivf", "hnsw", "ivfpq"]
Found = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Inner products and row numbers, [Q, top] each, best first; row -1 where an approximate index found no more."""

LINKS = 32
"""Of a vector in the graph; 64 in its lowest layer."""
MIN_IVFPQ = 1000
"""Vectors of a collection that code words and list centres can be learned from."""
RECALL_AT = 10
_RECALL_QUERIES = 1000
_EF_CONSTRUCTION = 80
_KMEANS_PASSES = 10
_TRAINING_PER_LIST, _MIN_TRAINING = 64, 10_000
_ROWS_AT_ONCE = 16_384
_NUMBERS_AT_ONCE = 1 << 22
"""Of vectors that are gathered for some queries."""
_CANDIDATES, _CANDIDATES_PER_NEIGHBOUR = 100, 4
"""Of product codes, which the vectors reorder."""
_QUIET = 100_000
"""Fewer vectors are indexed without a progress bar."""
_UNIT = 2e-3
"""How far a vector's length may be from 1 to count as normalised, float16's rounding included."""
_CLASSES = {
    "flat": ("IndexFlat", "IndexFlatIP", "IndexScalarQuantizer"),
    "hnsw": ("IndexHNSWFlat", "IndexHNSWSQ"),
    "ivfpq": ("IndexIVFPQFastScan",),
}
"""faiss's classes of a collection's index, by its kind."""


# ---- vectors of length 1


def unit_rows(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length 1 in float32; a zero row stays zero. Needs 20 bytes a number of 16,384 rows besides the result.

    Args:
        features: [N, D]; may be memory-mapped.

    Raises:
        InputError: a feature is not a finite number.
    """
    found: NDArray[np.float32] = np.empty(features.shape, dtype=np.float32)
    for start in range(0, len(features), _ROWS_AT_ONCE):
        rows = np.ascontiguousarray(features[start : start + _ROWS_AT_ONCE], dtype=np.float32)
        found[start : start + _ROWS_AT_ONCE] = rows / _lengths(rows)[:, None]
    return found


def _lengths(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    lengths: NDArray[np.float64] = np.linalg.norm(rows.astype(np.float64), axis=1)
    if not np.isfinite(lengths).all():
        raise InputError(
            "the features are not finite numbers (NaN or infinite): the weights are damaged, or their training diverged"
        )
    return np.maximum(lengths, 1e-12)


class UnitRows:
    """Features [N, D] as rows of length 1 in float32, computed when they are asked for; a zero row stays zero.

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
            self._lengths[piece] = _lengths(features[piece])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """[*rows, D]."""
        found: NDArray[np.float32] = np.array(self._features[rows], dtype=np.float32)
        found /= self._lengths[rows][..., None]
        return found


Rows = NDArray[np.float16] | NDArray[np.float32] | UnitRows
"""Vectors [N, D], read a piece at a time."""


# ---- search


class Index(Protocol):
    """What can be searched: faiss's indices by inner product, and :class:`WithVectors`."""

    def search(self, queries: NDArray[np.float32], top: int, /) -> Found:
        """Inner products and row numbers, [Q, top] each, best first; row -1 where there is no more."""
        ...


def use_all_cores() -> None:
    """torchrun leaves a process one thread; the others of this machine wait while the main one searches."""
    if distributed.world_size() > 1:
        faiss.omp_set_num_threads(usable_cores())


def build_index(features: NDArray[np.float32]) -> faiss.IndexFlatIP:
    """An exact index of features [N, D] at length 1. It is the only copy of them (N x D x 4 bytes)."""
    use_all_cores()
    index = faiss.IndexFlatIP(features.shape[1])
    for start in range(0, len(features), _ROWS_AT_ONCE):
        index.add(unit_rows(features[start : start + _ROWS_AT_ONCE]))
    return index


def search(
    index: Index, queries: NDArray[np.float32], k: int, chunk: int = 1024, progress: bool = False
) -> Iterator[Found]:
    """Cosine similarities and row numbers, [chunk, k] each, best first, a chunk of queries at a time.

    An approximate index may find fewer than k: the places left over have row -1.
    """
    with progress_bar(len(queries), f"search, k = {k}", shown=progress) as bar:
        for start in range(0, len(queries), chunk):
            rows = unit_rows(queries[start : start + chunk])
            yield index.search(rows, k)
            bar.update(len(rows))


@dataclass(frozen=True)
class WithVectors:
    """An index that :func:`build` built, and the vectors in it."""

    index: faiss.Index
    vectors: Rows
    """[N, D]; may be memory-mapped."""

    def search(self, queries: NDArray[np.float32], top: int) -> Found:
        """The best ``top`` rows that the index finds for queries [Q, D]; the vectors score anew what codes find."""
        index = faiss.downcast_index(self.index)
        if isinstance(index, faiss.IndexIVFPQFastScan):
            return self._search_codes(index, queries, top)
        if isinstance(index, faiss.IndexHNSW):
            # Among fewer candidates than are asked for there are not so many neighbours.
            parameters: Any = faiss.SearchParametersHNSW(efSearch=max(index.hnsw.efSearch, top))  # type: ignore[attr-defined]
            found: Found = index.search(queries, top, params=parameters)
            return found
        return index.search(queries, top)

    def _search_codes(self, index: faiss.Index, queries: NDArray[np.float32], top: int) -> Found:
        candidates = min(len(self.vectors), _CANDIDATES + _CANDIDATES_PER_NEIGHBOUR * top)
        best = np.empty((len(queries), min(top, candidates)), dtype=np.float32)
        nearest = np.empty(best.shape, dtype=np.int64)
        for part in _parts(len(queries), candidates * self.vectors.shape[1]):
            _, rows = index.search(queries[part], candidates)
            found = self.vectors[np.maximum(rows, 0)].astype(np.float32, copy=False)  # [Q, candidates, D]
            scores = np.matmul(found, queries[part, :, None])[:, :, 0]
            scores[rows < 0] = np.finfo(np.float32).min  # as faiss scores what it did not find
            best[part], nearest[part] = _best(scores, rows, top)
        return best, nearest


def exact_search(vectors: Rows, queries: NDArray[np.float32], top: int) -> Found:
    """The best ``top`` of vectors [N, D] without an index, a piece at a time.

    Returns:
        Scores and row numbers, [Q, min(top, N)] each, best first.
    """
    use_all_cores()
    best = np.empty((len(queries), 0), dtype=np.float32)
    rows = np.empty((len(queries), 0), dtype=np.int64)
    for start in range(0, len(vectors), _ROWS_AT_ONCE):
        piece = np.ascontiguousarray(vectors[start : start + _ROWS_AT_ONCE], dtype=np.float32)
        scores, near = faiss.knn(queries, piece, min(top, len(piece)), metric=faiss.METRIC_INNER_PRODUCT)
        best, rows = _best(np.concatenate([best, scores], axis=1), np.concatenate([rows, near + start], axis=1), top)
    return best, rows


def _best(scores: NDArray[np.float32], rows: NDArray[np.int64], top: int) -> Found:
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def _parts(queries: int, numbers: int) -> list[slice]:
    """All queries, so many at a time that ``numbers`` for each of them fit into memory."""
    at_once = max(1, _NUMBERS_AT_ONCE // max(1, numbers))
    return [slice(start, start + at_once) for start in range(0, queries, at_once)]


# ---- indices of every kind


def build(kind: Kind, vectors: Rows, nprobe: int = 0, k: int = 10) -> faiss.Index:
    """An index of vectors [N, D], kept in the precision that they have; read a piece at a time.

    Args:
        vectors: float32 or float16; may be memory-mapped.
        nprobe: how much a query visits: lists (no more than there are), or candidates in the graph. 0: a sixteenth of
            the lists, 16 at least; 128 candidates, or twice ``k``.
        k: how many neighbours will be asked for; the graph considers so many candidates at least.
    """
    count, width = vectors.shape
    lists = max(1, round(2 * count**0.5))
    storage = "SQfp16" if vectors.dtype == np.float16 else "Flat"
    index: Any  # faiss's own types have none of these attributes in common
    if kind == "flat":
        index = faiss.index_factory(width, storage, faiss.METRIC_INNER_PRODUCT)
    elif kind == "hnsw":
        index = faiss.index_factory(width, f"HNSW{LINKS},{storage}", faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = _EF_CONSTRUCTION
        index.hnsw.efSearch = max(nprobe or max(128, 2 * k), k)
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
        index.nprobe = min(nprobe or max(16, lists // 16), lists)
        index.cp.niter = _KMEANS_PASSES
        index.cp.min_points_per_centroid = 1  # no warning on a handful of rows: recall tells
    if not index.is_trained:
        index.train(vectors[_spread(count, max(_TRAINING_PER_LIST * lists, _MIN_TRAINING))].astype(np.float32))
    add_rows(index, vectors)
    return index


def add_rows(index: faiss.Index, vectors: Rows) -> None:
    """Put vectors [some, D] behind those that are there."""
    with progress_bar(len(vectors), "index", shown=len(vectors) >= _QUIET, unit="vec") as bar:
        for start in range(0, len(vectors), _ROWS_AT_ONCE):
            piece = np.ascontiguousarray(vectors[start : start + _ROWS_AT_ONCE], dtype=np.float32)
            index.add(piece)
            bar.update(len(piece))


def read_index(path: Path, kind: str) -> faiss.Index:
    """An index of a collection, from a file that anybody may have made.

    Raises:
        ValueError: it is of another kind or metric.
        RuntimeError: faiss cannot read it.
    """
    # faiss's files may name further files. Those outside the folder are not opened, and none is opened for writing.
    index: Any = faiss.read_index(str(path), faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY)
    found = type(index).__name__
    if found not in _CLASSES[kind]:
        raise ValueError(f"its index is an {found}, expected that of index type {kind}")
    if kind == "hnsw" and type(faiss.downcast_index(index.storage)).__name__ not in _CLASSES["flat"]:
        raise ValueError("its index keeps vectors in another form")
    if index.metric_type != faiss.METRIC_INNER_PRODUCT and not (
        index.metric_type == faiss.METRIC_L2 and kind == "ivfpq"
    ):
        raise ValueError("its index compares by something else than inner products")
    return index


def _spread(count: int, wanted: int) -> NDArray[np.int64]:
    """Rows evenly spread over ``count``, at most ``wanted``: a source is often sorted by class."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(np.int64))


def _have_length_one(vectors: Rows) -> bool:
    """Whether a thousand of them do; a vector of zeros has none."""
    length = np.linalg.norm(vectors[_spread(len(vectors), 1000)].astype(np.float32), axis=1)
    return bool(((np.abs(length - 1) < _UNIT) | (length == 0)).all())


def _codes(width: int) -> int:
    """Codes a vector, half a byte each: the largest divisor of D that is at most D / 2."""
    return max(parts for parts in range(1, max(1, width // 2) + 1) if width % parts == 0)


# ---- what an index misses


def describe(index: Any, kind: Kind, vectors: Rows) -> dict[str, Any]:
    """A collection's index in its metadata: the type, its parameters, and, unless it is exact, the measured recall."""
    found: dict[str, Any] = {"type": kind, "exact": kind == "flat"}
    if kind == "hnsw":
        hnsw = index.hnsw
        found["parameters"] = {"links": LINKS, "ef_construction": hnsw.efConstruction, "ef_search": hnsw.efSearch}
    elif kind == "ivfpq":
        found["parameters"] = {"lists": index.nlist, "probes": index.nprobe, "bytes_a_vector": index.pq.code_size}
    if kind != "flat" and len(vectors) > 1:
        k, chosen = min(RECALL_AT, len(vectors) - 1), _spread(len(vectors), _RECALL_QUERIES)
        found["recall"] = {
            "at": k,
            "percent": round(recall(index, vectors, chosen, k), 2),
            "queries": len(chosen),
            "against": "exact search; vectors of the collection, each without itself",
        }
    return found


def recall(index: faiss.Index, vectors: Rows, chosen: NDArray[np.int64], k: int) -> float:
    """Percent of the k nearest others of the rows ``chosen`` that the index finds, see :func:`percent_found`."""
    queries = np.ascontiguousarray(vectors[chosen], dtype=np.float32)
    exact = without_self(exact_search(vectors, queries, k + 1)[1], chosen)
    found = without_self(WithVectors(index, vectors).search(queries, k + 1)[1], chosen)
    return percent_found(vectors, queries, exact, found)


def without_self(rows: NDArray[np.int64], own: NDArray[np.int64]) -> NDArray[np.int64]:
    """Neighbours [Q, k + 1] to [Q, k]: without the query's own row, or, where exact copies of it have pushed it out,
    without the last."""
    own_last = np.argsort(rows == own[:, None], axis=1, kind="stable")[:, :-1]
    return np.take_along_axis(rows, own_last, axis=1)


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
