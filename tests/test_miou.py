"""Scores of segmentations, against counts by hand and scikit-learn; colours and overlays."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score

from dino_xcit.errors import InputError
from eval.miou import class_iou, confusion, mean_iou, pixel_accuracy
from eval.palette import OPACITY, colours, overlay


def test_counts_by_hand() -> None:
    target = np.array([[0, 0, 1], [1, 255, 255]], dtype=np.uint8)
    predicted = np.array([[0, 1, 1], [1, 0, 3]], dtype=np.uint8)
    matrix = confusion(predicted, target, 4)
    expected = np.zeros((4, 4), dtype=np.int64)
    expected[0, 0], expected[0, 1], expected[1, 1] = 1, 1, 2
    np.testing.assert_array_equal(matrix, expected)
    np.testing.assert_allclose(class_iou(matrix), [50, 200 / 3, np.nan, np.nan])
    assert mean_iou(matrix) == pytest.approx((50 + 200 / 3) / 2)
    assert pixel_accuracy(matrix) == 75


def test_a_class_that_is_only_predicted_counts_as_zero() -> None:
    matrix = confusion(np.array([0, 1]), np.array([0, 0]), 3)
    np.testing.assert_allclose(class_iou(matrix), [50, 0, np.nan])
    assert mean_iou(matrix) == 25


@pytest.mark.parametrize("ignore", [255, 2])
def test_sums_over_images_equal_scikit_learn_on_all_pixels(ignore: int) -> None:
    generator = np.random.default_rng(0)
    targets = generator.integers(0, 5, (3, 20, 30)).astype(np.uint8)
    targets[generator.random(targets.shape) < 0.2] = ignore
    guesses = generator.integers(0, 5, targets.shape)
    matrix = sum(confusion(guess, target, 5, ignore) for guess, target in zip(guesses, targets, strict=True))
    scored = targets != ignore
    np.testing.assert_array_equal(matrix, confusion_matrix(targets[scored], guesses[scored], labels=range(5)))
    wanted = jaccard_score(targets[scored], guesses[scored], average=None, labels=range(5))
    np.testing.assert_allclose(class_iou(matrix), 100 * wanted)


def test_invalid_labels_and_shapes() -> None:
    fine = np.zeros((2, 2), dtype=np.uint8)
    for predicted, target in ((fine, fine + 7), (fine + 7, fine), (fine.astype(np.int64) - 1, fine), (fine[:1], fine)):
        with pytest.raises(ValueError, match="expected"):
            confusion(predicted, target, 5)


def test_without_scored_pixels() -> None:
    matrix = confusion(np.zeros(4, dtype=np.int64), np.full(4, 255), 3)
    assert not matrix.any()
    assert np.isnan(class_iou(matrix)).all()
    assert pixel_accuracy(matrix) == 0
    with pytest.raises(InputError):
        mean_iou(matrix)


def test_colours_are_distinct_and_stable() -> None:
    found = colours(255).astype(int)
    assert len(np.unique(found, axis=0)) == 255
    np.testing.assert_array_equal(colours(21), found[:21])
    assert colours(0).shape == (0, 3)
    distances = np.abs(found[:21, None] - found[None, :21]).sum(-1) + 1000 * np.eye(21, dtype=int)
    assert distances.min() > 70  # of 765


def test_overlay_blends_and_leaves_ignored_pixels() -> None:
    image = Image.fromarray(np.full((2, 3, 3), 100, dtype=np.uint8))
    labels = np.array([[0, 1, 255], [1, 255, 0]], dtype=np.uint8)
    palette = np.array([[200, 0, 100], [0, 50, 0]], dtype=np.uint8)
    found = np.asarray(overlay(image, labels, palette)).astype(float)
    np.testing.assert_array_equal(found[labels == 255], 100)
    for label, colour in enumerate(palette):
        wanted = (1 - OPACITY) * 100 + OPACITY * colour.astype(float)
        np.testing.assert_allclose(found[labels == label], np.tile(wanted, (2, 1)), atol=0.5)
