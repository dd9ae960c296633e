"""Weighted k-NN classification (DINO's protocol) with exact faiss search. D features, k neighbours, T temperature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import faiss
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dino_xcit.errors import InputError

Predictions = dict[tuple[int, float], NDArray[np.int64]]
"""(k, T) to the predicted labels [test images, up to 5], best first."""

_ROWS_AT_ONCE = 65_536
_TOP = 5


def unit_rows(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length 1 in float32; a zero row stays zero.

    Args:
        features: [rows, D].
    """
    rows = np.ascontiguousarray(features, dtype=np.float32)
    length = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return (rows / np.maximum(length, 1e-12)).astype(np.float32)


def build_index(features: NDArray[np.float32]) -> faiss.IndexFlatIP:
    """An exact inner-product index of L2-normalised rows, filled in pieces, so that a memory-mapped [rows, D] file is
    never copied whole besides the index itself (rows * D * 4 bytes)."""
    index = faiss.IndexFlatIP(features.shape[1])
    for start in range(0, len(features), _ROWS_AT_ONCE):
        index.add(unit_rows(features[start : start + _ROWS_AT_ONCE]))
    return index


def search(
    index: faiss.Index, queries: NDArray[np.float32], k: int, chunk: int = 1024, progress: bool = False
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Cosine similarities and row numbers, [chunk, k] each, best first, a chunk of queries at a time."""
    starts = range(0, len(queries), chunk)
    for start in tqdm(starts, desc=f"search k={k}", disable=not progress, leave=False):
        yield index.search(unit_rows(queries[start : start + chunk]), k)


def clamp_ks(ks: Sequence[int], rows: int) -> tuple[list[int], str]:
    """The ks that can be had with ``rows`` training images, ascending, and a notice if any was larger.

    Raises:
        InputError: a k below 1, or no training image.
    """
    if rows == 0:
        raise InputError("there is no training image to be a neighbour")
    if not ks or min(ks) < 1:
        raise InputError(f"k is {min(ks) if ks else 'missing'}, expected 1 or more, such as 10 20 100 200")
    too_large = sorted({k for k in ks if k > rows})
    notice = f"k = {', '.join(map(str, too_large))} exceeds the {rows} training images: using {rows}" if too_large else ""
    return sorted({min(k, rows) for k in ks}), notice


def knn_predict(
    train_features: NDArray[np.float32],
    train_labels: NDArray[np.int64] | None,
    test_features: NDArray[np.float32],
    ks: Sequence[int],
    temperatures: Sequence[float],
    progress: bool = False,
) -> Predictions:
    """Labels by the vote of the k nearest training images, each with weight exp(cosine similarity / T).

    One search at the largest k serves every k and every T. The classes are those of the training labels.

    Args:
        train_features: [train images, D], not necessarily normalised; may be memory-mapped.
        train_labels: [train images], whole numbers from 0.
        test_features: [test images, D].
        ks: how many neighbours vote; larger than the training set means all of it.
        temperatures: T > 0; 0.07 is the field's.

    Returns:
        {(k, T): [test images, min(5, classes)]}, best first. A class without a vote ranks below all others, lower
        numbers first.

    Raises:
        InputError: labels missing or of another length, differing D, or a k or T that cannot be.
    """
    if train_labels is None or len(train_labels) != len(train_features):
        count = 0 if train_labels is None else len(train_labels)
        raise InputError(f"{len(train_features)} training features but {count} labels")
    if train_features.ndim != 2 or test_features.ndim != 2 or train_features.shape[1] != test_features.shape[1]:
        raise InputError(f"features of shapes {train_features.shape} and {test_features.shape} cannot be compared")
    for temperature in temperatures:
        if not temperature > 0:
            raise InputError(f"temperature is {temperature}, expected more than 0, such as 0.07")
    usable, _ = clamp_ks(ks, len(train_features))
    labels = np.asarray(train_labels, dtype=np.int64)
    classes = int(labels.max()) + 1
    top = min(_TOP, classes)
    found: dict[tuple[int, float], list[NDArray[np.int64]]] = {(k, t): [] for k in usable for t in temperatures}
    for similarities, rows in search(build_index(train_features), test_features, usable[-1], progress=progress):
        votes_for = labels[rows]
        for temperature in temperatures:
            # A factor common to a query's votes changes no order; taking out the largest keeps exp from overflowing.
            weights = np.exp((similarities - similarities[:, :1]).astype(np.float64) / temperature)
            tally = np.zeros((len(rows), classes))
            for start, k in zip([0, *usable[:-1]], usable, strict=True):
                tally += _tally(votes_for[:, start:k], weights[:, start:k], classes)
                found[k, temperature].append(np.argsort(-tally, axis=1, kind="stable")[:, :top])
    predictions = {key: np.concatenate(parts) for key, parts in found.items() if parts}
    empty = np.empty((0, top), dtype=np.int64)
    return {
        (k, t): predictions.get((min(k, len(train_features)), t), empty) for k in ks for t in temperatures
    }


def _tally(votes: NDArray[np.int64], weights: NDArray[np.float64], classes: int) -> NDArray[np.float64]:
    """Weights summed by class: [queries, k] and [queries, k] to [queries, classes]."""
    queries = len(votes)
    cells = votes + np.arange(queries)[:, None] * classes
    return np.bincount(cells.ravel(), weights.ravel(), minlength=queries * classes).reshape(queries, classes)


def accuracy(predictions: NDArray[np.int64], labels: NDArray[np.int64] | None, top: int) -> float:
    """Percent of test images whose label is among the first ``top`` predictions."""
    hits = correct(predictions, labels, top)
    return 100.0 * float(hits.mean()) if len(hits) else float("nan")


def correct(predictions: NDArray[np.int64], labels: NDArray[np.int64] | None, top: int) -> NDArray[np.bool_]:
    """[test images]: whether the label is among the first ``top`` predictions [test images, up to 5]."""
    if labels is None:
        raise InputError("the test images have no labels: accuracy cannot be measured")
    return (predictions[:, :top] == np.asarray(labels)[:, None]).any(axis=1)


def bootstrap_interval(
    hits: NDArray[np.bool_], draws: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval, in percent, of a share of hits.

    Resampling n images with replacement makes the number of hits binomial(n, share), which is drawn directly.
    """
    if not len(hits):
        return float("nan"), float("nan")
    counts = np.random.default_rng(seed).binomial(len(hits), float(hits.mean()), size=draws)
    tail = 50 * (1 - level)
    low, high = np.percentile(100.0 * counts / len(hits), [tail, 100 - tail])
    return float(low), float(high)
