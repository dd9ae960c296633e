"""The measures of DAVIS 2017 (arXiv 1704.00675; davis2017-evaluation). h, w: size of a mask, F: frames, P: points.

J is the intersection over union of an object's mask. F is the F-measure of its boundary: a point of a boundary is right
if the other boundary has a point within the tolerance, 0.8% of the image's diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

Mask = NDArray[np.bool_]

TOLERANCE = 0.008
"""Tolerance of boundary points as a share of the diagonal; rounded up to whole pixels."""


def region_similarity(predicted: Mask, target: Mask) -> float:
    """Return J of masks [h, w], 0 to 1; 1 if both are empty."""
    union = int((predicted | target).sum())
    return int((predicted & target).sum()) / union if union else 1.0


def boundary_measure(predicted: Mask, target: Mask) -> float:
    """Return F of masks [h, w], 0 to 1; 1 if neither has a boundary and 0 if only one has."""
    found, expected = np.argwhere(boundary(predicted)), np.argwhere(boundary(target))
    if not len(found) or not len(expected):
        return float(len(found) == len(expected))
    tolerance = math.ceil(TOLERANCE * math.hypot(*target.shape))
    precision, recall = _share_near(found, expected, tolerance), _share_near(expected, found, tolerance)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask: Mask) -> Mask:
    """Return the pixels [h, w] that differ from their right, lower or lower right neighbour inside the image."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    edges: Mask = (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])
    return edges


def _share_near(points: NDArray[np.int64], others: NDArray[np.int64], tolerance: int) -> float:
    """Return the share of points [P, 2] with one of ``others`` within the tolerance: a dilation with a disk."""
    return float((KDTree(others).query(points)[0] <= tolerance).mean())


def score_frame(
    predicted: NDArray[np.integer], target: NDArray[np.integer], objects: Sequence[int]
) -> NDArray[np.float64]:
    """Return J and F in percent of each object, [objects, 2], for label maps [h, w] of one frame."""
    pairs = [(predicted == number, target == number) for number in objects]
    return 100 * np.array([(region_similarity(*pair), boundary_measure(*pair)) for pair in pairs])
