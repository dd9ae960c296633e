"""Is the mean of one network's values another than that of the other's, on the same queries or the same draws?

n values each, percent, value i of both of the same query (many, of any distribution) or the same draw (few).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from eval.compare.significance import DRAWS, LEVEL, SEED, percentiles

Values = NDArray[np.float64]
Interval = tuple[float, float]

_CELLS = 200_000_000
"""Values drawn for one interval or p: seconds. Beyond 20,000 queries that means fewer resamplings, at least 1,000."""
_LEAST = 1000
_AT_ONCE = 2_000_000
_ROUNDING = 2e-5
"""Percentage points that differences of equal size may be apart, as a result file keeps values as float32."""


# ---- queries


def query_interval(first: Values, second: Values) -> Interval:
    """Percentile bootstrap interval of the mean of ``second - first``: queries are drawn, each with both values."""
    return percentiles(_resampled_means(second - first), LEVEL)


def unpaired_query_interval(first: Values, second: Values) -> Interval:
    """The same for different queries: those of each are drawn by themselves."""
    one, other = _resampled_means(first, SEED), _resampled_means(second, SEED + 1)
    repeats = min(len(one), len(other))
    return percentiles(other[:repeats] - one[:repeats], LEVEL)


def randomisation_p(first: Values, second: Values) -> float:
    """The two-sided p-value of Fisher's randomisation test: were each query's two values exchanged by a fair coin, how
    often would the means be at least as far apart? (Smucker, Allan and Carterette, CIKM 2007, for retrieval.)

    Exact for up to 13 queries that differ, as all ways are tried; else from 10,000 random ones (fewer beyond 20,000
    queries), and never 0.
    """
    difference = (second - first)[second != first]
    observed = abs(float(difference.sum())) * (1 - 1e-12)  # a sum's last bit depends on its order
    if 2 ** len(difference) <= DRAWS:
        ways = np.arange(2 ** len(difference))[:, None] >> np.arange(len(difference)) & 1
        return float((np.abs((1 - 2 * ways) @ difference) >= observed).mean())
    random, sums = np.random.default_rng(SEED), []
    for count in _portions(len(difference)):
        sums.append((1 - 2 * random.integers(0, 2, (count, len(difference)))) @ difference)
    extreme = np.abs(np.concatenate(sums)) >= observed
    return (1 + int(extreme.sum())) / (1 + len(extreme))


def _resampled_means(values: Values, seed: int = SEED) -> Values:
    random = np.random.default_rng(seed)
    means = [
        values[random.integers(0, len(values), (count, len(values)))].mean(axis=1) for count in _portions(len(values))
    ]
    return np.concatenate(means)


def _portions(size: int) -> list[int]:
    """How many samples of so many values to draw, in portions that fit into the memory."""
    repeats = min(DRAWS, max(_LEAST, _CELLS // size))
    portion = max(1, _AT_ONCE // size)
    return [min(portion, repeats - done) for done in range(0, repeats, portion)]


# ---- draws


def draw_interval(values: Values) -> Interval | None:
    """Student's t interval of a mean; None where :func:`spread_is_unknown`."""
    if spread_is_unknown(values):
        return None
    mean, error = float(values.mean()), _error(values)
    half = student_quantile(LEVEL, len(values) - 1) * error
    return mean - half, mean + half


def draw_p(differences: Values) -> float | None:
    """The two-sided p-value of Student's t-test that the mean is 0; None where :func:`spread_is_unknown`."""
    if spread_is_unknown(differences):
        return None
    mean, error = float(differences.mean()), _error(differences)
    return 1 - student_within(abs(mean) / error, len(differences) - 1)


def spread_is_unknown(values: Values) -> bool:
    """Whether they do not tell how far others would be: a single value, or several that are all the same.

    Accuracies are multiples of one image's share, so that a few draws may agree by chance: an interval of no width, and
    a p of 0, would be false.
    """
    return len(values) < 2 or float(np.ptp(values)) <= _ROUNDING


def student_within(t: float, freedom: int) -> float:
    """How much of Student's distribution lies between -t and t (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    Args:
        t: 0 or more.
        freedom: degrees of freedom, at least 1.
    """
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for number in range(2 + odd, freedom - 1, 2):
        term *= (number - 1) / number * math.cos(angle) ** 2
        total += term
    within = math.sin(angle) * total
    return 2 / math.pi * (angle + within) if odd else within


def student_quantile(level: float, freedom: int) -> float:
    """The t for which :func:`student_within` is ``level``, by bisection over the angle."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        inside = student_within(math.tan(middle) * math.sqrt(freedom), freedom) < level
        low, high = (middle, high) if inside else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _error(values: Values) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values))
