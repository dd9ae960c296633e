"""Weighted k-NN classification (DINO's protocol), with exact faiss search unless another index is handed in.

D features, k neighbours, T temperature, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import faiss
import numpy as np
from numpy.typing import NDArray

from dino_xcit.console import progress_bar
from dino_xcit.errors import InputError

Predictions = dict[tuple[int, float], NDArray[np.int64]]
"""(k, T) to the predicted labels [test images, up to 5], best first."""

_ROWS_AT_ONCE = 16_384
_TOP = 5


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
            raise InputError(
                "the features are not finite numbers (NaN or infinite): the weights are damaged, or their training "
                "diverged"
            )
        found[start : start + _ROWS_AT_ONCE] = rows / np.maximum(length, 1e-12)
    return found


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
    """Cosine similarities and row numbers, [chunk, k] each, best first, a chunk of queries at a time.

    An approximate index may find fewer than k: the places left over have row -1.
    """
    with progress_bar(len(queries), f"search, k = {k}", shown=progress) as bar:
        for start in range(0, len(queries), chunk):
            rows = unit_rows(queries[start : start + chunk])
            similarities, found = index.search(rows, k)
            if index.metric_type == faiss.METRIC_L2:  # squared distances of vectors of length 1
                similarities = 1 - similarities * np.float32(0.5)
            yield similarities, found
            bar.update(len(rows))


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
    notice = (
        f"k = {', '.join(map(str, too_large))} exceeds the {rows} training images: using {rows}" if too_large else ""
    )
    return sorted({min(k, rows) for k in ks}), notice


def knn_predict(
    train_features: NDArray[np.float32],
    train_labels: NDArray[np.int64] | None,
    test_features: NDArray[np.float32],
    ks: Sequence[int],
    temperatures: Sequence[float],
    progress: bool = False,
    index: faiss.Index | None = None,
) -> Predictions:
    """Labels by the vote of the k nearest training images, each with weight exp(cosine similarity / T).

    One search at the largest k serves every k and every T. The classes are those that occur in the training labels.

    Args:
        train_features: [train images, D], not necessarily normalised; may be memory-mapped.
        train_labels: [train images], whole numbers.
        test_features: [test images, D]; may be memory-mapped.
        ks: how many neighbours vote; larger than the training set means all of it.
        temperatures: T > 0; 0.07 is the field's.
        progress: draw a bar with the time that is left.
        index: of the rows of ``train_features`` at length 1, such as :mod:`eval.approximate` builds. Default: exact.

    Returns:
        {(k, T): [test images, min(5, C)]} for every k and T asked for, best first. A class without a vote ranks
        below all others, lower numbers first.

    Raises:
        InputError: labels missing or of another length, differing D, features that are not finite, or a k or T that
            cannot be.
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
    # Votes are counted by position among the classes that occur: numbers may have gaps.
    classes, position = np.unique(np.asarray(train_labels, dtype=np.int64), return_inverse=True)
    found: dict[tuple[int, float], list[NDArray[np.int64]]] = {(k, t): [] for k in usable for t in temperatures}
    index = build_index(train_features) if index is None else index
    for similarities, rows in search(index, test_features, usable[-1], progress=progress):
        voters = position[rows]
        for temperature in temperatures:
            # A factor common to a query's votes changes no order; taking out the largest keeps exp from overflowing.
            weights = np.exp((similarities - similarities[:, :1]).astype(np.float64) / temperature)
            weights[rows < 0] = 0.0
            tally = np.zeros((len(rows), len(classes)))
            for start, k in zip([0, *usable[:-1]], usable, strict=True):
                tally += _tally(voters[:, start:k], weights[:, start:k], len(classes))
                found[k, temperature].append(classes[_best(tally)])
    empty = [np.empty((0, min(_TOP, len(classes))), dtype=np.int64)]  # for no test image at all
    joined = {key: np.concatenate(parts or empty) for key, parts in found.items()}
    return {(k, t): joined[min(k, len(train_features)), t] for k in ks for t in temperatures}


def _tally(votes: NDArray[np.int64], weights: NDArray[np.float64], classes: int) -> NDArray[np.float64]:
    """Weights summed by class: [queries, k] and [queries, k] to [queries, C]."""
    queries = len(votes)
    cells = votes + np.arange(queries)[:, None] * classes
    sums: NDArray[np.float64] = np.bincount(cells.ravel(), weights.ravel(), queries * classes).astype(np.float64)
    return sums.reshape(queries, classes)


def _best(tally: NDArray[np.float64]) -> NDArray[np.int64]:
    """The columns of the largest sums, [queries, min(5, C)], best first, the lower column first among equals.

    Five passes over the columns: with a thousand classes that is far quicker than sorting them.
    """
    left: NDArray[np.float64] = tally.copy()
    queries = np.arange(len(left))
    columns: NDArray[np.int64] = np.empty((len(left), min(_TOP, left.shape[1])), dtype=np.int64)
    for place in range(columns.shape[1]):
        columns[:, place] = left.argmax(axis=1)
        left[queries, columns[:, place]] = -1.0
    return columns


def accuracy(predictions: NDArray[np.int64], labels: NDArray[np.int64] | None, top: int) -> float:
    """Percent of test images whose label is among the first ``top`` predictions; NaN for no image at all."""
    hits = correct(predictions, labels, top)
    return 100.0 * float(hits.mean()) if len(hits) else float("nan")


def correct(predictions: NDArray[np.int64], labels: NDArray[np.int64] | None, top: int) -> NDArray[np.bool_]:
    """[test images]: whether the label is among the first ``top`` predictions [test images, up to 5].

    Raises:
        InputError: there are no labels, or not one an image.
    """
    if labels is None:
        raise InputError("the test images have no labels: accuracy cannot be measured")
    if len(labels) != len(predictions):
        raise InputError(f"{len(predictions)} predictions but {len(labels)} labels")
    hits: NDArray[np.bool_] = (predictions[:, :top] == np.asarray(labels)[:, None]).any(axis=1)
    return hits


def bootstrap_interval(
    hits: NDArray[np.bool_], draws: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval, in percent, of a share of hits; NaN for no image at all.

    Resampling n images with replacement makes the number of hits binomial(n, share), which is drawn directly.
    """
    if not len(hits):
        return float("nan"), float("nan")
    counts = np.random.default_rng(seed).binomial(len(hits), float(hits.mean()), size=draws)
    tail = 50 * (1 - level)
    low, high = np.percentile(100.0 * counts / len(hits), [tail, 100 - tail])
    return float(low), float(high)
