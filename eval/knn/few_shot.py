"""Few-shot k-NN: n labelled images per class ("shots"), mean and std over several random draws."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino_xcit.errors import InputError
from dino_xcit.runtime.logging import progress_bar
from eval.features import Features
from eval.knn.classify import clamp_ks, knn_predict
from eval.stats import accuracy

Record = dict[str, Any]


def draw(labels: NDArray[np.int64], shots: int, seed: int, number: int) -> NDArray[np.int64]:
    """Draw ``shots`` images of each class, or all of a smaller class, and return their rows in ascending order.

    Each image gets a random key that depends on ``seed``, ``number`` and its row only, and each class keeps its lowest
    keys. Therefore the images of n shots are a subset of those of more shots.

    Args:
        labels: [images], integers, possibly with gaps.
        number: index of the draw, from 0.
    """
    keys = np.random.default_rng([seed, number]).random(len(labels))
    order = np.lexsort((keys, labels))
    _, first, count = np.unique(labels[order], return_index=True, return_counts=True)
    place_in_class = np.arange(len(labels)) - np.repeat(first, count)
    return np.sort(order[place_in_class < shots])


def few_shot(
    train: Features, test: Features, shots: Sequence[int], draws: int, ks: Sequence[int],
    temperatures: Sequence[float], seed: int = 0, progress: bool = False,
) -> list[Record]:  # fmt: skip
    """Measure top-1 and top-5 in percent with n labelled images per class, for each n, k and T.

    Args:
        train: features of the images to draw from.
        shots: values of n, each at least 1.
        draws: number of draws for each n; a single one if no class has more than n images.
        ks: numbers of neighbours; clamped to the number of drawn images, without repetition.

    Returns:
        A record for each (n, k, T): ``shots``, ``k``, ``temperature``, ``classes_with_fewer`` (number of classes with
        fewer than n images), ``takes_all`` (the draw has all images), ``drawn`` (SHA-256 of the rows of all draws;
        equal for two networks if they used the same images), and for ``top1`` and ``top5`` the mean over the draws,
        ``*_deviation`` (sample std; None for a single draw) and ``*_draws`` (the values). Top-5 is None for up to five
        classes or fewer than five neighbours.

    Raises:
        InputError: there are no labels or no images.
    """
    if train.labels is None or not len(train.labels):
        raise InputError("the training images have no labels, which --few-shot needs")
    counts = np.unique(train.labels, return_counts=True)[1]
    times = {count: draws if counts.max() > count else 1 for count in shots}
    records: list[Record] = []
    with progress_bar(sum(times.values()), "few-shot", shown=progress, unit="draw") as bar:
        for count in shots:
            tops: dict[tuple[int, float], list[tuple[float, float]]] = {}
            drawn = hashlib.sha256()
            for number in range(times[count]):
                rows = draw(train.labels, count, seed, number)
                drawn.update(rows.astype("<i8").tobytes())
                usable, _ = clamp_ks(ks, len(rows))
                found = knn_predict(train.features[rows], train.labels[rows], test.features, usable, temperatures)
                for pair, guesses in found.items():
                    both = accuracy(guesses, test.labels, 1), accuracy(guesses, test.labels, 5)
                    tops.setdefault(pair, []).append(both)
                bar.update(1)
            for (k, temperature), measured in tops.items():
                record: Record = {
                    "shots": count, "k": k, "temperature": temperature,
                    "classes_with_fewer": int((counts < count).sum()), "takes_all": bool(counts.max() <= count),
                    "drawn": drawn.hexdigest(),
                }  # fmt: skip
                for name, values in zip(("top1", "top5"), zip(*measured, strict=True), strict=True):
                    meant = name == "top1" or (len(counts) > 5 and k >= 5)
                    deviation = float(np.std(values, ddof=1)) if meant and len(values) > 1 else None
                    record[name] = float(np.mean(values)) if meant else None
                    record |= {f"{name}_deviation": deviation, f"{name}_draws": list(values) if meant else None}
                records.append(record)
    return records
