"""Accuracies, 95% intervals and two-sided p-values. Shares, intervals and differences are in percent.

n is the number of images, queries or draws; hits are booleans [n], values are percentages [n].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy  # scipy.stats takes a second to import and is loaded lazily
from numpy.typing import NDArray

from dino_xcit.errors import InputError
from eval.table import Interval

Hits = NDArray[np.bool_]
Values = NDArray[np.float64]

LEVEL = 0.95
_MAX_ATOMS = 1024
"""Maximum number of distinct values in a bootstrap; more are grouped."""
ROUNDING = 2e-5
"""Percentage points below which values count as equal, as result files store float32."""


def accuracy(predictions: NDArray[np.int64], labels: NDArray[np.int64] | None, top: int) -> float:
    """Return the percentage of images whose label is among the first ``top`` predictions; NaN for no images."""
    hits = correct(predictions, labels, top)
    return 100.0 * float(hits.mean()) if len(hits) else float("nan")


def correct(predictions: NDArray[np.int64], labels: NDArray[np.int64] | None, top: int) -> Hits:
    """Return hits [n]: whether the label is among the first ``top`` predictions [n, up to 5].

    Args:
        labels: [n], or [n, M] if each of M labels is correct.

    Raises:
        InputError: there are no labels, or their number differs from n.
    """
    if labels is None:
        raise InputError("the test images have no labels: accuracy cannot be measured")
    if len(labels) != len(predictions):
        raise InputError(f"{len(predictions)} predictions but {len(labels)} labels")
    right = np.asarray(labels)[:, None] if np.ndim(labels) == 1 else labels
    hits: Hits = (predictions[:, :top, None] == right[:, None]).any(axis=(1, 2))
    return hits


def top_accuracies(predictions: NDArray[np.int64], labels: NDArray[np.int64] | None, five: bool) -> dict[str, Any]:
    """Return ``top1``, ``top5`` and their ``*_interval``; top-5 is None without ``five``."""
    found: dict[str, Any] = {}
    for top, meant in ((1, True), (5, five)):
        hits = correct(predictions, labels, top)
        found[f"top{top}"] = 100.0 * float(hits.mean()) if meant else None
        found[f"top{top}_interval"] = list(wilson_interval(hits)) if meant else None
    return found


# ---- intervals of one metric


def wilson_interval(hits: Hits) -> Interval:
    """Wilson score interval of the share of hits (Wilson, JASA 22, 1927); NaN for no images."""
    if not len(hits):
        return float("nan"), float("nan")
    found = scipy.stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(LEVEL, method="wilson")
    return 100.0 * float(found.low), 100.0 * float(found.high)


def all_or_nothing(hit: bool, count: int) -> Interval:
    """Clopper-Pearson interval of a share with ``count`` hits, or none, in ``count`` trials.

    It is also valid for the mean of values from 0 to 100%.
    """
    found = scipy.stats.binomtest(count if hit else 0, count).proportion_ci(LEVEL, method="exact")
    return 100.0 * float(found.low), 100.0 * float(found.high)


def mean_interval(values: Values) -> Interval | None:
    """Student's t interval of the mean of percentages; None if the spread is unknown."""
    if spread_is_unknown(values):
        return None
    found = scipy.stats.ttest_1samp(values, 0).confidence_interval(LEVEL)
    return max(0.0, float(found.low)), min(100.0, float(found.high))


def spread_is_unknown(values: Values) -> bool:
    """Return whether there is a single value or all are equal: a t interval would have zero width."""
    return len(values) < 2 or float(np.ptp(values)) <= ROUNDING


def query_interval(values: Values) -> Interval | None:
    """Percentile bootstrap interval of the mean over queries in percent; None for no values.

    Queries are resampled, the database is fixed. Queries of one class or building are treated as independent.

    The counts of the distinct values are drawn from a multinomial distribution, which is exact for up to 1,024 distinct
    values and as fast for a million queries as for a thousand. More values are grouped into 1,024 bins of equal width,
    and the sum within a bin is drawn from a normal distribution with the bin's mean and variance. Mean and variance of
    the bootstrap distribution remain exact; the normal part is about a millionth of the variance.

    If all values are 100 or all are 0, the bootstrap has zero width, and the Clopper-Pearson interval is returned.
    """
    if not len(values):
        return None
    if (values == values[0]).all() and values[0] in (0, 100):
        return all_or_nothing(bool(values[0]), len(values))
    mean, variance, counts = _atoms(values)
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(values), counts / len(values), 2000)
    sums = drawn @ mean + np.sqrt(drawn @ variance) * rng.standard_normal(2000)
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(sums / len(values), [tail, 100 - tail])
    return float(low), float(high)


def _atoms(values: Values) -> tuple[Values, Values, NDArray[np.int64]]:
    """Return mean, variance and count [atoms] of each distinct value, or of each bin if there are many."""
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


# ---- differences of two metrics


def discordant(first: Hits, second: Hits) -> tuple[int, int]:
    """Return the numbers of images that only the first and only the second gets right."""
    return int((first & ~second).sum()), int((second & ~first).sum())


def mcnemar(only_first: int, only_second: int) -> float:
    """p-value of McNemar's exact test (McNemar, Psychometrika 12, 1947)."""
    count = only_first + only_second
    return float(scipy.stats.binomtest(only_first, count).pvalue) if count else 1.0


def paired_interval(first: Hits, second: Hits) -> Interval | None:
    """Percentile bootstrap interval of the second accuracy minus the first on the same images; None if the hits are
    equal.

    The counts of discordant images are multinomial and are drawn directly: scipy's bootstrap needs draws x n memory.
    """
    only_first, only_second = discordant(first, second)
    if not only_first + only_second:
        return None
    images = len(first)
    shares = [only_first / images, only_second / images, (images - only_first - only_second) / images]
    counts = np.random.default_rng(0).multinomial(images, shares, size=10_000)
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(100.0 * (counts[:, 1] - counts[:, 0]) / images, [tail, 100 - tail])
    return float(low), float(high)


def paired_means(first: Values, second: Values) -> tuple[Interval | None, float | None]:
    """Paired t-test of ``second - first`` on the same queries or draws: interval of the mean and p-value.

    Both are None if the spread of the differences is unknown.
    """
    if spread_is_unknown(second - first):
        return None, None
    found = scipy.stats.ttest_rel(second, first)
    low, high = found.confidence_interval(LEVEL)
    return (float(low), float(high)), float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for multiple tests, in their order (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected
