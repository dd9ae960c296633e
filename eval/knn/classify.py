"""Weighted k-NN classification (DINO's protocol) by exact faiss search or by an approximate index.

N training images, D features, k neighbours, T temperature, C classes. :mod:`eval.search_index` builds the indices.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import faiss
import numpy as np
from numpy.typing import NDArray

from dino_xcit.errors import InputError
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import counted
from eval import search_index
from eval.search_index import DeviceIndex, build_index, exact_search, l2_normalised, search

T = TypeVar("T")
Rows = NDArray[np.float32]
Predictions = dict[tuple[int, float], NDArray[np.int64]]
"""Predicted labels [test images, min(5, C)], best first, by (k, T)."""
Kind = Literal["ivf", "hnsw"]

RECALL_QUERIES = 1000
"""Number of queries on which recall is measured."""
MIN_TO_APPROXIMATE = 1000
"""Minimum number of training images; below it the exact search takes milliseconds."""
_TOP = 5


def clamp_ks(ks: Sequence[int], rows: int) -> tuple[list[int], str]:
    """Clamp ``ks`` to ``rows`` training images.

    Returns:
        The ks, ascending, and a notice if any was clamped.

    Raises:
        InputError: a k is below 1, or there are no training images.
    """
    if rows == 0:
        raise InputError("found no training images, expected 1 or more")
    if not ks or min(ks) < 1:
        raise InputError(f"k is {min(ks) if ks else 'missing'}, expected 1 or more, such as 10 20 100 200")
    too_large = ", ".join(str(k) for k in sorted(set(ks)) if k > rows)
    notice = f"k = {too_large} exceeds the {rows} training images: using {rows}" if too_large else ""
    return sorted({min(k, rows) for k in ks}), notice


def knn_predict(
    train_features: Rows,
    train_labels: NDArray[np.int64] | None,
    test_features: Rows,
    ks: Sequence[int],
    temperatures: Sequence[float],
    progress: bool = False,
    index: faiss.Index | DeviceIndex | None = None,
) -> Predictions:
    """Classify by votes of the k nearest training images, each with weight exp(cosine similarity / T).

    One search with the largest k serves every k and T. The C classes are those of the training labels.

    Args:
        train_features: [N, D], normalised or not; may be memory-mapped.
        train_labels: [N], integers.
        test_features: [test images, D]; may be memory-mapped.
        ks: numbers of neighbours; clamped to N.
        temperatures: 0 < T < infinity; 0.07 is usual.
        progress: show a progress bar.
        index: index of the unit-length rows of ``train_features``, as from :func:`approximate_index`. Default: exact.

    Returns:
        {(k, T): [test images, min(5, C)]}, best first. Classes without votes follow in ascending order.

    Raises:
        InputError: labels are missing or of another length, D differs, features are not finite, or a k or T is out of
            bounds.
    """
    if train_labels is None or len(train_labels) != len(train_features):
        count = 0 if train_labels is None else len(train_labels)
        raise InputError(f"{len(train_features)} training features but {count} labels")
    if train_features.ndim != 2 or test_features.ndim != 2 or train_features.shape[1] != test_features.shape[1]:
        raise InputError(f"features of shapes {train_features.shape} and {test_features.shape} cannot be compared")
    for temperature in temperatures:
        if not 0 < temperature < float("inf"):
            raise InputError(f"temperature is {temperature}, expected more than 0, such as 0.07")
    usable, _ = clamp_ks(ks, len(train_features))
    # Count votes by position among the classes: labels may have gaps.
    classes, position = np.unique(np.asarray(train_labels, dtype=np.int64), return_inverse=True)
    pairs = [(k, temperature) for k in usable for temperature in dict.fromkeys(temperatures)]
    found = {pair: [np.empty((0, min(_TOP, len(classes))), dtype=np.int64)] for pair in pairs}
    index = build_index(train_features) if index is None else index
    for similarities, rows in search(index, test_features, usable[-1], progress=progress):
        cells = position[rows] + np.arange(len(rows))[:, None] * len(classes)
        for temperature in dict.fromkeys(temperatures):
            # Subtract the largest similarity so that exp does not overflow; the ranking of the votes is unaffected.
            with np.errstate(over="ignore"):  # for a tiny T: exp(-inf) = 0 is correct
                weights = np.exp((similarities - similarities[:, :1]).astype(np.float64) / temperature)
            weights[rows < 0] = 0.0
            votes = np.zeros(len(rows) * len(classes))
            for start, k in zip([0, *usable[:-1]], usable, strict=True):
                votes += np.bincount(cells[:, start:k].ravel(), weights[:, start:k].ravel(), len(votes))
                found[k, temperature].append(classes[_best(votes.reshape(len(rows), -1))])
    joined = {pair: np.concatenate(parts) for pair, parts in found.items()}
    return {(k, t): joined[min(k, len(train_features)), t] for k in ks for t in temperatures}


def _best(votes: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the columns of the largest votes, [queries, min(5, C)], best first, ties by lower column.

    With a thousand classes, five passes are much faster than sorting.
    """
    left, queries = votes.copy(), np.arange(len(votes))
    columns: NDArray[np.int64] = np.empty((len(left), min(_TOP, left.shape[1])), dtype=np.int64)
    for place in range(columns.shape[1]):
        columns[:, place] = left.argmax(axis=1)
        left[queries, columns[:, place]] = -1.0
    return columns


