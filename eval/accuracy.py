"""Shares of images that are classified rightly, means over queries, and how sure they are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dino_xcit.errors import InputError

DRAWS = 2000
"""Resamplings of the queries for an interval."""
_MAX_ATOMS = 1024
"""Different values that are drawn one by one; more are grouped."""


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

    Resampling n images with replacement makes the number of hits binomial(n, share), which is drawn directly. Where all
    of them are hits, or none, every draw is the same, which is no certainty: Clopper and Pearson's exact interval then
    (Biometrika 26, 1934), whose open end is tail^(1/n).
    """
    if not len(hits):
        return float("nan"), float("nan")
    if hits.all() or not hits.any():
        return all_or_nothing(bool(hits.all()), len(hits), level)
    counts = np.random.default_rng(seed).binomial(len(hits), float(hits.mean()), size=draws)
    tail = 50 * (1 - level)
    low, high = np.percentile(100.0 * counts / len(hits), [tail, 100 - tail])
    return float(low), float(high)


def all_or_nothing(hit: bool, count: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's interval, in percent, of a share of which ``count`` of ``count``, or none, are hits.

    It holds for the mean of any values from 0 to 100% as well: to see only the greatest is then no likelier than for
    hits of the same mean.
    """
    open_end = 100.0 * float(((1 - level) / 2) ** (1 / count))
    return (open_end, 100.0) if hit else (0.0, 100.0 - open_end)


def mean_interval(values: NDArray[np.float64], level: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean over queries, in percent as the values are; None for no value at all.

    The queries are drawn anew; the database stays. Queries of one class or one building are treated as independent.

    How often each value is drawn follows a multinomial distribution over the different values, which is drawn from in
    place of the queries: exact in distribution for up to 1,024 different values, and as quick for a million queries as
    for a thousand. More values are grouped by equal steps of 1/1024 of their range; the sum of what is drawn within a
    group is then taken as normal, with the group's own mean and variance. So the mean and the variance of the
    distribution are exact here too, and no more than about a millionth of the variance is of the normal's shape.

    Where all values are 100, or all 0, every draw is the same, which is no certainty: Clopper and Pearson's interval
    then.
    """
    if not len(values):
        return None
    if (values == values[0]).all() and values[0] in (0, 100):
        return all_or_nothing(bool(values[0]), len(values), level)
    mean, variance, counts = _atoms(values)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(values), counts / len(values), DRAWS)
    sums = drawn @ mean + np.sqrt(drawn @ variance) * rng.standard_normal(DRAWS)
    tail = 50 * (1 - level)
    low, high = np.percentile(sums / len(values), [tail, 100 - tail])
    return float(low), float(high)


def _atoms(
    values: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """The different values, or groups of near ones if they are many: mean, variance and number of each, [atoms]."""
    different, counts = np.unique(values, return_counts=True)
    if len(different) <= _MAX_ATOMS:
        return different, np.zeros(len(different)), counts
    steps = (different - different[0]) / (different[-1] - different[0]) * _MAX_ATOMS
    group = np.minimum(steps.astype(np.int64), _MAX_ATOMS - 1)
    number = np.bincount(group, counts, _MAX_ATOMS)
    mean = np.bincount(group, counts * different, _MAX_ATOMS) / np.maximum(number, 1)
    variance = np.bincount(group, counts * (different - mean[group]) ** 2, _MAX_ATOMS) / np.maximum(number, 1)
    there = number > 0
    return mean[there], variance[there], number[there].astype(np.int64)
