"""Unit vectors, exact and approximate search with faiss, and the recall of approximate indices.

N vectors, D features, Q queries. All indices compare inner products.

- ``flat``: exact search.
- ``ivf``: inverted lists of k-means clusters, of which a query visits some; for unit vectors.
- ``hnsw``: hierarchical navigable small world graph (Malkov and Yashunin, arXiv 1603.09320).
- ``ivfpq``: inverted lists of product-quantised codes of about D / 4 bytes (Jégou, Douze and Schmid, TPAMI 2011), with
  16 code words for two dimensions, which take a hundredth of the training time of 256. The results are re-ranked with
  the vectors, which may be memory-mapped.
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
"""Inner products and row numbers, [Q, top] each, best first; row -1 if an approximate index found fewer."""

LINKS = 32
"""HNSW links per vector; 64 in the lowest layer."""
MIN_IVFPQ = 1000
"""Minimum number of vectors for ``ivfpq``."""
RECALL_AT = 10
_RECALL_QUERIES = 1000
_EF_CONSTRUCTION = 80
_KMEANS_PASSES = 10
_TRAINING_PER_LIST, _MIN_TRAINING = 64, 10_000
_ROWS_AT_ONCE = 16_384
_NUMBERS_AT_ONCE = 1 << 22
"""Maximum number of elements of the vectors gathered for a chunk of queries."""
_CANDIDATES, _CANDIDATES_PER_NEIGHBOUR = 100, 4
"""Number of ``ivfpq`` candidates to re-rank: a constant plus a multiple of the number of neighbours."""
_MIN_FOR_BAR = 100_000
"""Minimum number of vectors for a progress bar."""
_UNIT_TOLERANCE = 2e-3
"""Maximum difference of a unit vector's length from 1, including float16 rounding."""
_CLASSES = {
    "flat": ("IndexFlat", "IndexFlatIP", "IndexScalarQuantizer"),
    "hnsw": ("IndexHNSWFlat", "IndexHNSWSQ"),
    "ivfpq": ("IndexIVFPQFastScan",),
}
"""Accepted faiss classes for the index of a collection, by kind."""


# ---- unit vectors


def unit_rows(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Normalise rows to unit length in float32; zero rows stay zero.

    Memory beyond the result: 20 bytes per element of 16,384 rows.

    Args:
        features: [N, D]; may be memory-mapped.

    Raises:
        InputError: a feature is not finite.
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
            "the features are not finite (NaN or infinite): the weights are damaged or their training diverged"
        )
    return np.maximum(lengths, 1e-12)


class UnitRows:
    """Lazy view of features [N, D], possibly memory-mapped, as unit rows in float32; zero rows stay zero."""

    dtype = np.dtype(np.float32)

    def __init__(self, features: NDArray[np.float32]) -> None:
        """Compute the lengths of the rows.

        Raises:
            InputError: a feature is not finite.
        """
        self._features, self.shape = features, (len(features), features.shape[1])
        self._lengths: NDArray[np.float32] = np.empty(len(features), dtype=np.float32)
        for start in range(0, len(features), _ROWS_AT_ONCE):
            piece = slice(start, start + _ROWS_AT_ONCE)
            self._lengths[piece] = _lengths(features[piece])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """Return unit rows [*rows, D]."""
        found: NDArray[np.float32] = np.array(self._features[rows], dtype=np.float32)
        found /= self._lengths[rows][..., None]
        return found


Rows = NDArray[np.float16] | NDArray[np.float32] | UnitRows
"""Vectors [N, D], read in chunks."""


# ---- search


class Index(Protocol):
    """A searchable index: faiss indices by inner product and :class:`WithVectors`."""

    def search(self, queries: NDArray[np.float32], top: int, /) -> Found:
        """Return inner products and row numbers, [Q, top] each, best first; row -1 if fewer were found."""
        ...


def use_all_cores() -> None:
    """Let rank 0 search with all cores while other ranks wait; torchrun sets one thread per rank."""
    if distributed.world_size() > 1:
        faiss.omp_set_num_threads(usable_cores())


def build_index(features: NDArray[np.float32]) -> faiss.IndexFlatIP:
    """Build an exact index of the unit rows of features [N, D], which takes N x D x 4 bytes."""
    use_all_cores()
    index = faiss.IndexFlatIP(features.shape[1])
    for start in range(0, len(features), _ROWS_AT_ONCE):
        index.add(unit_rows(features[start : start + _ROWS_AT_ONCE]))
    return index


