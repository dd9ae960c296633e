"""Weighted k-NN classification (DINO's protocol), by exact faiss search or an approximate index of measured recall.

N training images, D features, k neighbours, T temperature, C classes. :mod:`eval.index` builds the indices.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dino_xcit.errors import InputError
from dino_xcit.runtime import logging as log
from eval import index as faiss_index
from eval.index import Index, UnitRows, WithVectors, build_index, search

Rows = NDArray[np.float32]
Predictions = dict[tuple[int, float], NDArray[np.int64]]
"""(k, T) to the predicted labels [test images, up to 5], best first."""
Kind = Literal["ivf", "hnsw", "pq"]

RECALL_QUERIES = 1000
"""Queries that recall is measured on."""
MIN_TO_APPROXIMATE = 1000
"""Training images below which the exact search takes milliseconds."""
_TOP = 5


def clamp_ks(ks: Sequence[int], rows: int) -> tuple[list[int], str]:
    """The ks that ``rows`` training images allow, ascending, and a notice if any was larger.

    Raises:
        InputError: a k below 1, or no training image.
    """
    if rows == 0:
        raise InputError("there is no training image to be a neighbour")
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
    index: Index | None = None,
) -> Predictions:
    """Labels by the vote of the k nearest training images, each with weight exp(cosine similarity / T).

    One search at the largest k serves every k and every T. The classes are those that occur in the training labels.

    Args:
        train_features: [N, D], not necessarily normalised; may be memory-mapped.
        train_labels: [N], whole numbers.
        test_features: [test images, D]; may be memory-mapped.
        ks: how many neighbours vote; larger than the training set means all of it.
        temperatures: 0 < T < infinity; 0.07 is the field's.
        progress: draw a bar with the time that is left.
        index: of the rows of ``train_features`` at length 1, such as :func:`approximate_index` builds. Default: exact.

    Returns:
        {(k, T): [test images, min(5, C)]} for every k and T, best first. A class without a vote ranks below all others,
        lower numbers first.

    Raises:
        InputError: labels missing or of another length, differing D, features that are not finite, or a k or T out of
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
    # Votes are counted by position among the classes that occur: numbers may have gaps.
    classes, position = np.unique(np.asarray(train_labels, dtype=np.int64), return_inverse=True)
    pairs = [(k, temperature) for k in usable for temperature in dict.fromkeys(temperatures)]
    found = {pair: [np.empty((0, min(_TOP, len(classes))), dtype=np.int64)] for pair in pairs}
    index = build_index(train_features) if index is None else index
    for similarities, rows in search(index, test_features, usable[-1], progress=progress):
        cells = position[rows] + np.arange(len(rows))[:, None] * len(classes)
        for temperature in dict.fromkeys(temperatures):
            # A factor common to a query's votes changes no order; taking out the largest keeps exp from overflowing.
            with np.errstate(over="ignore"):  # at the least of all T only the nearest has a vote, exp(-inf) is 0
                weights = np.exp((similarities - similarities[:, :1]).astype(np.float64) / temperature)
            weights[rows < 0] = 0.0
            votes = np.zeros(len(rows) * len(classes))
            for start, k in zip([0, *usable[:-1]], usable, strict=True):
                votes += np.bincount(cells[:, start:k].ravel(), weights[:, start:k].ravel(), len(votes))
                found[k, temperature].append(classes[_best(votes.reshape(len(rows), -1))])
    joined = {pair: np.concatenate(parts) for pair, parts in found.items()}
    return {(k, t): joined[min(k, len(train_features)), t] for k in ks for t in temperatures}


def _best(votes: NDArray[np.float64]) -> NDArray[np.int64]:
    """The columns of the largest votes, [queries, min(5, C)], best first, the lower column first among equals.

    Five passes over the columns: with a thousand classes that is far quicker than sorting them.
    """
    left, queries = votes.copy(), np.arange(len(votes))
    columns: NDArray[np.int64] = np.empty((len(left), min(_TOP, left.shape[1])), dtype=np.int64)
    for place in range(columns.shape[1]):
        columns[:, place] = left.argmax(axis=1)
        left[queries, columns[:, place]] = -1.0
    return columns


