"""Revisited Oxford and Paris: ground truth, query boxes, scores, and transforms of whole images."""

from __future__ import annotations

import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_fixtures import noise_source
from numpy.typing import NDArray
from PIL import Image
from torchvision import transforms

from dino_xcit.errors import InputError
from dino_xcit.transform import EvalTransform
from eval.retrieval.benchmarks import (
    PRECISION_KS,
    SETUPS,
    GroundTruth,
    LongerSide,
    Square,
    open_landmarks,
    read_ground_truth,
    refuse_known,
    score_landmarks,
)

DATABASE = [f"all_souls_{number:06d}" for number in range(8)]


def content(**changes: Any) -> dict[str, Any]:
    """A ground truth of two queries over eight images, in the published format."""
    first = {"bbx": [2.4, 1.0, 11.6, 9.0], "easy": np.array([0, 6]), "hard": [1], "junk": np.array([5])}
    second = {"bbx": np.array([0.0, 0.0, 8.0, 8.0]), "easy": [2], "hard": np.array([]), "junk": []}
    return {"imlist": DATABASE, "qimlist": ["query_1", "query_2"], "gnd": [first | changes, second]}


def written(path: Path, value: Any) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(value, default=lambda array: array.tolist()))
    else:
        path.write_bytes(pickle.dumps(value, 2))
    return path


def score(truth: GroundTruth, *rankings: list[int]) -> dict[tuple[str, str], NDArray[np.float64]]:
    """Compute scores from 0 to 1 by setup and metric. A ranking has the database rows of one query, best first."""
    falling = [np.array([-ranking.index(row) for row in range(len(ranking))], np.float32) for ranking in rankings]
    found = score_landmarks(truth, falling)
    return {(setup, metric): found[setup][metric] / 100 for setup in found for metric in found[setup]}


# ---- ground truth


@pytest.mark.parametrize("name", ["gnd_roxford5k.pkl", "gnd_roxford5k.json"])
def test_pickle_and_json_give_the_same_ground_truth(tmp_path: Path, name: str) -> None:
    truth = read_ground_truth(written(tmp_path / name, content()))
    first, second = truth.queries
    assert truth.database == tuple(DATABASE)
    assert (first.name, second.name) == ("query_1", "query_2")
    assert first.box == (2.4, 1.0, 11.6, 9.0)
    assert {kind: rows.tolist() for kind, rows in first.found.items()} == {"easy": [0, 6], "hard": [1], "junk": [5]}
    assert second.found["hard"].dtype == np.int64


