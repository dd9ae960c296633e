"""Leave-one-out and Copydays metrics against hand computations and definitions, one query at a time in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_fixtures import unit
from numpy.typing import NDArray
from PIL import Image

import eval.retrieval.benchmarks
from dino_xcit.errors import InputError
from eval.retrieval.benchmarks import leave_one_out, open_copydays, score_copies


def on_a_circle(*degrees: float) -> NDArray[np.float32]:
    """Return points of different lengths at the given angles; their cosine falls with the angle between them."""
    angles = np.radians(degrees)
    lengths = np.linspace(1, 5, len(degrees))[:, None]
    return (lengths * np.stack([np.cos(angles), np.sin(angles)], axis=1)).astype(np.float32)


def by_definition(
    features: NDArray[np.float32], labels: NDArray[np.int64], ks: tuple[int, ...]
) -> list[tuple[list[bool], float, float]]:
    """Return hit at each k, R-precision and MAP@R (Musgrave et al., section 3.2) for each query."""
    rows = unit(features)
    out = []
    for query in range(len(rows)):
        others = [row for row in range(len(rows)) if row != query]
        others.sort(key=lambda row: -float(rows[row] @ rows[query]))
        right = [labels[row] == labels[query] for row in others]
        total = sum(right)
        if total:
            precisions = [sum(right[: i + 1]) / (i + 1) if right[i] else 0.0 for i in range(total)]
            out.append(([any(right[:k]) for k in ks], sum(right[:total]) / total, sum(precisions) / total))
    return out


def test_leave_one_out_matches_hand_computation() -> None:
    # Classes and angles: a 0, a 10, b 13, a 30, b 51; c 90 is the only image of its class. R = 2 for a and 1 for b.
    # Query a 0:  nearest 10 (a), 13 (b): right, wrong. R-precision 1/2, MAP@R (1 + 0) / 2 = 1/2.
    # Query a 10: nearest 13 (b), 0 (a): wrong, right. R-precision 1/2, MAP@R (0 + 1/2) / 2 = 1/4.
    # Query b 13: nearest 10 (a): both 0. The first b follows 10, 0 and 30: a hit at 4, not at 2.
    # Query a 30: nearest 13 (b), 10 (a): wrong, right. R-precision 1/2, MAP@R 1/4. With b at 50, 10 and 50 would tie.
    # Query b 51: nearest 30 (a): both 0. Next are 13 (38 away) and 90 (39 away): a hit at 2.
    features = on_a_circle(0, 10, 13, 30, 51, 90)
    found = leave_one_out(features, np.array([7, 7, 3, 7, 3, 9]), (1, 2, 4))
    assert (found.queries.tolist(), found.alone) == ([0, 1, 2, 3, 4], 1)
    assert found.r_precision.tolist() == [50, 50, 0, 50, 0]
    assert found.map_at_r.tolist() == [50, 25, 0, 25, 0]
    hits = {k: found.hits[k].astype(int).tolist() for k in (1, 2, 4)}
    assert hits == {1: [1, 0, 0, 0, 0], 2: [1, 1, 0, 1, 1], 4: [1, 1, 1, 1, 1]}


@pytest.mark.parametrize("cells", [4_000_000, 700])
def test_leave_one_out_matches_definition_for_any_chunk_size(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    monkeypatch.setattr(eval.retrieval.benchmarks, "_CELLS_AT_ONCE", cells)
    rng = np.random.default_rng(2)
    # Overlapping classes of 1, 1, 2, 5, 20 and 90 images, in random order.
    labels = rng.permutation(np.repeat([4, 11, 5, 0, 8, 2], [1, 2, 5, 20, 90, 1]))
    features = (rng.normal(size=(12, 6))[labels] + 1.5 * rng.normal(size=(len(labels), 6))).astype(np.float32)
    ks = (1, 2, 4, 8)
    found, expected = leave_one_out(features, labels, ks), by_definition(features, labels, ks)
    assert found.alone == 2
    assert len(found.queries) == len(expected) == 117
    assert [[bool(found.hits[k][row]) for k in ks] for row in range(117)] == [hits for hits, _, _ in expected]
    assert found.r_precision == pytest.approx([100 * r for _, r, _ in expected])
    assert found.map_at_r == pytest.approx([100 * m for _, _, m in expected], rel=1e-6)


def test_leave_one_out_excludes_query_among_exact_copies() -> None:
    # Five copies with two labels: the four others of each query include one of its class, in any order.
    features = np.tile(np.array([[1, 2, 3]], dtype=np.float32), (5, 1))
    found = leave_one_out(features, np.array([0, 0, 1, 1, 1]), (4,))
    assert found.hits[4].tolist() == [True] * 5
    alone = leave_one_out(np.eye(3, dtype=np.float32)[[0, 0, 1]], np.array([0, 1, 1]), (1,))
    assert alone.queries.tolist() == [1, 2]
    assert not alone.hits[1][0], "the query found itself: its copy has another label"


def test_leave_one_out_with_k_beyond_image_count_uses_all_images() -> None:
    features = on_a_circle(0, 10, 20)
    found = leave_one_out(features, np.array([0, 1, 0]), (1, 50))
    assert found.hits[1].tolist() == [False, False]
    assert found.hits[50].tolist() == [True, True]


def test_leave_one_out_refuses_single_image_classes_and_nan_features() -> None:
    features = on_a_circle(0, 10, 20)
    with pytest.raises(InputError, match="each of the 3 classes has one image"):
        leave_one_out(features, np.arange(3))
    features[1] = np.nan
    with pytest.raises(InputError, match="features are not finite"):
        leave_one_out(features, np.array([0, 0, 1]))


# ---- Copydays: scenes and scores


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (len(path.name), 5, 9)).save(path)


def copies(*arguments: Any) -> NDArray[np.float64]:
    return score_copies(*arguments) / 100


def layout(folder: Path, *names: str) -> Path:
    for name in names:
        picture(folder / name)
    return folder


def test_copydays_scene_is_file_name_without_last_two_digits(tmp_path: Path) -> None:
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


def test_wrong_copydays_layout_is_refused(tmp_path: Path) -> None:
    for names, wrong in (
        ((), "original"), (("original/200000.jpg",), "strong"), (("strong/200001.jpg", "strong/200101.jpg"), "without"),
        (("strong/copy.jpg",), "strong"),
    ):  # fmt: skip
        layout(tmp_path, *names)
        with pytest.raises(InputError, match=wrong):
            open_copydays(tmp_path)


def test_score_copies_matches_hand_computation() -> None:
    """The database rows are orthogonal, so the entries of a query are proportional to its cosines.

    Rows 2 and 4 are distractors.
    Query 1 (scene 7) ranks rows 2 0 3 1 4. Its positive, row 0, has rank 2: AP = (0 + 1/2) / 2 = 1/4.
    Query 2 (scene 8) ranks rows 4 3 1 0 2. Its positives, rows 3 and 1, have ranks 2 and 3. Each contributes half of
        (0 + 1/2) / 2 = 1/4 and (1/2 + 2/3) / 2 = 7/12: AP = 5/12.
    At depth 2, query 2 finds row 3 only: AP = 1/4 / 2 = 1/8.
    """
    database, scenes = np.eye(5, dtype=np.float32) * 3, np.array([7, 8, -1, 8, -1])
    queries = np.array([[0.8, 0.4, 0.9, 0.6, 0.1], [0.3, 0.5, 0.1, 0.7, 0.9]], dtype=np.float32)
    asked = np.array([7, 8])
    assert copies(queries, asked, database, scenes, 5) == pytest.approx([1 / 4, 5 / 12])
    assert copies(queries, asked, database, scenes, 2) == pytest.approx([1 / 4, 1 / 8])
    assert copies(queries, asked, database, scenes, 1) == pytest.approx([0, 0])