def refuse_few(kind: Kind, rows: int) -> None:
    """Raises:
    InputError: so few training images that there is nothing to approximate.
    """
    if rows < MIN_TO_APPROXIMATE:
        raise InputError(
            f"approximate is {kind}, but {rows} training images are searched exactly in no time: leave --approximate "
            f"out, or give {MIN_TO_APPROXIMATE:,} images or more"
        )


def approximate_index(
    features: Rows, queries: Rows, kind: Kind, ks: Sequence[int], probes: int = 0, seed: int = 0
) -> tuple[WithVectors, dict[str, Any]]:
    """Build an index and measure it against the exact search on some of the queries.

    The exact index is gone before the other is built: there is never more than one in memory.

    Args:
        features: [N, D], not necessarily normalised; may be memory-mapped.
        queries: [test images, D], of which at most :data:`RECALL_QUERIES` are searched exactly.
        ks: neighbours to measure recall for, each from 1 to N.
        probes: lists (``ivf``, ``pq``) or candidates (``hnsw``, at least the largest k) a query looks at; 0: chosen,
            see :func:`eval.index.build`.
        seed: chooses the queries.

    Returns:
        The index, and for the result file ``index`` in faiss's short form, ``probes`` as used, ``vector_bytes`` (links
        and row numbers come on top), ``recall_percent`` by k over ``recall_queries``, ``queries_with_fewer_than_k``
        neighbours at the largest k, ``build_seconds``, and ``speedup`` over the exact search.

    Raises:
        InputError: features that are not finite.
    """
    vectors, most = UnitRows(features), max(ks)
    sampled = np.random.default_rng([seed, 2]).permutation(len(queries))[:RECALL_QUERIES]
    sample = np.asarray(queries[np.sort(sampled)])
    exact, exact_seconds = _neighbours(build_index(features), sample, most)
    started = time.perf_counter()
    built: Any = faiss_index.build("ivfpq" if kind == "pq" else kind, vectors, probes, most)
    build_seconds = time.perf_counter() - started
    index, unit = WithVectors(built, vectors), UnitRows(sample)[:]
    found, seconds = _neighbours(index, sample, most)
    row_bytes = 4 * vectors.shape[1]
    if kind == "hnsw":
        name, used = f"HNSW{faiss_index.LINKS},Flat", built.hnsw.efSearch
    elif kind == "ivf":
        name, used = f"IVF{built.nlist},Flat", built.nprobe
    else:
        name, used, row_bytes = f"IVF{built.nlist},PQ{built.pq.M}x{built.pq.nbits}", built.nprobe, built.pq.code_size
    record = {
        "index": name, "probes": used, "vector_bytes": len(vectors) * row_bytes,
        "recall_percent": {str(k): faiss_index.percent_found(vectors, unit, exact[:, :k], found[:, :k]) for k in ks},
        "recall_queries": len(sample), "queries_with_fewer_than_k": int((found < 0).any(axis=1).sum()),
        "build_seconds": round(build_seconds, 2), "speedup": round(exact_seconds / seconds, 2),
    }  # fmt: skip
    log.info("approximate search: " + ", ".join(f"{key} {value}" for key, value in record.items()))
    if probes not in (0, used):
        log.warning(f"probes is {probes}, but this index has to look at {used}")
    if record["queries_with_fewer_than_k"]:
        log.warning(f"some queries found fewer than {most} neighbours: give more --probes, or smaller --ks")
    return index, record


def _neighbours(index: Index, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], float]:
    """Rows [queries, k], and the seconds that finding them took."""
    started = time.perf_counter()
    rows = np.concatenate([rows for _, rows in search(index, queries, k)])
    return rows, time.perf_counter() - started
