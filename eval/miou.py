"""Scores of segmentations, from one confusion matrix that is summed over images. K: classes; h, w: size of a mask."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dino_xcit.data.masks import IGNORE
from dino_xcit.errors import InputError


def confusion(
    predicted: NDArray[np.integer], target: NDArray[np.integer], classes: int, ignore: int = IGNORE
) -> NDArray[np.int64]:
    """Count the pixels of each pair of classes.

    Args:
        predicted: [h, w] or any other shape, 0 to K - 1.
        target: of the same shape; pixels with the label ``ignore`` are left out.

    Returns:
        [K, K]: rows are classes of the target, columns are predicted classes. Sums over images are valid.

    Raises:
        ValueError: the shapes differ, or a label is not from 0 to K - 1.
    """
    if predicted.shape != target.shape:
        raise ValueError(f"the prediction has shape {predicted.shape}, expected that of the target, {target.shape}")
    scored = target != ignore
    rows, columns = target[scored].astype(np.int64), predicted[scored].astype(np.int64)
    for name, labels in (("target", rows), ("prediction", columns)):
        if labels.size and not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError(
                f"the {name} has labels from {labels.min()} to {labels.max()}, expected 0 to {classes - 1}"
            )
    return np.bincount(rows * classes + columns, minlength=classes**2).reshape(classes, classes)


def class_iou(matrix: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return intersection over union in percent, [K]; NaN for classes in neither target nor prediction."""
    intersection = np.diag(matrix).astype(np.float64)
    union = matrix.sum(0) + matrix.sum(1) - intersection
    return 100 * np.divide(intersection, union, out=np.full(len(matrix), np.nan), where=union > 0)


def mean_iou(matrix: NDArray[np.int64]) -> float:
    """Return the mean of :func:`class_iou` over the classes that occur, in percent.

    Raises:
        InputError: no pixel was scored.
    """
    if not matrix.any():
        raise InputError("all pixels of the masks have the ignored label: check the masks and the label")
    return float(np.nanmean(class_iou(matrix)))


def pixel_accuracy(matrix: NDArray[np.int64]) -> float:
    """Return the share of correct pixels in percent; 0 if no pixel was scored."""
    return float(100 * np.trace(matrix) / max(1, matrix.sum()))
