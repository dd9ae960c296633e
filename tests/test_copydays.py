"""Copydays: which pictures belong together, and what is scored, by hand and by brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dino_xcit.errors import InputError
from eval.retrieval.benchmarks import open_copydays, score_copies


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (len(path.name), 5, 9)).save(path)


def copies(*arguments: Any) -> NDArray[np.float64]:
    return score_copies(*arguments) / 100


def layout(folder: Path, *names: str) -> Path:
    for name in names:
        picture(folder / name)
    return folder


def test_names_without_their_last_two_digits_tell_what_belongs_together(tmp_path: Path) -> None:
    layout(
        tmp_path, "original/200000.jpg", "original/200100.jpg", "original/215600.jpg", "strong/200001.jpg",
        "strong/200002.jpg", "strong/215699.JPG", "jpegqual/3/200100.jpg", "jpegqual/10/200000.jpg",
        "crops/80/200000.jpg",
    )  # fmt: skip
    blocks = open_copydays(tmp_path)
    assert list(blocks) == ["original", "strong", "jpegqual/3", "jpegqual/10", "crops/80"]
    assert blocks["original"][1].tolist() == [2000, 2001, 2156]
    source, scenes = blocks["strong"]
    assert scenes.tolist() == [2000, 2000, 2156]
    assert [Path(source.name(row)).name for row in range(3)] == ["200001.jpg", "200002.jpg", "215699.JPG"]


def test_what_is_no_copydays_is_refused(tmp_path: Path) -> None:
    for names, wrong in (
        ((), "original"), (("original/200000.jpg",), "strong"), (("strong/200001.jpg", "strong/200101.jpg"), "without"),
        (("strong/copy.jpg",), "strong"),
    ):  # fmt: skip
        layout(tmp_path, *names)
        with pytest.raises(InputError, match=wrong):
            open_copydays(tmp_path)


def test_average_precisions_by_hand() -> None:
    """A database of five directions; queries' cosines can be read off their entries.

    Query 1 (scene 7) ranks rows 2 0 3 1 4. Scene 7 is row 0, at the second place: (0 + 1/2) / 2 = 1/4.
    Query 2 (scene 8) ranks rows 4 3 1 0 2. Scene 8 is rows 1 and 3, second and third:
        (0 + 1/2) / 2 = 1/4 and (1/2 + 2/3) / 2 = 7/12, together 10/12, each half as wide: 5/12.
    Of the first two alone, query 2 finds row 3 only: 1/4 / 2 = 1/8. Row 2 is a distractor, and row 4.
    """
    database, scenes = np.eye(5, dtype=np.float32) * 3, np.array([7, 8, -1, 8, -1])
    queries = np.array([[0.8, 0.4, 0.9, 0.6, 0.1], [0.3, 0.5, 0.1, 0.7, 0.9]], dtype=np.float32)
    asked = np.array([7, 8])
    assert copies(queries, asked, database, scenes, 5) == pytest.approx([1 / 4, 5 / 12])
    assert copies(queries, asked, database, scenes, 2) == pytest.approx([1 / 4, 1 / 8])
    assert copies(queries, asked, database, scenes, 1) == pytest.approx([0, 0])


def test_equal_pictures_rank_in_the_order_of_the_database() -> None:
    same = np.ones((3, 2), dtype=np.float32)
    found = copies(same[:1], np.array([5]), same, np.array([1, 5, 2]), 3)
    assert found.tolist() == [0.25]
