"""The faiss index of a collection: exact, or one that looks at a part of the vectors and says how much it misses.

N vectors, D features, Q queries. All by inner product; the product codes of vectors of length 1 by distance, which is
the same order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
from numpy.typing import NDArray

from dino_xcit.console import progress_bar
from dino_xcit.errors import InputError

IndexType = Literal["flat", "hnsw", "ivfpq"]
Rows = NDArray[np.float16] | NDArray[np.float32]
Found = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Scores and row numbers, [Q, top] each, best first; row -1 where an approximate index found no more."""

LEAST_IVFPQ = 1000
"""Vectors that the code words and the centres of the lists can be learned from."""
RECALL_AT = 10
_RECALL_QUERIES = 1000

_LINKS, _EF_CONSTRUCTION, _EF_SEARCH = 32, 80, 128
_VECTORS_A_LIST_TO_LEARN, _LEAST_TO_LEARN = 64, 10_000
_ROWS_AT_ONCE = 16_384
_QUERIES_AT_ONCE = 256
_QUIET = 100_000
"""Fewer vectors are indexed before anybody looks for a bar."""
_UNIT = 2e-3
"""How far a vector's length may be from 1 to count as normalised, float16's rounding included."""
_CLASSES = {
    "flat": ("IndexFlat", "IndexFlatIP", "IndexScalarQuantizer"),
    "hnsw": ("IndexHNSWFlat", "IndexHNSWSQ"),
    "ivfpq": ("IndexIVFPQFastScan",),
}
"""Of faiss, by index type."""
_IN_MEMORY = ("ArrayInvertedLists", "BlockInvertedLists")


