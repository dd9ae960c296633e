"""Means over queries and draws: against SciPy, against every way to exchange, and against resampling by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from eval.compare.means import (
    draw_interval,
    draw_p,
    query_interval,
    randomisation_p,
    student_quantile,
    student_within,
    unpaired_query_interval,
)


def two(count: int, gain: float, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Average precisions of the same queries: hard for both, or easy for both."""
    random = np.random.default_rng(seed)
    first = random.uniform(20, 80, count)
    return first, first + gain + random.normal(0, 3, count)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 30, 101])
def test_students_distribution_is_scipys(freedom: int) -> None:
    for t in (0.0, 0.3, 1.0, 2.776, 12.0):
        expected = 1 - 2 * stats.t.sf(t, freedom)
        assert student_within(t, freedom) == pytest.approx(expected, abs=1e-12)
    for level in (0.5, 0.95, 0.999):
        assert student_quantile(level, freedom) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-6)


def test_draws_are_tested_as_scipys_paired_t_test_does() -> None:
    first, second = two(5, 1.0)
    gains = second - first
    expected = stats.ttest_rel(second, first)
    assert draw_p(gains) == pytest.approx(expected.pvalue, rel=1e-9)
    assert draw_interval(gains) == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-6)


@pytest.mark.parametrize("values", [[50.0], [2.0] * 5, [0.0] * 5, [2.0, 2.00001], [100 / 3] * 3])
def test_a_single_draw_and_draws_that_are_all_the_same_say_nothing_about_others(values: list[float]) -> None:
    assert draw_interval(np.array(values)) is None
    assert draw_p(np.array(values)) is None, "it was 0, for want of a spread to divide by"


def test_p_of_few_queries_is_counted_over_every_way_to_exchange() -> None:
    first, second = two(6, 2.0)
    first, second = np.append(first, 50.0), np.append(second, 50.0)  # a query that does not differ says nothing
    difference = second - first
    sums = [abs(float(np.dot(signs, difference))) for signs in itertools.product((-1, 1), repeat=7)]
    assert randomisation_p(first, second) == np.mean(np.array(sums) >= abs(difference.sum()) - 1e-9)
    assert randomisation_p(first, first) == 1.0


def test_p_of_many_queries_is_scipys_permutation_test() -> None:
    first, second = two(70, 0.7)
    expected = stats.permutation_test(
        (second - first,), np.mean, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(1)
    )
    assert 0.01 < expected.pvalue < 0.5
    assert randomisation_p(first, second) == pytest.approx(expected.pvalue, abs=0.02)
    assert randomisation_p(first, first + 5) == 1 / 10_001, "never 0"


def test_the_interval_of_many_queries_is_that_of_resampling_them_in_pairs() -> None:
    first, second = two(200, 1.0)
    random = np.random.default_rng(9)
    gains = second - first
    means = [gains[random.integers(0, 200, 200)].mean() for _ in range(4000)]
    low, high = query_interval(first, second)
    assert (low, high) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.06)
    wide = unpaired_query_interval(first, second)
    assert wide[1] - wide[0] > 4 * (high - low), "as most of the spread is between easy and hard queries"


def test_very_many_queries_are_resampled_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = two(500, 0.5)
    usual = query_interval(first, second)
    monkeypatch.setattr("eval.compare.means._CELLS", 1_000_000)  # as 500 were 100,000
    assert query_interval(first, second) != usual
    assert query_interval(first, second) == pytest.approx(usual, abs=0.05)
    assert randomisation_p(first, first + 5) == 1 / 2_001
