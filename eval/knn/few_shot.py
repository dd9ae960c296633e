"""k-NN with a few labelled images a class: several draws of them, their mean and deviation.

C classes, D features, n images a class ("shots").
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dino_xcit.errors import InputError
from dino_xcit.runtime.logging import progress_bar
from eval.knn.classify import clamp_ks, knn_predict
from eval.stats import accuracy

Record = dict[str, object]


def draw(labels: NDArray[np.int64], shots: int, seed: int, number: int) -> NDArray[np.int64]:
    """Rows of ``shots`` images of every class, ascending; of a class that has fewer, all.

    Every image gets a random key that depends on nothing but ``seed`` and ``number``, and the lowest keys of each class
    are taken. So a draw does not depend on what else is measured, and its images for n shots are among those for more.

    Args:
        labels: [images], whole numbers, which may have gaps.
        number: which draw, from 0.
    """
    keys = np.random.default_rng([seed, number]).random(len(labels))
    order = np.lexsort((keys, labels))
    _, first, count = np.unique(labels[order], return_index=True, return_counts=True)
    place_in_class = np.arange(len(labels)) - np.repeat(first, count)
    return np.sort(order[place_in_class < shots])


def short_classes(labels: NDArray[np.int64], shots: int) -> list[tuple[int, int]]:
    """The classes with fewer than ``shots`` images, each with how many it has."""
    classes, counts = np.unique(labels, return_counts=True)
    return [(int(number), int(count)) for number, count in zip(classes, counts, strict=True) if count < shots]


def takes_all(labels: NDArray[np.int64], shots: int) -> bool:
    """Whether a draw has every image, as no class has more than ``shots``: then all draws are the same."""
    return int(np.unique(labels, return_counts=True)[1].max(initial=0)) <= shots


def few_shot(
    train_features: NDArray[np.float32],
    train_labels: NDArray[np.int64] | None,
    test_features: NDArray[np.float32],
    test_labels: NDArray[np.int64] | None,
    shots: Sequence[int],
    draws: int,
    ks: Sequence[int],
    temperatures: Sequence[float],
    seed: int = 0,
    progress: bool = False,
) -> list[Record]:
    """Top-1 and top-5 in percent with n labelled images a class, for every n, k and T.

    Args:
        train_features: [train images, D], which the images are drawn from; may be memory-mapped.
        shots: the n to measure, each at least 1.
        draws: how many times images are drawn for each n; once where a draw has them all (:func:`takes_all`).
        ks: neighbours that vote; more than were drawn means all of them, and is reported once, as that number.

    Returns:
        One record for each (n, k, T): ``shots``, ``k``, ``temperature``, ``classes_with_fewer`` images than n,
        ``takes_all`` (whether the only draw has all images), ``drawn`` (SHA-256 of the rows of all draws: where two
        networks' are equal, so are their images), and for ``top1`` and ``top5`` the mean over the draws,
        ``*_deviation`` (of a sample, n - 1 in its denominator; None for a single draw) and ``*_draws``, each draw's
        own. Top-5 is None where it would say nothing: up to five classes, or fewer than five neighbours.

    Raises:
        InputError: no labels, or no image to draw from.
    """
    if train_labels is None or not len(train_labels):
        raise InputError("the training images have no labels: nothing can be drawn from each class")
    classes = len(np.unique(train_labels))
    records: list[Record] = []
    times = {count: 1 if takes_all(train_labels, count) else draws for count in shots}
    with progress_bar(sum(times.values()), "few-shot", shown=progress, unit="draw") as bar:
        for count in shots:
            figures: dict[tuple[int, float], list[tuple[float, float]]] = {}
            drawn = hashlib.sha256()
            for number in range(times[count]):
                rows = draw(train_labels, count, seed, number)
                drawn.update(rows.astype("<i8").tobytes())
                usable, _ = clamp_ks(ks, len(rows))
                found = knn_predict(train_features[rows], train_labels[rows], test_features, usable, temperatures)
                for pair, guesses in found.items():
                    tops = accuracy(guesses, test_labels, 1), accuracy(guesses, test_labels, 5)
                    figures.setdefault(pair, []).append(tops)
                bar.update(1)
            fewer = len(short_classes(train_labels, count))
            for (k, temperature), measured in figures.items():
                top1, top5 = zip(*measured, strict=True)
                record: Record = {"shots": count, "k": k, "temperature": temperature, "classes_with_fewer": fewer}
                record |= {"takes_all": takes_all(train_labels, count), "drawn": drawn.hexdigest()}
                record |= _summary("top1", top1) | _summary("top5", top5 if classes > 5 and k >= 5 else None)
                records.append(record)
    return records


def _summary(name: str, figures: Sequence[float] | None) -> Record:
    if figures is None:
        return {name: None, f"{name}_deviation": None, f"{name}_draws": None}
    deviation = float(np.std(figures, ddof=1)) if len(figures) > 1 else None
    return {name: float(np.mean(figures)), f"{name}_deviation": deviation, f"{name}_draws": list(figures)}
