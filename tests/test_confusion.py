"""Which classes are taken for which: the table, the order in the picture, the picture."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_xcit.errors import InputError
from eval.knn.confusion import confusions, per_class, write_per_class
from eval.knn.confusion_figure import NAMED, cell_shares, draw_confusion, side_by_side

NAMES = ("cat", "dog", "red, fox", "wolf")
LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 2, 7])
PREDICTED = np.array([0, 1, 2, 1, 1, 0, 2, 2, 0])


def test_every_class_has_its_images_top1_and_rival() -> None:
    results = per_class(PREDICTED, LABELS, NAMES)
    assert {row.name: (row.images, row.right, row.rival, row.taken_for_rival) for row in results} == {
        "cat": (4, 1, "dog", 2),
        "dog": (3, 1, "cat", 1),  # once for the cat, once for the fox: the lower number
        "red, fox": (1, 1, "", 0),
        "wolf": (0, 0, "", 0),
        "7": (1, 0, "cat", 1),  # a class without a name
    }
    assert [row.top1 for row in results] == [25.0, pytest.approx(100 / 3), 100.0, None, 0.0]


def test_counts_are_those_of_a_table_of_all_classes() -> None:
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 30, 500), rng.integers(0, 30, 500)
    expected = np.zeros((30, 30), dtype=int)
    np.add.at(expected, (labels, predicted), 1)
    found = np.zeros_like(expected)
    for pair, count in confusions(predicted, labels).items():
        found[pair] = count
    assert (found == expected).all()


def test_the_file_is_read_by_any_reader_of_csv(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "classes.csv"
    write_per_class(path, per_class(PREDICTED, LABELS, NAMES))
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"class": "cat", "images": "4", "top1": "25.00", "most_confused_with": "dog", "confused": "50.00"}
    assert rows[2]["class"] == "red, fox"
    assert rows[3] == {"class": "wolf", "images": "0", "top1": "", "most_confused_with": "", "confused": ""}
    assert [path.name for path in path.parent.iterdir()] == ["classes.csv"]


def test_a_file_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_per_class(tmp_path / "file" / "classes.csv", [])
    with pytest.raises(InputError, match="File name too long; choose another file"):
        write_per_class(tmp_path / f"{'c' * 260}.csv", [])
    with pytest.raises(InputError, match="cannot write"):
        draw_confusion(tmp_path / "file" / "x.png", PREDICTED, LABELS, NAMES, "k-NN")


def test_classes_taken_for_each_other_stand_side_by_side() -> None:
    # Five pairs of classes, far apart in number, each taken for its partner; within a pair nothing else.
    partner = np.array([5, 6, 7, 8, 9, 0, 1, 2, 3, 4])
    labels = np.repeat(np.arange(10), 10)
    predicted = np.where(np.arange(100) % 10 < 4, partner[labels], labels)
    order = side_by_side(confusions(predicted, labels), list(range(10)))
    assert sorted(order) == list(range(10))
    assert all(abs(order.index(one) - order.index(int(partner[one]))) == 1 for one in range(10))


def test_a_chain_of_confusions_is_put_in_its_order() -> None:
    chain = [3, 0, 4, 1, 2]
    labels, predicted = np.array(chain[:-1] + chain), np.array(chain[1:] + chain)
    order = side_by_side(confusions(predicted, labels), list(range(5)))
    assert order in (chain, chain[::-1])


def test_a_cell_is_the_share_of_its_rows_images_and_neighbours_may_share_it() -> None:
    pairs = confusions(PREDICTED, LABELS)
    assert cell_shares(pairs, [2, 0, 1, 7], 4) == pytest.approx(
        np.array([[100, 0, 0, 0], [25, 25, 50, 0], [100 / 3, 100 / 3, 100 / 3, 0], [0, 100, 0, 0]])
    )
    assert cell_shares(pairs, [2, 0, 1, 7], 2) == pytest.approx(np.array([[60, 40], [75, 25]]))
    no_image = cell_shares({(0, 3): 2}, [0, 3], 2)
    assert no_image[0].tolist() == [0, 100]
    assert np.isnan(no_image[1]).all()


def dark_cells(path: Path) -> float:
    """The share of the picture that is as dark as the cell of a class that is nearly always right."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    return float(((pixels[..., 2] > 90) & (pixels[..., 0] < 40)).mean())


@pytest.mark.parametrize("classes", [1, 2, 10, NAMED, NAMED + 1, 1000])
def test_the_picture_shows_the_diagonal_where_all_is_right_and_none_where_nothing_is(
    classes: int, tmp_path: Path
) -> None:
    labels = np.repeat(np.arange(classes), 3)
    names = [f"class ${number}$ with a name that is much too long" for number in range(classes)]
    draw_confusion(tmp_path / "right.png", labels, labels, names, "k-NN")
    wrong = (labels + 1 + np.arange(len(labels)) % 3) % (classes + 3)
    draw_confusion(tmp_path / "wrong.png", wrong, labels, None, "k-NN")
    assert dark_cells(tmp_path / "right.png") > dark_cells(tmp_path / "wrong.png")
    with Image.open(tmp_path / "right.png") as image:
        assert max(image.size) < 2400
