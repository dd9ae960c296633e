"""Paired significance against SciPy, against counting by hand, and against resampling image by image."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest

from eval.compare.significance import discordant, holm, mcnemar, paired_interval, unpaired_interval


def answers(both: int, only_first: int, only_second: int, neither: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Hits of two networks with so many images of each kind, shuffled."""
    kinds = [(True, True)] * both + [(True, False)] * only_first + [(False, True)] * only_second
    pairs = np.array([*kinds, *[(False, False)] * neither], dtype=np.bool_)
    return tuple(np.random.default_rng(0).permutation(pairs).T)  # type: ignore[return-value]


def test_only_images_on_which_the_two_disagree_are_counted() -> None:
    assert discordant(*answers(5, 3, 7, 2)) == (3, 7)


@pytest.mark.parametrize("split", [(0, 0), (1, 0), (0, 5), (3, 7), (7, 3), (50, 50), (120, 98), (1030, 900)])
def test_p_values_are_those_of_scipys_binomial_test(split: tuple[int, int]) -> None:
    expected = binomtest(split[0], sum(split), 0.5).pvalue if sum(split) else 1.0
    assert mcnemar(*split) == pytest.approx(expected, rel=1e-9)


def test_three_against_seven_by_hand() -> None:
    """2 * (1 + 10 + 45 + 120) / 1024: all ways in which ten coins fall at most three times on one side, and double."""
    assert mcnemar(3, 7) == 352 / 1024


def test_an_overwhelming_difference_is_zero_and_not_an_error() -> None:
    assert mcnemar(0, 5000) == 0.0
    assert 0 < mcnemar(0, 1000) < 1e-300


def test_the_paired_interval_is_that_of_drawing_images_with_both_answers() -> None:
    first, second = answers(200, 30, 60, 110)
    random = np.random.default_rng(1)
    chosen = random.integers(0, len(first), (10_000, len(first)))
    by_hand = 100 * (second[chosen].mean(axis=1) - first[chosen].mean(axis=1))
    assert paired_interval(first, second) == pytest.approx(np.percentile(by_hand, [2.5, 97.5]), abs=0.3)
    assert paired_interval(first, second) == paired_interval(first, second), "the same file gives the same figures"


def test_pairs_tell_smaller_differences_than_two_results_on_different_images() -> None:
    first, second = answers(1000, 10, 40, 950)
    paired, apart = paired_interval(first, second), unpaired_interval(first, second)
    assert paired[0] > 0 > apart[0]
    assert apart[1] > paired[1]


def test_results_on_different_images_may_have_different_numbers_of_them() -> None:
    few, many = np.arange(100) < 50, np.arange(10_000) < 6000
    low, high = unpaired_interval(few, many)
    deviation = 100 * (0.25 / 100 + 0.24 / 10_000) ** 0.5
    assert (low, high) == pytest.approx((10 - 1.96 * deviation, 10 + 1.96 * deviation), abs=0.6)


def test_holm_by_hand() -> None:
    """Sorted: 0.01 * 3, 0.02 * 2, 0.03 * 1, each at least the one before, in the order that was given."""
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_holm_rejects_what_the_step_down_procedure_rejects() -> None:
    for p_values in itertools.product([0.001, 0.012, 0.02, 0.04, 0.3], repeat=3):
        rejected = set()
        for rank, index in enumerate(np.argsort(p_values, kind="stable")):
            if p_values[index] > 0.05 / (3 - rank):
                break
            rejected.add(int(index))
        assert {index for index, p in enumerate(holm(p_values)) if p <= 0.05} == rejected