def refuse_few(kind: Kind, rows: int) -> None:
    """Raise InputError if there are too few training images for an approximate index."""
    if rows < MIN_TO_APPROXIMATE:
        raise InputError(
            f"approximate is {kind}, but found only {rows} training images, expected {MIN_TO_APPROXIMATE:,} or more: "
            "omit --approximate"
        )


def approximate_index(
    features: Rows, queries: Rows, kind: Kind, ks: Sequence[int], probes: int = 0, seed: int = 0
) -> tuple[faiss.Index, dict[str, Any]]:
    """Build an approximate index and measure its recall on a sample of the queries.

    Memory: the unit-length features and the index, N x D x 4 bytes each.

    Args:
        features: [N, D], normalised or not; may be memory-mapped.
        queries: [test images, D]; recall is measured on at most :data:`RECALL_QUERIES` of them.
        ks: numbers of neighbours for recall@k, each from 1 to N.
        probes: lists (``ivf``) or candidates (``hnsw``, at least the largest k) visited per query; 0: chosen by
            :func:`eval.search_index.build`.
        seed: seed of the sample of queries.

    Returns:
        The index and a record for the result file: ``index`` (faiss factory string), ``probes`` (number used),
        ``vector_bytes`` (without links and row numbers), ``recall_percent`` by k over ``recall_queries``,
        ``queries_with_fewer_than_k`` neighbours at the largest k, ``build_seconds``, and ``speedup`` over exact search.

    Raises:
        InputError: features are not finite.
    """
    vectors, most = l2_normalised(features), max(ks)
    sampled = np.random.default_rng([seed, 2]).permutation(len(queries))[:RECALL_QUERIES]
    sample = l2_normalised(queries[np.sort(sampled)])
    (_, exact), exact_seconds = _timed(lambda: exact_search(vectors, sample, most))
    index: Any
    index, build_seconds = _timed(lambda: search_index.build(kind, vectors, probes, most))
    (_, found), seconds = _timed(lambda: index.search(sample, most))
    graph = kind == "hnsw"
    name = f"HNSW{search_index.LINKS},Flat" if graph else f"IVF{index.nlist},Flat"
    used = index.hnsw.efSearch if graph else index.nprobe
    record = {
        "index": name, "probes": used, "vector_bytes": vectors.nbytes,
        "recall_percent": {str(k): search_index.percent_found(vectors, sample, exact[:, :k], found[:, :k]) for k in ks},
        "recall_queries": len(sample), "queries_with_fewer_than_k": int((found < 0).any(axis=1).sum()),
        "build_seconds": round(build_seconds, 2), "speedup": round(exact_seconds / seconds, 2),
    }  # fmt: skip
    recalls = ", ".join(f"{value}% for k = {k}" for k, value in record["recall_percent"].items())
    log.info(
        f"approximate search: {name} with {counted(used, 'probe')}, {record['speedup']} times as fast as exact search; "
        f"recall {recalls} ({len(sample)} queries)"
    )
    if probes not in (0, used):
        log.warning(f"probes is {probes}, but this index uses {used}")
    if record["queries_with_fewer_than_k"]:
        log.warning(f"some queries found fewer than {most} neighbours: raise --probes or give smaller --ks")
    return index, record


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    """Return the result of a call and its time in seconds."""
    started = time.perf_counter()
    return call(), time.perf_counter() - started
