"""Average precision and precision at k, by hand, by the definition of the curve, and by brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

from eval.accuracy import _atoms, mean_interval
from eval.retrieval.benchmarks import precision_at, ranks_of, trapezoidal_ap


def rows(*values: int) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


def test_ranks_close_the_gaps_that_junk_leaves() -> None:
    # 3 0 [5] 1 2 4 6 7: taking out 5 moves 1 from place 3 to 2, and 6 from 6 to 5; 0 stands before it.
    ranking = rows(3, 0, 5, 1, 2, 4, 6, 7)
    assert ranks_of(ranking, rows(6, 0, 1), rows(5)).tolist() == [1, 2, 5]
    assert ranks_of(ranking, rows(6, 0, 1)).tolist() == [1, 3, 6]
    assert ranks_of(ranking, rows(6), rows(3, 0, 5, 1, 2, 4, 7)).tolist() == [0]
    assert ranks_of(ranking[:4], rows(6, 0), rows(5)).tolist() == [1], "what the ranking does not hold has no rank"


def test_average_precision_by_hand() -> None:
    # Right at 1, 2 and 5 of three. Precision before and with each: 0 and 1/2, 1/2 and 2/3, 2/5 and 3/6.
    # The means are 1/4, 7/12 and 9/20, together 77/60; each step is a third wide.
    assert trapezoidal_ap(rows(1, 2, 5), 3) == pytest.approx(77 / 180)
    assert trapezoidal_ap(rows(0, 1, 2), 3) == 1.0
    # First of two right at once, the other never found: half the area.
    assert trapezoidal_ap(rows(0), 2) == 0.5
    # Alone at the second place: half the way from precision 0 to 1/2.
    assert trapezoidal_ap(rows(1), 1) == 0.25
    assert trapezoidal_ap(rows(), 4) == 0.0


def test_precision_at_k_looks_no_further_than_the_last_right_image() -> None:
    ranks = rows(1, 2, 5)  # the 2nd, 3rd and 6th
    assert precision_at(ranks, 1) == 0
    assert precision_at(ranks, 5) == pytest.approx(2 / 5)
    assert precision_at(ranks, 10) == pytest.approx(3 / 6), "ten ask for more than the six that hold all of them"
    assert precision_at(rows(0, 1), 10) == 1.0


def test_it_is_not_the_average_precision_of_text_retrieval() -> None:
    """Nobody should replace it by scikit-learn's: here 1/2 against 1/4."""
    truth, scores = np.array([0, 1]), np.array([0.9, 0.1])
    assert average_precision_score(truth, scores) == 0.5
    assert trapezoidal_ap(rows(1), 1) == 0.25


def test_the_interval_of_a_mean_is_that_of_drawing_the_queries_anew() -> None:
    values = np.random.default_rng(1).uniform(0, 100, 70)
    interval = mean_interval(values)
    assert interval is not None
    # The mean of n draws has the deviation of the values divided by the root of n.
    spread = 1.96 * values.std() / math.sqrt(70)
    assert interval == pytest.approx((values.mean() - spread, values.mean() + spread), abs=0.15 * spread)
    assert mean_interval(values) == interval
    assert mean_interval(np.full(5, 3.0)) == (3.0, 3.0)
    assert mean_interval(values[:0]) is None


def test_queries_that_all_find_everything_leave_room_for_others_that_do_not() -> None:
    # Of a share p, 12 of 12 are hits with probability p^12: 2.5% at the lower end.
    assert mean_interval(np.full(12, 100.0)) == pytest.approx((100 * 0.025 ** (1 / 12), 100))
    assert mean_interval(np.zeros(12)) == pytest.approx((0, 100 - 100 * 0.025 ** (1 / 12)))


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
    assert mean_interval(values) == pytest.approx(drawn_anew(values, 2000), abs=room)


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
