"""The interval of a mean over queries, against drawing the queries anew."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from eval.stats import _atoms, query_interval


def test_the_interval_of_a_mean_is_that_of_drawing_the_queries_anew() -> None:
    values = np.random.default_rng(1).uniform(0, 100, 70)
    interval = query_interval(values)
    assert interval is not None
    # The mean of n draws has the deviation of the values divided by the root of n.
    spread = 1.96 * values.std() / math.sqrt(70)
    assert interval == pytest.approx((values.mean() - spread, values.mean() + spread), abs=0.15 * spread)
    assert query_interval(values) == interval
    assert query_interval(np.full(5, 3.0)) == (3.0, 3.0)
    assert query_interval(values[:0]) is None


def test_queries_that_all_find_everything_leave_room_for_others_that_do_not() -> None:
    # Of a share p, 12 of 12 are hits with probability p^12: 2.5% at the lower end.
    assert query_interval(np.full(12, 100.0)) == pytest.approx((100 * 0.025 ** (1 / 12), 100))
    assert query_interval(np.zeros(12)) == pytest.approx((0, 100 - 100 * 0.025 ** (1 / 12)))


def drawn_anew(values: NDArray[np.float64], draws: int) -> tuple[float, float]:
    """The interval by its definition: the queries themselves are drawn."""
    rng = np.random.default_rng(5)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


@pytest.mark.parametrize("count", [60, 5000])
@pytest.mark.parametrize("shape", ["even", "hits", "mostly nothing"])
def test_the_interval_agrees_with_drawing_every_query(count: int, shape: str) -> None:
    rng = np.random.default_rng(2)
    values = {
        "even": rng.uniform(0, 100, count),
        "hits": 100.0 * (rng.random(count) < 0.1),
        "mostly nothing": 100 * rng.beta(0.05, 2, count),
    }[shape]
    # In deviations of the mean. 2,000 draws leave 0.06 of one where the density at 2.5 % is the normal's. Means of hits
    # lie on a grid, to which either quantile goes up or down.
    room = 0.25 * values.std() / math.sqrt(count) + (100 / count if shape == "hits" else 0)
    assert query_interval(values) == pytest.approx(drawn_anew(values, 2000), abs=room)


def test_grouped_values_keep_the_mean_and_the_variance() -> None:
    values = np.random.default_rng(4).exponential(1, 20_000)
    mean, variance, counts = _atoms(values)
    assert len(mean) <= 1024
    assert counts.sum() == len(values)
    assert counts @ mean == pytest.approx(values.sum())
    assert counts @ (variance + (mean - values.mean()) ** 2) == pytest.approx(len(values) * values.var())
    assert counts @ variance < 1e-3 * len(values) * values.var()
    few, none, times = _atoms(np.array([2.0, 1.0, 2.0]))
    assert (few.tolist(), none.tolist(), times.tolist()) == ([1.0, 2.0], [0.0, 0.0], [1, 2])
