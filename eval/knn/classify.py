"""Weighted k-NN classification (DINO's protocol), with exact faiss search unless another index is handed in.

D features, k neighbours, T temperature, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dino_xcit.errors import InputError
from eval.retrieval.index import Index, build_index, search

Predictions = dict[tuple[int, float], NDArray[np.int64]]
"""(k, T) to the predicted labels [test images, up to 5], best first."""

_TOP = 5


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
    index: Index | None = None,
) -> Predictions:
    """Labels by the vote of the k nearest training images, each with weight exp(cosine similarity / T).

    One search at the largest k serves every k and every T. The classes are those that occur in the training labels.

    Args:
        train_features: [train images, D], not necessarily normalised; may be memory-mapped.
        train_labels: [train images], whole numbers.
        test_features: [test images, D]; may be memory-mapped.
        ks: how many neighbours vote; larger than the training set means all of it.
        temperatures: 0 < T < infinity; 0.07 is the field's. One that is given twice counts once.
        progress: draw a bar with the time that is left.
        index: of the rows of ``train_features`` at length 1, such as :mod:`eval.knn.approximate` builds. Default:
            exact.

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
        if not 0 < temperature < float("inf"):
            raise InputError(f"temperature is {temperature}, expected more than 0, such as 0.07")
    temperatures = list(dict.fromkeys(temperatures))
    usable, _ = clamp_ks(ks, len(train_features))
    # Votes are counted by position among the classes that occur: numbers may have gaps.
    classes, position = np.unique(np.asarray(train_labels, dtype=np.int64), return_inverse=True)
    found: dict[tuple[int, float], list[NDArray[np.int64]]] = {(k, t): [] for k in usable for t in temperatures}
    index = build_index(train_features) if index is None else index
    for similarities, rows in search(index, test_features, usable[-1], progress=progress):
        voters = position[rows]
        for temperature in temperatures:
            # A factor common to a query's votes changes no order; taking out the largest keeps exp from overflowing.
            with np.errstate(over="ignore"):  # at the least of all T only the nearest has a vote, exp(-inf) is 0
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
