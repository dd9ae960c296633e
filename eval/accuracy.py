"""Shares of images that are classified rightly, and how sure they are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dino_xcit.errors import InputError


def accuracy(predictions: NDArray[np.int64], labels: NDArray[np.int64] | None, top: int) -> float:
    """Percent of test images whose label is among the first ``top`` predictions; NaN for no image at all."""
    hits = correct(predictions, labels, top)
    return 100.0 * float(hits.mean()) if len(hits) else float("nan")


def correct(predictions: NDArray[np.int64], labels: NDArray[np.int64] | None, top: int) -> NDArray[np.bool_]:
    """[test images]: whether the label is among the first ``top`` predictions [test images, up to 5].

    Raises:
        InputError: there are no labels, or not one an image.
    """
    if labels is None:
        raise InputError("the test images have no labels: accuracy cannot be measured")
    if len(labels) != len(predictions):
        raise InputError(f"{len(predictions)} predictions but {len(labels)} labels")
    hits: NDArray[np.bool_] = (predictions[:, :top] == np.asarray(labels)[:, None]).any(axis=1)
    return hits


def bootstrap_interval(
    hits: NDArray[np.bool_], draws: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval, in percent, of a share of hits; NaN for no image at all.

    Resampling n images with replacement makes the number of hits binomial(n, share), which is drawn directly. Where all
    of them are hits, or none, every draw is the same, which is no certainty: Clopper and Pearson's exact interval then
    (Biometrika 26, 1934), whose open end is tail^(1/n).
    """
    if not len(hits):
        return float("nan"), float("nan")
    if hits.all() or not hits.any():
        return all_or_nothing(bool(hits.all()), len(hits), level)
    counts = np.random.default_rng(seed).binomial(len(hits), float(hits.mean()), size=draws)
    tail = 50 * (1 - level)
    low, high = np.percentile(100.0 * counts / len(hits), [tail, 100 - tail])
    return float(low), float(high)


def all_or_nothing(hit: bool, count: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's interval, in percent, of a share of which ``count`` of ``count``, or none, are hits.

    It holds for the mean of any values from 0 to 100% as well: to see only the greatest is then no likelier than for
    hits of the same mean.
    """
    open_end = 100.0 * float(((1 - level) / 2) ** (1 / count))
    return (open_end, 100.0) if hit else (0.0, 100.0 - open_end)