def search(
    index: Index, queries: NDArray[np.float32], k: int, chunk: int = 1024, progress: bool = False
) -> Iterator[Found]:
    """Yield cosine similarities and row numbers, [chunk, k] each, best first, for each chunk of queries.

    Row -1 marks missing neighbours of an approximate index.
    """
    with progress_bar(len(queries), f"search, k = {k}", shown=progress) as bar:
        for start in range(0, len(queries), chunk):
            rows = unit_rows(queries[start : start + chunk])
            yield index.search(rows, k)
            bar.update(len(rows))


@dataclass(frozen=True)
class WithVectors:
    """An index from :func:`build` with its vectors."""

    index: faiss.Index
    vectors: Rows
    """[N, D]; may be memory-mapped."""

    def search(self, queries: NDArray[np.float32], top: int) -> Found:
        """Search the best ``top`` rows for queries [Q, D]; candidates of codes are re-ranked with the vectors."""
        index = faiss.downcast_index(self.index)
        if isinstance(index, faiss.IndexIVFPQFastScan):
            return self._search_codes(index, queries, top)
        if isinstance(index, faiss.IndexHNSW):
            # top neighbours need at least as many candidates.
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
            scores[rows < 0] = np.finfo(np.float32).min  # faiss's score of missing neighbours
            best[part], nearest[part] = _best(scores, rows, top)
        return best, nearest


def exact_search(vectors: Rows, queries: NDArray[np.float32], top: int) -> Found:
    """Search the best ``top`` of vectors [N, D] without an index, in chunks.

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
    """Split queries into chunks such that ``numbers`` elements per query fit into memory."""
    at_once = max(1, _NUMBERS_AT_ONCE // max(1, numbers))
    return [slice(start, start + at_once) for start in range(0, queries, at_once)]


# ---- indices of every kind


def build(kind: Kind, vectors: Rows, nprobe: int = 0, k: int = 10) -> faiss.Index:
    """Build an index of vectors [N, D] in their precision, reading them in chunks.

    Args:
        vectors: float32 or float16; may be memory-mapped.
        nprobe: lists (at most all) or graph candidates visited per query. 0: a sixteenth of the lists but at least 16;
            the larger of 128 and 2 ``k`` candidates.
        k: largest number of neighbours in later searches, the minimum number of graph candidates.
    """
    count, width = vectors.shape
    lists = max(1, round(2 * count**0.5))
    storage = "SQfp16" if vectors.dtype == np.float16 else "Flat"
    index: Any  # faiss types share no attributes
    if kind == "flat":
        index = faiss.index_factory(width, storage, faiss.METRIC_INNER_PRODUCT)
    elif kind == "hnsw":
        index = faiss.index_factory(width, f"HNSW{LINKS},{storage}", faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = _EF_CONSTRUCTION
        index.hnsw.efSearch = max(nprobe or max(128, 2 * k), k)
    elif kind == "ivf":
        # Assign to lists by distance: by inner product the longest centroids would attract all vectors.
        index = faiss.IndexIVFFlat(faiss.IndexFlatL2(width), width, lists, faiss.METRIC_INNER_PRODUCT)
    else:
        # Features of a network often share a large common component. Residuals to the centroids, which need the L2
        # metric and therefore unit vectors, remove it before quantisation.
        by_distance = _are_unit(vectors)
        metric = faiss.METRIC_L2 if by_distance else faiss.METRIC_INNER_PRODUCT
        index = faiss.index_factory(width, f"IVF{lists},PQ{_codes(width)}x4fs", metric)
        index.by_residual = by_distance
    if kind in ("ivf", "ivfpq"):
        index.nprobe = min(nprobe or max(16, lists // 16), lists)
        index.cp.niter = _KMEANS_PASSES
        index.cp.min_points_per_centroid = 1  # no warning for few vectors: recall is measured
    if not index.is_trained:
        index.train(vectors[_spread(count, max(_TRAINING_PER_LIST * lists, _MIN_TRAINING))].astype(np.float32))
    add_rows(index, vectors)
    return index


def add_rows(index: faiss.Index, vectors: Rows) -> None:
    """Append vectors [n, D] to an index."""
    with progress_bar(len(vectors), "index", shown=len(vectors) >= _MIN_FOR_BAR, unit="vec") as bar:
        for start in range(0, len(vectors), _ROWS_AT_ONCE):
            piece = np.ascontiguousarray(vectors[start : start + _ROWS_AT_ONCE], dtype=np.float32)
            index.add(piece)
            bar.update(len(piece))


def read_index(path: Path, kind: str) -> faiss.Index:
    """Read the index of a collection from an untrusted file.

    Raises:
        ValueError: the index is of another kind or metric.
        RuntimeError: faiss cannot read the file.
    """
    # Index files may reference other files: open none outside the folder and none for writing.
    index: Any = faiss.read_index(str(path), faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY)
    found = type(index).__name__
    if found not in _CLASSES[kind]:
        raise ValueError(f"its index is an {found}, expected one of index type {kind}")
    if kind == "hnsw" and type(faiss.downcast_index(index.storage)).__name__ not in _CLASSES["flat"]:
        raise ValueError("its index stores vectors in an unsupported form")
    if index.metric_type != faiss.METRIC_INNER_PRODUCT and not (
        index.metric_type == faiss.METRIC_L2 and kind == "ivfpq"
    ):
        raise ValueError("its index has an unsupported metric, expected inner products")
    return index


def _spread(count: int, wanted: int) -> NDArray[np.int64]:
    """Return at most ``wanted`` rows evenly spread over ``count``, as sources are often sorted by class."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(np.int64))


def _are_unit(vectors: Rows) -> bool:
    """Return whether a sample of 1,000 vectors has unit or zero length."""
    length = np.linalg.norm(vectors[_spread(len(vectors), 1000)].astype(np.float32), axis=1)
    return bool(((np.abs(length - 1) < _UNIT_TOLERANCE) | (length == 0)).all())


def _codes(width: int) -> int:
    """Return the number of 4-bit codes per vector: the largest divisor of D up to D / 2."""
    return max(parts for parts in range(1, max(1, width // 2) + 1) if width % parts == 0)


# ---- recall


def describe(index: Any, kind: Kind, vectors: Rows) -> dict[str, Any]:
    """Describe an index in metadata: type, parameters, and the measured recall of an approximate index."""
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
    """Measure the recall in percent of the k nearest neighbours of rows ``chosen``, see :func:`percent_found`."""
    queries = np.ascontiguousarray(vectors[chosen], dtype=np.float32)
    exact = without_self(exact_search(vectors, queries, k + 1)[1], chosen)
    found = without_self(WithVectors(index, vectors).search(queries, k + 1)[1], chosen)
    return percent_found(vectors, queries, exact, found)


def without_self(rows: NDArray[np.int64], own: NDArray[np.int64]) -> NDArray[np.int64]:
    """Reduce neighbours [Q, k + 1] to [Q, k]: remove the query's own row, or the last one if copies displaced it."""
    own_last = np.argsort(rows == own[:, None], axis=1, kind="stable")[:, :-1]
    return np.take_along_axis(rows, own_last, axis=1)


def percent_found(
    vectors: Rows, queries: NDArray[np.float32], exact: NDArray[np.int64], found: NDArray[np.int64]
) -> float:
    """Compute recall in percent: the share of each query's k exact nearest rows that were found, averaged over queries.

    Vectors as near as the k-th count as found, so that copies are interchangeable. Comparisons use float64, as cosines
    of a network's features may differ by less than 1e-5.

    Args:
        queries: [Q, D].
        exact, found: rows, [Q, k] each; in ``found``, -1 marks missing rows.
    """
    near = 0
    for part in _parts(len(queries), 2 * exact.shape[1] * vectors.shape[1]):
        wanted = _products(vectors, queries[part], exact[part]).min(axis=1, keepdims=True)
        reached = np.where(found[part] < 0, -np.inf, _products(vectors, queries[part], found[part]))
        near += int((reached >= wanted).sum())
    return 100.0 * near / found.size if found.size else float("nan")


def _products(vectors: Rows, queries: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Compute the inner products of each query with its rows [Q, k]."""
    chosen = vectors[np.maximum(rows, 0)].astype(np.float64)
    products: NDArray[np.float64] = (chosen * queries[:, None, :].astype(np.float64)).sum(axis=2)
    return products
