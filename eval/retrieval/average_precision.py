"""Average precision as the retrieval benchmarks' own scripts compute it, and the interval of a mean over queries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
"""Resamplings of the queries for an interval."""


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
    """Percentile bootstrap interval of the mean over queries, in the values' unit; None for no value at all.

    The queries are drawn anew; the database stays. Queries of one class or one building are treated as independent.
    """
    if not len(values):
        return None
    rng = np.random.default_rng(seed)
    means = [float(values[rng.integers(0, len(values), len(values))].mean()) for _ in range(DRAWS)]
    tail = 50 * (1 - level)
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def percent_of(values: Sequence[float]) -> NDArray[np.float64]:
    """Shares as percentages, without the NaN of queries that are left out."""
    shares: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    return 100.0 * shares[~np.isnan(shares)]
