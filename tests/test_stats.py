"""Intervals and p-values against hand computations and explicit resampling."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from eval.stats import (
    all_or_nothing,
    discordant,
    holm,
    mcnemar,
    mean_interval,
    paired_interval,
    paired_means,
    query_interval,
    wilson_interval,
)


def answers(both: int, only_first: int, only_second: int, neither: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return shuffled hits of two networks with the given number of images per outcome."""
    kinds = [(True, True)] * both + [(True, False)] * only_first + [(False, True)] * only_second
    pairs = np.array([*kinds, *[(False, False)] * neither], dtype=np.bool_)
    return tuple(np.random.default_rng(0).permutation(pairs).T)  # type: ignore[return-value]


@pytest.mark.parametrize(("right", "count"), [(320, 400), (0, 20), (7, 7)])
def test_wilson_interval_matches_formula(right: int, count: int) -> None:
    z, share = 1.959964, right / count
    centre, half = share + z**2 / (2 * count), z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    expected = [100 * (centre + sign * half) / (1 + z**2 / count) for sign in (-1, 1)]
    assert wilson_interval(np.arange(count) < right) == pytest.approx(expected, abs=1e-4)
    assert np.isnan(wilson_interval(np.zeros(0, dtype=bool))).all()


def test_query_interval_is_clopper_pearson_if_all_values_are_0_or_100() -> None:
    # 12 of 12 trials are hits with probability p^12, which is 2.5% at the lower bound.
    expected = (100 * 0.025 ** (1 / 12), 100)
    assert all_or_nothing(True, 12) == query_interval(np.full(12, 100.0)) == pytest.approx(expected)
    assert query_interval(np.zeros(12)) == pytest.approx((0, 100 - expected[0]))
    assert query_interval(np.full(5, 3.0)) == (3.0, 3.0)
    assert query_interval(np.zeros(0)) is None


@pytest.mark.parametrize("values", [[50.0], [100.0], [2.0] * 5, [2.0, 2.00001], [100.0] * 5])
def test_t_interval_of_single_or_equal_values_is_none(values: list[float]) -> None:
    gains = np.array(values)
    assert paired_means(gains * 0, gains) == (None, None)
    assert mean_interval(gains) is None


def test_mean_interval_is_students_t_interval_clipped_at_100() -> None:
    low, high = mean_interval(np.array([50.0, 52.0, 51.0])) or (0, 0)
    assert (low, high) == pytest.approx((51 - 4.302653 / 3**0.5, 51 + 4.302653 / 3**0.5))
    assert (mean_interval(np.array([100.0, 99.0, 90.0])) or (0, 0))[1] == 100


def test_paired_means_p_value_matches_permutation_test() -> None:
    random = np.random.default_rng(0)
    first = random.uniform(20, 80, 70)
    second = first + 0.7 + random.normal(0, 3, 70)
    exchanged = stats.permutation_test((second - first,), np.mean, permutation_type="samples", n_resamples=5000, rng=1)
    assert 0.01 < exchanged.pvalue < 0.5
    assert paired_means(first, second)[1] == pytest.approx(exchanged.pvalue, abs=0.03)


def test_mcnemar_matches_hand_computation() -> None:
    assert discordant(*answers(5, 3, 7, 2)) == (3, 7)
    # Twice the probability of at most three heads in ten coin flips.
    assert mcnemar(3, 7) == pytest.approx(2 * (1 + 10 + 45 + 120) / 1024)
    assert mcnemar(0, 0) == mcnemar(4, 4) == 1.0
    assert mcnemar(0, 5000) == 0.0


def test_paired_interval_matches_bootstrap_of_images() -> None:
    first, second = answers(200, 30, 60, 110)
    chosen = np.random.default_rng(1).integers(0, len(first), (10_000, len(first)))
    by_hand = 100 * (second[chosen].mean(axis=1) - first[chosen].mean(axis=1))
    assert paired_interval(first, second) == pytest.approx(np.percentile(by_hand, [2.5, 97.5]), abs=0.3)
    assert paired_interval(first, second) == paired_interval(first, second), "the interval is not reproducible"
    assert paired_interval(first, first) is None, "equal answers give an interval of zero width"


def test_holm_matches_step_down_procedure() -> None:
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])  # 0.01 * 3, 0.02 * 2, 0.03 * 1, ascending
    assert holm([]) == []
    for p_values in itertools.product([0.001, 0.012, 0.02, 0.04, 0.3], repeat=3):
        rejected = set()
        for rank, index in enumerate(np.argsort(p_values, kind="stable")):
            if p_values[index] > 0.05 / (3 - rank):
                break
            rejected.add(int(index))
        assert {index for index, p in enumerate(holm(p_values)) if p <= 0.05} == rejected


# ---- means over queries


def drawn_anew(values: NDArray[np.float64], draws: int) -> NDArray[np.float64]:
    """Compute the bootstrap interval by its definition, resampling the queries."""
    rng = np.random.default_rng(5)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(draws)]
    return np.percentile(means, [2.5, 97.5])


@pytest.mark.parametrize("count", [60, 3000])
@pytest.mark.parametrize("shape", ["even", "hits", "mostly nothing"])
def test_query_interval_matches_bootstrap_of_queries(count: int, shape: str) -> None:
    rng = np.random.default_rng(2)
    values = {
        "even": rng.uniform(0, 100, count),
        "hits": 100.0 * (rng.random(count) < 0.1),
        "mostly nothing": 100 * rng.beta(0.05, 2, count),
    }[shape]
    # Tolerance: 0.25 standard errors of the mean; a quantile at 2.5 % of 2,000 normal draws has an error of 0.06.
    # Means of hits lie on a grid, so either quantile may also move by one grid step.
    room = 0.25 * values.std() / math.sqrt(count) + (100 / count if shape == "hits" else 0)
    assert query_interval(values) == query_interval(values) == pytest.approx(drawn_anew(values, 2000), abs=room)
