"""The faiss index of a collection: made, read back from a file that anybody may have written, described in its card.

N vectors, D features. :mod:`eval.faiss_index` knows how each kind is built and searched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
from numpy.typing import NDArray

from dino_xcit.errors import InputError
from eval.faiss_index import LINKS, build, exact_search, percent_found
from eval.faiss_index import add_rows as add_rows
from eval.faiss_index import search as search

IndexType = Literal["flat", "hnsw", "ivfpq"]
Rows = NDArray[np.float16] | NDArray[np.float32]

LEAST_IVFPQ = 1000
"""Vectors that the code words and the centres of the lists can be learned from."""
RECALL_AT = 10
_RECALL_QUERIES = 1000

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
        kind: see :mod:`eval.faiss_index`.

    Raises:
        InputError: too few vectors for ``ivfpq``.
    """
    if kind == "ivfpq" and len(vectors) < LEAST_IVFPQ:
        raise too_few_for_ivfpq(len(vectors))
    return build(kind, vectors)


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


def describe(index: Any, kind: IndexType, vectors: Rows) -> dict[str, Any]:
    """What goes into a card: the type, its parameters, and, unless it is exact, the recall measured here.

    Recall at k: the share of a vector's k nearest others that the index finds, in the mean over up to 1,000 vectors of
    the collection; vectors as near as the k-th are as good as it.
    """
    card: dict[str, Any] = {"type": kind, "exact": kind == "flat"}
    if kind == "hnsw":
        card["parameters"] = {
            "links": LINKS,
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
    return percent_found(vectors, queries, exact, found)


def _without_self(rows: NDArray[np.int64], own: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """The first k of rows [Q, k + 1] that are not the query's own."""
    own_last = np.argsort(rows == own[:, None], axis=1, kind="stable")[:, :k]
    return np.take_along_axis(rows, own_last, axis=1)
