"""Confusion between classes: the per-class table and the confusion matrix."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.knn.confusion import CELLS, NAMED, cell_shares, draw_confusion, write_per_class

NAMES = ("cat", "dog", "red, fox", "wolf")
LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 2, 7])
PREDICTED = np.array([0, 1, 2, 1, 1, 0, 2, 2, 0])


def test_per_class_csv_has_images_top1_and_most_frequent_confusion(tmp_path: Path) -> None:
    write_per_class(tmp_path / "classes.csv", PREDICTED, LABELS, NAMES)
    with open(tmp_path / "classes.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["class", "images", "top1", "most_confused_with", "confused"]
    assert rows == [
        ["cat", "4", "25.00", "dog", "50.00"],
        ["dog", "3", "33.33", "cat", "33.33"],  # a tie between cat and fox: the lower class number
        ["red, fox", "1", "100.00", "", ""],
        ["wolf", "0", "", "", ""],
        ["7", "1", "0.00", "cat", "100.00"],  # no name for this class number
    ]


def test_cell_shares_are_row_percentages_and_adjacent_classes_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = np.array([0, 1, 2, 7])
    assert cell_shares(PREDICTED, LABELS, classes) == pytest.approx(
        np.array([[25, 50, 25, 0], [100 / 3, 100 / 3, 100 / 3, 0], [0, 0, 100, 0], [100, 0, 0, 0]])
    )
    no_image = cell_shares(np.array([3, 3]), np.array([0, 0]), np.array([0, 3]))
    assert no_image[0].tolist() == [0, 100]
    assert np.isnan(no_image[1]).all()
    assert cell_shares(np.arange(1000), np.arange(1000), np.arange(1000)).shape == (CELLS, CELLS)
    monkeypatch.setattr("eval.knn.confusion.CELLS", 2)
    assert cell_shares(PREDICTED, LABELS, classes) == pytest.approx(np.array([[500 / 7, 200 / 7], [50, 50]]))


@pytest.mark.parametrize("classes", [1, NAMED, NAMED + 1])
def test_confusion_plot_size_is_bounded_for_many_classes_and_long_names(classes: int, tmp_path: Path) -> None:
    labels = np.repeat(np.arange(classes), 3)
    names = [f"class ${number}$ with a name that is much too long" for number in range(classes)]
    draw_confusion(tmp_path / "right.png", labels, labels, names, "k-NN")
    with Image.open(tmp_path / "right.png") as image:
        assert 300 < max(image.size) < 2400