def build_index(kind: IndexType, vectors: Rows) -> faiss.Index:
    """An index of vectors [N, D], kept in the numbers that they have; read a piece at a time.

    Args:
        vectors: float32 or float16; may be memory-mapped.
        kind: ``flat``: all vectors, exact. ``hnsw``: all vectors in a graph (arXiv 1603.09320). ``ivfpq``: codes of
            about D / 4 bytes in lists (Jégou, Douze and Schmid, TPAMI 2011; 16 code words for two numbers, which take
            a hundredth of the time that 256 take to learn); what they find is put in order by the vectors themselves,
            see :func:`search`.

    Raises:
        InputError: too few vectors for ``ivfpq``.
    """
    count, width = vectors.shape
    index: Any
    half = vectors.dtype == np.float16
    if kind == "flat":
        index = faiss.index_factory(width, "SQfp16" if half else "Flat", faiss.METRIC_INNER_PRODUCT)
    elif kind == "hnsw":
        storage = "SQfp16" if half else "Flat"
        index = faiss.index_factory(width, f"HNSW{_LINKS},{storage}", faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = _EF_CONSTRUCTION, _EF_SEARCH
    else:
        if count < LEAST_IVFPQ:
            raise too_few_for_ivfpq(count)
        lists = round(2 * count**0.5)
        # Features of one network often share a large common part. Codes of what is left beside a list's centre do not
        # see it; codes of the vectors themselves, as inner products need them, see little else.
        by_distance = _have_length_one(vectors)
        metric = faiss.METRIC_L2 if by_distance else faiss.METRIC_INNER_PRODUCT
        index = faiss.index_factory(width, f"IVF{lists},PQ{_codes(width)}x4fs", metric)
        index.by_residual = by_distance
        index.cp.min_points_per_centroid = 1  # no warning: recall tells
        index.nprobe = max(16, lists // 16)
    if not index.is_trained:
        wanted = _VECTORS_A_LIST_TO_LEARN * round(2 * count**0.5)
        # Evenly spread: a source is often sorted by class.
        chosen = np.linspace(0, count - 1, min(count, max(wanted, _LEAST_TO_LEARN))).astype(np.int64)
        index.train(vectors[np.unique(chosen)].astype(np.float32))
    add_rows(index, vectors)
    return index


def read_index(path: Path, kind: str, vectors: Rows) -> faiss.Index:
    """What :func:`build_index` built of ``vectors``, from a file that anybody may have made.

    Raises:
        ValueError: it is of another kind, metric or size, or of other vectors.
        RuntimeError: faiss cannot read it.
    """
    # faiss's files may name further files. Those outside the folder are not opened, and none is opened for writing.
    flags = faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY
    index: Any = faiss.read_index(str(path), flags)  # of its own class, unlike in C++
    found = type(index).__name__
    if found not in _CLASSES.get(kind, ()):
        raise ValueError(f"its index is an {found}, expected that of index type {kind:.20}")
    inner = type(faiss.downcast_index(index.storage)).__name__ if kind == "hnsw" else None
    if inner and inner not in _CLASSES["flat"]:
        raise ValueError(f"its index keeps vectors in an {inner}")
    if kind == "ivfpq" and type(faiss.downcast_InvertedLists(index.invlists)).__name__ not in _IN_MEMORY:
        raise ValueError("its index keeps its lists in another file")
    by_distance = index.metric_type == faiss.METRIC_L2 and kind == "ivfpq"
    if index.metric_type != faiss.METRIC_INNER_PRODUCT and not by_distance:
        raise ValueError("its index compares by something else than inner products")
    if index.ntotal == len(vectors) and kind != "ivfpq":  # product codes are not the vectors, and only find candidates
        for row in {0, len(vectors) // 2, len(vectors) - 1} if len(vectors) else ():
            if not np.array_equal(index.reconstruct(row), vectors[row].astype(np.float32)):
                raise ValueError("its index holds other vectors")
    return index


def too_few_for_ivfpq(count: int) -> InputError:
    """The sentence for it."""
    return InputError(
        f"index_type is ivfpq, whose codes are learned from {LEAST_IVFPQ:,} images or more, found {count:,}: use "
        "--index-type flat or hnsw"
    )


def add_rows(index: faiss.Index, vectors: Rows) -> None:
    """Put vectors [some, D] behind those that are there."""
    with progress_bar(len(vectors), "index", shown=len(vectors) >= _QUIET, unit="vec") as bar:
        for start in range(0, len(vectors), _ROWS_AT_ONCE):
            piece = np.ascontiguousarray(vectors[start : start + _ROWS_AT_ONCE], dtype=np.float32)
            index.add(piece)
            bar.update(len(piece))


def search(index: faiss.Index, vectors: Rows, queries: NDArray[np.float32], top: int) -> Found:
    """The best ``top`` rows that the index finds; what product codes find is scored anew by the vectors themselves.

    Args:
        vectors: [N, D], those in the index; may be memory-mapped.
        queries: [Q, D] float32.
    """
    if not isinstance(faiss.downcast_index(index), faiss.IndexIVFPQFastScan):
        scores, rows = index.search(queries, top)
        return scores, rows
    parts = [
        _scored_anew(index, vectors, queries[start : start + _QUERIES_AT_ONCE], top)
        for start in range(0, len(queries), _QUERIES_AT_ONCE)
    ]
    if not parts:
        return np.empty((0, top), dtype=np.float32), np.empty((0, top), dtype=np.int64)
    return np.concatenate([scores for scores, _ in parts]), np.concatenate([rows for _, rows in parts])


def _scored_anew(index: faiss.Index, vectors: Rows, queries: NDArray[np.float32], top: int) -> Found:
    _, rows = index.search(queries, min(len(vectors), max(100, 10 * top)))
    found = vectors[np.maximum(rows, 0)].astype(np.float32)  # [Q, candidates, D]
    scores = np.matmul(found, queries[:, :, None])[:, :, 0]
    scores[rows < 0] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def describe(index: Any, kind: IndexType, vectors: Rows) -> dict[str, Any]:
    """What goes into a card: the type, its parameters, and, unless it is exact, the recall measured here.

    Recall at k: the share of a vector's k nearest others that the index finds, in the mean over up to 1,000 vectors of
    the collection; vectors as near as the k-th are as good as it.
    """
    card: dict[str, Any] = {"type": kind, "exact": kind == "flat"}
    if kind == "hnsw":
        card["parameters"] = {
            "links": _LINKS,
            "ef_construction": index.hnsw.efConstruction,
            "ef_search": index.hnsw.efSearch,
        }
    elif kind == "ivfpq":
        card["parameters"] = {"lists": index.nlist, "probes": index.nprobe, "bytes_a_vector": index.pq.code_size}
    if kind != "flat" and len(vectors) > 1:
        k = min(RECALL_AT, len(vectors) - 1)
        chosen = np.unique(np.linspace(0, len(vectors) - 1, min(len(vectors), _RECALL_QUERIES)).astype(np.int64))
        card["recall"] = {
            "at": k,
            "percent": round(recall(index, vectors, chosen, k), 2),
            "queries": len(chosen),
            "against": "exact search; vectors of the collection, each without itself",
        }
    return card


def recall(index: faiss.Index, vectors: Rows, chosen: NDArray[np.int64], k: int) -> float:
    """Percent, see :func:`describe`; ``chosen``: the rows that are searched with."""
    queries = np.ascontiguousarray(vectors[chosen], dtype=np.float32)
    exact = _without_self(exact_search(vectors, queries, k + 1)[1], chosen, k)
    found = _without_self(search(index, vectors, queries, k + 1)[1], chosen, k)
    # In float64, in which copies of one vector are equally near and nothing else is: cosines of a network's features
    # may all lie within 1e-5 of each other.
    wanted = _products(vectors, queries, exact).min(axis=1, keepdims=True)
    reached = np.where(found < 0, -np.inf, _products(vectors, queries, found))
    return 100.0 * float((reached >= wanted).mean())


def _products(vectors: Rows, queries: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Inner products of each query with its rows [Q, k]."""
    chosen = vectors[np.maximum(rows, 0)].astype(np.float64)
    products: NDArray[np.float64] = (chosen * queries[:, None, :].astype(np.float64)).sum(axis=2)
    return products


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


def _without_self(rows: NDArray[np.int64], own: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """The first k of rows [Q, k + 1] that are not the query's own."""
    own_last = np.argsort(rows == own[:, None], axis=1, kind="stable")[:, :k]
    return np.take_along_axis(rows, own_last, axis=1)


def _have_length_one(vectors: Rows) -> bool:
    """Whether a thousand of them, evenly spread, do."""
    some = vectors[np.linspace(0, len(vectors) - 1, min(len(vectors), 1000)).astype(np.int64)].astype(np.float32)
    return bool((np.abs(np.linalg.norm(some, axis=1) - 1) < _UNIT).all())


def _codes(width: int) -> int:
    """Codes a vector, half a byte each: the largest divisor of D that is at most D / 2."""
    return max(parts for parts in range(1, max(1, width // 2) + 1) if width % parts == 0)
