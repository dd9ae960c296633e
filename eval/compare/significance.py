"""Are two networks' accuracies on the same images different? n images; hits [n] of booleans, one entry an image.

Where both networks saw the same images, only the images count on which one is right and the other wrong. Two intervals
that overlap say little: they ignore that most images are easy, or hard, for both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Hits = NDArray[np.bool_]

DRAWS, LEVEL, SEED = 10_000, 0.95, 0


def discordant(first: Hits, second: Hits) -> tuple[int, int]:
    """How many images the first alone gets right, and how many the second alone does."""
    return int((first & ~second).sum()), int((second & ~first).sum())


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value of McNemar's test: were each discordant image a fair coin, how often would the split
    be at least as uneven?

    McNemar, Psychometrika 12 (1947), with the binomial distribution in the place of chi-squared: exact for any count.
    Computed with whole numbers; below 1e-308 it is 0.
    """
    coins = only_first + only_second
    term = tail = 1
    for count in range(1, min(only_first, only_second) + 1):
        term = term * (coins - count + 1) // count
        tail += term
    return min(1.0, 2 * tail / 2**coins)


def paired_interval(first: Hits, second: Hits, draws: int = DRAWS, level: float = LEVEL) -> tuple[float, float]:
    """Percentile bootstrap interval, in percentage points, of the second's accuracy minus the first's.

    Images are drawn with replacement, each with both of its answers. The two counts of discordant images in such a
    sample are multinomial, and are drawn directly.
    """
    only_first, only_second = discordant(first, second)
    images = len(first)
    shares = [only_first / images, only_second / images, (images - only_first - only_second) / images]
    counts = np.random.default_rng(SEED).multinomial(images, shares, size=draws)
    return percentiles(100.0 * (counts[:, 1] - counts[:, 0]) / images, level)


def unpaired_interval(first: Hits, second: Hits, draws: int = DRAWS, level: float = LEVEL) -> tuple[float, float]:
    """The same for two results on different images, each resampled by itself."""
    random = np.random.default_rng(SEED)
    one, other = (random.binomial(len(hits), float(hits.mean()), size=draws) / len(hits) for hits in (first, second))
    return percentiles(100.0 * (other - one), level)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for being several, in their order: the chance of any false alarm among them stays below what
    is read off, however they depend on each other (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def percentiles(values: NDArray[np.float64], level: float) -> tuple[float, float]:
    """The middle of a sample that holds the share ``level`` of it."""
    tail = 50 * (1 - level)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