@pytest.mark.parametrize(
    "value",
    [
        [1], {"imlist": DATABASE}, content() | {"imlist": ["../../secret"]}, content() | {"imlist": [".hidden"]},
        content() | {"qimlist": ["a", 3]}, content() | {"gnd": []}, content(easy=[0, 8]), content(easy=[-1]),
        content(hard=[0.5]), content(hard=[10**400]), content(junk=3),
        content(bbx=[1, 2, 3]), content(bbx=[1, 2, 3, math.inf]), {**content(), "gnd": [{"ok": [1], "junk": []}] * 2},
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["gnd.pkl", "gnd.json"])
def test_invalid_ground_truth_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(InputError, match="is no ground truth"):
        read_ground_truth(written(tmp_path / name, value))


def test_damaged_json_pipe_and_missing_file_are_refused(tmp_path: Path) -> None:
    for data in (b"\xff", b"[" * 100_000, b"9" * 5000):
        (tmp_path / "gnd.json").write_bytes(data)
        with pytest.raises(InputError, match="is no ground truth"):
            read_ground_truth(tmp_path / "gnd.json")
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("pipe.json", "none.json", "none.pkl"):
        with pytest.raises(InputError, match="found no ground truth"):
            read_ground_truth(tmp_path / name)


# ---- images


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A data set in the published layout, whose first query is black in its box and white outside."""
    (tmp_path / "jpg").mkdir()
    rng = np.random.default_rng(0)
    for name in DATABASE:
        Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(tmp_path / "jpg" / f"{name}.jpg")
    pixels = np.full((16, 24, 3), 255, dtype=np.uint8)
    pixels[1:9, 2:12] = 0
    Image.fromarray(pixels).save(tmp_path / "jpg" / "query_1.jpg", quality=100)
    Image.fromarray(pixels[:8, :8]).save(tmp_path / "jpg" / "query_2.jpg", quality=100)
    written(tmp_path / "gnd_roxford5k.pkl", content())
    return tmp_path


def test_queries_are_cropped_and_images_follow_ground_truth_order(place: Path) -> None:
    truth = read_ground_truth(place / "gnd_roxford5k.pkl")
    images, queries = open_landmarks(truth, place, crop_queries=True)
    assert [Path(images.name(row)).stem for row in range(len(images))] == DATABASE
    pixels, _ = queries.read(0)
    assert isinstance(pixels, np.ndarray)
    # The box 2.4 1.0 11.6 9.0 is rounded to 2 1 12 9.
    assert pixels.shape == (8, 10, 3)
    assert pixels.mean() < 8, "the crop is not the black box"
    _, whole = open_landmarks(truth, place, crop_queries=False)
    assert isinstance(whole.read(0)[0], bytes)
    assert queries.name(0) == whole.name(0)
    assert queries.fingerprint() != whole.fingerprint()


def test_missing_images_are_counted_and_one_is_named(place: Path) -> None:
    truth = read_ground_truth(place / "gnd_roxford5k.pkl")
    (place / "jpg" / f"{DATABASE[3]}.jpg").unlink()
    (place / "jpg" / "query_2.jpg").unlink()
    with pytest.raises(InputError, match=r"lacks 2 of .* such as all_souls_000003\.jpg"):
        open_landmarks(truth, place, crop_queries=True)


# ---- scores


def test_scores_equal_hand_calculation(tmp_path: Path) -> None:
    """Query 1 ranks 3 0 5 1 2 4 6 7. Images 0 and 6 are easy, 1 is hard, 5 is junk. Ranks start at 0.

    Medium, without 5: the positives have ranks 1, 2 and 5. Precision before and with each is 0 and 1/2, 1/2 and 2/3,
        2/5 and 3/6; the means are 1/4, 7/12 and 9/20; AP = 77/180. The last positive is 6th, which limits k = 10 to 6:
        precision is 2/5 at 5 and 3/6 at 10.
    Easy, without 5 and 1: the ranks are 1 and 4; AP = (1/4 + (1/4 + 2/5) / 2) / 2 = 23/80. The last positive is 5th:
        precision is 2/5 at 5 and at 10.
    Hard, without 5, 0 and 6: the rank is 1; AP = (0 + 1/2) / 2 = 1/4. The last positive is 2nd: precision is 1/2 at 5
        and at 10.
    Query 2 has its only positive at rank 0. It is easy, so that the hard scores are NaN.
    """
    truth = read_ground_truth(written(tmp_path / "gnd.pkl", content()))
    scores = score(truth, [3, 0, 5, 1, 2, 4, 6, 7], [2, 0, 1, 3, 4, 5, 6, 7])
    assert scores["medium", "map"] == pytest.approx([77 / 180, 1.0])
    assert scores["easy", "map"] == pytest.approx([23 / 80, 1.0])
    assert scores["hard", "map"] == pytest.approx([1 / 4, math.nan], nan_ok=True)
    first = {setup: [scores[setup, f"mp@{k}"][0] for k in (1, 5, 10)] for setup in SETUPS}
    assert first["medium"] == pytest.approx([0, 2 / 5, 3 / 6])
    assert first["easy"] == pytest.approx([0, 2 / 5, 2 / 5])
    assert first["hard"] == pytest.approx([0, 1 / 2, 1 / 2])
    assert all(math.isnan(scores["hard", f"mp@{k}"][1]) for k in PRECISION_KS)


def test_distractor_ranks_behind_equally_similar_benchmark_image(tmp_path: Path) -> None:
    truth = read_ground_truth(written(tmp_path / "gnd.pkl", content()))
    level = np.zeros(10, dtype=np.float32)
    both, alone = (score_landmarks(truth, [rows, rows])["hard"]["map"][0] for rows in (level, level[:8]))
    assert both == alone


def test_distractor_from_the_benchmark_is_refused_and_named(place: Path) -> None:
    truth = read_ground_truth(place / "gnd_roxford5k.pkl")
    database, queries = open_landmarks(truth, place, crop_queries=True)
    for own, name in ((database, "all_souls_000000"), (queries, "query_1")):
        with pytest.raises(InputError, match=name):
            refuse_known(truth, own)
    refuse_known(truth, noise_source(4))


def brute_force(ranking: list[int], right: list[int], junk: list[int]) -> tuple[float, list[float]]:
    """Score a ranking image by image: average precision is the area below the piecewise linear precision-recall curve;
    precision at 1, 5 and 10 is limited to the rank of the last positive."""
    kept = [image for image in ranking if image not in junk]
    area, count, last = 0.0, 0, (0.0, 1.0)
    for place, image in enumerate(kept, start=1):
        count += image in right
        point = count / len(right), count / place
        area += (point[0] - last[0]) * (point[1] + last[1]) / 2
        last = point
    end = max(kept.index(image) for image in right) + 1
    return area, [sum(image in right for image in kept[: min(k, end)]) / min(k, end) for k in PRECISION_KS]


@pytest.mark.parametrize("distractors", [0, 7])
def test_scores_equal_brute_force_on_random_ground_truths(tmp_path: Path, distractors: int) -> None:
    """Distractors follow the rows of the ground truth. They are negatives of every query, and never junk."""
    rng, count = np.random.default_rng(distractors), 60
    gnd, rankings = [], []
    for _ in range(8):
        kinds = rng.choice(["", "easy", "hard", "junk"], count, p=[0.6, 0.15, 0.15, 0.1])
        parts = {name: np.flatnonzero(kinds == name) for name in ("easy", "hard", "junk")}
        gnd.append({"bbx": [0, 0, 9, 9], **parts})
        rankings.append(rng.permutation(count + distractors).tolist())
    names = [f"i{number}" for number in range(count)]
    path = written(tmp_path / "gnd.pkl", {"imlist": names, "qimlist": names[:8], "gnd": gnd})
    scores = score(read_ground_truth(path), *rankings)
    for query, (entry, ranking) in enumerate(zip(gnd, rankings, strict=True)):
        easy, hard, junk = (np.asarray(entry[name]).tolist() for name in ("easy", "hard", "junk"))
        setups = {"easy": (easy, junk + hard), "medium": (easy + hard, junk), "hard": (hard, junk + easy)}
        for setup, (right, ignored) in setups.items():
            ap, precisions = brute_force(ranking, right, ignored)
            assert scores[setup, "map"][query] == pytest.approx(ap)
            assert [scores[setup, f"mp@{k}"][query] for k in PRECISION_KS] == pytest.approx(precisions)


def test_box_outside_its_image_is_refused(place: Path) -> None:
    truth = read_ground_truth(written(place / "gnd_roxford5k.pkl", content(bbx=[30, 0, 40, 9])))
    with pytest.raises(InputError, match="lies outside of"):
        open_landmarks(truth, place, crop_queries=True)[1].read(0)


# ---- whole images


@pytest.mark.parametrize(("size", "expected"), [(64, (44, 64)), (90, (62, 90)), (130, (90, 130)), (500, (90, 130))])
def test_longer_side_equals_pillow_thumbnail(photo: Image.Image, size: int, expected: tuple[int, int]) -> None:
    before = photo.tobytes()
    pixels = LongerSide(size, size)(photo)
    peer = photo.copy()
    peer.thumbnail((size, size), Image.Resampling.LANCZOS)
    assert tuple(pixels.shape) == (3, *expected)
    assert (pixels.permute(1, 2, 0).numpy() == np.asarray(peer)).all()
    assert photo.tobytes() == before, "the transform changed its input"


def test_square_equals_torchvision_bicubic_resize(photo: Image.Image) -> None:
    peer = transforms.Resize((48, 48), interpolation=transforms.InterpolationMode.BICUBIC)(photo)
    assert torch.equal(Square(48, 48)(photo), torch.from_numpy(np.array(peer)).permute(2, 0, 1))


def test_transforms_of_different_fits_have_different_metadata() -> None:
    descriptions = [kind(48, 48, "bicubic").to_dict() for kind in (EvalTransform, LongerSide, Square)]
    assert len({repr(sorted(metadata.items())) for metadata in descriptions}) == 3
