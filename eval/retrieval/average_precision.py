"""Average precision as the retrieval benchmarks' own scripts compute it, and the interval of a mean over queries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eval.stats import all_or_nothing

DRAWS = 2000
"""Resamplings of the queries for an interval."""
_MOST_ATOMS = 1024
"""Different values that are drawn one by one; more are grouped."""


def ranks_of(ranking: NDArray[np.int64], wanted: NDArray[np.int64], junk: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the wanted images stand in a ranking from which junk was taken out: 0-based, ascending.

    Args:
        ranking: [images], rows of the database, best first; each at most once.
        wanted: rows that are right. One that the ranking does not hold has no rank.
        junk: rows that count neither as right nor as wrong.
    """
    places = np.flatnonzero(np.isin(ranking, wanted))
    junk_places = np.flatnonzero(np.isin(ranking, junk))
    return places - np.searchsorted(junk_places, places)


def trapezoidal_ap(ranks: NDArray[np.int64], positives: int) -> float:
    """Area below the precision-recall curve, from 0 to 1, by trapezoids, as the Holidays, Oxford, Revisited Oxford and
    Paris and Copydays scripts have it.

    The right image number j (from 0) at rank r raises recall by one step of 1 / positives. Precision is j / r before
    it (1 if r is 0) and (j + 1) / (r + 1) with it; the step adds their mean times its width. It differs from the
    average precision of text retrieval (and of scikit-learn), which takes the second of them alone.

    Args:
        ranks: of the right images that were found, 0-based, ascending.
        positives: how many right images there are, found or not; at least 1.
    """
    found = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, found / np.maximum(ranks, 1))
    after = (found + 1) / (ranks + 1)
    return float((before + after).sum() / (2 * positives))


def precision_at(ranks: NDArray[np.int64], k: int) -> float:
    """Share of right images among the first k, as revisitop has it: k is no more than the rank of the last right one.

    So a query with two right images, both first, has precision 1 at 10, and not 0.2.

    Args:
        ranks: of the right images, 0-based, ascending; at least one.
        k: at least 1.
    """
    among = min(k, int(ranks[-1]) + 1)
    return float((ranks < among).sum() / among)


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
    if len(different) <= _MOST_ATOMS:
        return different, np.zeros(len(different)), counts
    steps = (different - different[0]) / (different[-1] - different[0]) * _MOST_ATOMS
    group = np.minimum(steps.astype(np.int64), _MOST_ATOMS - 1)
    number = np.bincount(group, counts, _MOST_ATOMS)
    mean = np.bincount(group, counts * different, _MOST_ATOMS) / np.maximum(number, 1)
    variance = np.bincount(group, counts * (different - mean[group]) ** 2, _MOST_ATOMS) / np.maximum(number, 1)
    there = number > 0
    return mean[there], variance[there], number[there].astype(np.int64)


def percent_of(values: Sequence[float]) -> NDArray[np.float64]:
    """Shares as percentages, without the NaN of queries that are left out."""
    shares: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    return 100.0 * shares[~np.isnan(shares)]
