"""Unit vectors, exact and approximate search with faiss, and the recall of approximate indices.

N vectors, D features, Q queries. All indices compare inner products.

- ``flat``: exact search.
- ``ivf``: inverted lists of k-means clusters, of which a query visits some; for unit vectors.
- ``hnsw``: hierarchical navigable small world graph (Malkov and Yashunin, arXiv 1603.09320).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from dino_xcit.data.source import evenly_spaced
from dino_xcit.data.workers import usable_cores
from dino_xcit.errors import InputError
from dino_xcit.runtime import distributed
from dino_xcit.runtime.logging import progress_bar

Kind = Literal["flat", "ivf", "hnsw"]
Found = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Inner products and row numbers, [Q, top] each, best first; row -1 if an approximate index found fewer."""

LINKS = 32
"""HNSW links per vector; 64 in the lowest layer."""
RECALL_AT = 10
_RECALL_QUERIES = 1000
_EF_CONSTRUCTION = 80
_KMEANS_PASSES = 10
_TRAINING_PER_LIST, _MIN_TRAINING = 64, 10_000
_ROWS_AT_ONCE = 16_384
_NUMBERS_AT_ONCE = 1 << 22
"""Maximum number of elements of the vectors gathered for a chunk of queries."""
_MIN_FOR_BAR = 100_000
"""Minimum number of vectors for a progress bar."""
_FLAT = ("IndexFlat", "IndexFlatIP", "IndexScalarQuantizer")
_CLASSES = {"flat": _FLAT, "hnsw": ("IndexHNSWFlat", "IndexHNSWSQ")}
"""Accepted faiss classes for the index of a collection, by kind."""


# ---- unit vectors


def l2_normalised(features: NDArray[np.float32]) -> NDArray[np.float32]:
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
        lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
        if not np.isfinite(lengths).all():
            raise InputError(
                "the features are not finite (NaN or infinite): the weights are damaged or their training diverged"
            )
        found[start : start + _ROWS_AT_ONCE] = rows / np.maximum(lengths, 1e-12)
    return found


Rows = NDArray[np.float16] | NDArray[np.float32]
"""Vectors [N, D]; may be memory-mapped."""


# ---- search


def use_cores(searching: int = 1) -> None:
    """Share the cores among the ranks of this machine that search; torchrun sets one thread per rank."""
    if distributed.world_size() > 1:
        faiss.omp_set_num_threads(max(1, usable_cores() // searching))


class DeviceIndex:
    """Exact search on a GPU, with the interface of a faiss index."""

    def __init__(self, features: NDArray[np.float32], device: torch.device) -> None:
        """Copy the L2-normalised rows of features [N, D] to the device."""
        self._rows = torch.from_numpy(l2_normalised(features)).to(device)

    def search(self, queries: NDArray[np.float32], top: int) -> Found:
        """Return inner products and row numbers, [Q, min(top, N)] each, best first; float32 without TF32."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            products = torch.from_numpy(queries).to(self._rows.device) @ self._rows.T
        finally:
            torch.set_float32_matmul_precision(before)
        scores, rows = products.topk(min(top, len(self._rows)))
        return scores.cpu().numpy(), rows.cpu().numpy()


def build_index(features: NDArray[np.float32], searching: int = 1) -> faiss.IndexFlatIP:
    """Build an exact index of the L2-normalised rows of features [N, D], which takes N x D x 4 bytes.

    Args:
        searching: number of ranks of this machine that search at the same time.
    """
    use_cores(searching)
    index = faiss.IndexFlatIP(features.shape[1])
    for start in range(0, len(features), _ROWS_AT_ONCE):
        index.add(l2_normalised(features[start : start + _ROWS_AT_ONCE]))
    return index


def search(
    index: faiss.Index | DeviceIndex, queries: NDArray[np.float32], k: int, chunk: int = 1024, progress: bool = False
) -> Iterator[Found]:
    """Yield cosine similarities and row numbers, [chunk, k] each, best first, for each chunk of queries.

    Row -1 marks missing neighbours of an approximate index.
    """
    with progress_bar(len(queries), f"search, k = {k}", shown=progress) as bar:
        for start in range(0, len(queries), chunk):
            rows = l2_normalised(queries[start : start + chunk])
            yield index.search(rows, k)
            bar.update(len(rows))


def exact_search(vectors: Rows, queries: NDArray[np.float32], top: int) -> Found:
    """Search the best ``top`` of vectors [N, D] without an index, in chunks.

    Returns:
        Scores and row numbers, [Q, min(top, N)] each, best first.
    """
    use_cores()
    heap: Any = faiss.ResultHeap(len(queries), min(top, len(vectors)), keep_max=True)  # type: ignore[attr-defined]
    for start in range(0, len(vectors), _ROWS_AT_ONCE):
        piece = np.ascontiguousarray(vectors[start : start + _ROWS_AT_ONCE], dtype=np.float32)
        scores, near = faiss.knn(queries, piece, min(top, len(piece)), metric=faiss.METRIC_INNER_PRODUCT)
        heap.add_result(scores, near + start)
    heap.finalize()
    return heap.D, heap.I


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
    else:
        # Assign to lists by distance: by inner product the longest centroids would attract all vectors.
        index = faiss.IndexIVFFlat(faiss.IndexFlatL2(width), width, lists, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = min(nprobe or max(16, lists // 16), lists)
        index.cp.niter = _KMEANS_PASSES
        index.cp.min_points_per_centroid = 1  # no warning for few vectors: recall is measured
        index.train(vectors[evenly_spaced(count, max(_TRAINING_PER_LIST * lists, _MIN_TRAINING))].astype(np.float32))
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
    if kind == "hnsw" and type(faiss.downcast_index(index.storage)).__name__ not in _FLAT:
        raise ValueError("its index stores vectors in an unsupported form")
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ValueError("its index has an unsupported metric, expected inner products")
    return index


# ---- recall


def describe(index: Any, kind: Kind, vectors: Rows) -> dict[str, Any]:
    """Describe an index in metadata: type, parameters, and the measured recall of an approximate index."""
    found: dict[str, Any] = {"type": kind, "exact": kind == "flat"}
    if kind == "hnsw":
        hnsw = index.hnsw
        found["parameters"] = {"links": LINKS, "ef_construction": hnsw.efConstruction, "ef_search": hnsw.efSearch}
    if kind == "hnsw" and len(vectors) > 1:
        k, chosen = min(RECALL_AT, len(vectors) - 1), np.array(evenly_spaced(len(vectors), _RECALL_QUERIES))
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
    found = without_self(index.search(queries, k + 1)[1], chosen)
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
    near, at_once = 0, max(1, _NUMBERS_AT_ONCE // max(1, 2 * exact.shape[1] * vectors.shape[1]))
    for start in range(0, len(queries), at_once):
        part = slice(start, start + at_once)
        wanted = _products(vectors, queries[part], exact[part]).min(axis=1, keepdims=True)
        reached = np.where(found[part] < 0, -np.inf, _products(vectors, queries[part], found[part]))
        near += int((reached >= wanted).sum())
    return 100.0 * near / found.size if found.size else float("nan")


def _products(vectors: Rows, queries: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Compute the inner products of each query with its rows [Q, k]."""
    chosen = vectors[np.maximum(rows, 0)].astype(np.float64)
    products: NDArray[np.float64] = (chosen * queries[:, None, :].astype(np.float64)).sum(axis=2)
    return products
