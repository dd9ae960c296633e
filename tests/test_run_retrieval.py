"""run_retrieval.py from the command line: metrics on data with known results, and user errors."""

from __future__ import annotations

import csv
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from eval_fixtures import CLASSES
from extract_fixtures import Place, new_place
from numpy.typing import NDArray
from PIL import Image
from run_here import Command, Here, measured, on_two_ranks

import run_retrieval
from eval.results import read_result


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return new_place(tmp_path_factory.mktemp("retrieval"), train=5, val=4)


@pytest.fixture
def retrieve(here: Here) -> Command:
    """Return a function that runs run_retrieval.py in this process."""
    return functools.partial(here, run_retrieval)


def noise(seed: int, width: int = 40, height: int = 32) -> NDArray[np.uint8]:
    """Return an image of coarse blocks with random colours, distinct for each seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return blocks.repeat(8, axis=0).repeat(8, axis=1)


def save(pixels: NDArray[np.uint8], path: Path, quality: int = 95) -> None:
    """Write an image and create its parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=quality)


# ---- Revisited Oxford and Paris


@pytest.fixture
def oxford(tmp_path: Path) -> Path:
    """Two buildings: each query shows one in a box on a random background; the database has the content of the box."""
    folder = tmp_path / "roxford5k"
    names = [f"oxford_{number:06d}" for number in range(6)]
    for number, name in enumerate(names):
        save(noise(number), folder / f"jpg/{name}.jpg")
    gnd = []
    for number in (0, 1):
        scene = noise(100 + number, 96, 80)
        scene[24:56, 16:56] = noise(number)
        save(scene, folder / f"jpg/query_{number}.jpg")
        # The building is easy for the first query and hard for the second; database image 2 is junk for both.
        found = {"easy": [0], "hard": []} if number == 0 else {"easy": [], "hard": [1]}
        gnd.append({"bbx": [16, 24, 56, 56], "junk": [2], **found})
    (folder / "gnd_roxford5k.json").write_text(
        json.dumps({"imlist": names, "qimlist": ["query_0", "query_1"], "gnd": gnd})
    )
    return folder


def test_landmarks_crop_queries_to_their_box(place: Place, oxford: Path, retrieve: Command, tmp_path: Path) -> None:
    common = ("oxford", "--weights", place.weights, "--data-path", oxford, "--imsize", 32, "--no-cache")
    out, result = measured(retrieve, tmp_path / "o.json", *common)
    assert "images: whole picture, longer side reduced" in out
    rows = {row["setup"]: row for row in result["results"]}
    # Inside its box each query equals its database image up to JPEG compression, so it ranks first.
    found = {setup: (row["map"], row["queries"]) for setup, row in rows.items()}
    assert found == {"easy": (100, 1), "medium": (100, 2), "hard": (100, 1)}
    assert rows["hard"]["ap"] == {"query_0": None, "query_1": 100}
    assert rows["medium"]["mp@10"] == 100
    assert result["protocol"]["ground_truth"]["file"] == "gnd_roxford5k.json"
    assert result["transform"]["crop"] == 32
    assert {name: part["images"] for name, part in result["data"].items()} == {"database": 6, "queries": 2}

    _, other = measured(retrieve, tmp_path / "w.json", *common, "--queries", "whole")
    assert other["protocol"]["queries"] == "whole pictures"
    assert other["results"] != result["results"], "cropping to the box has no effect on the results"


# ---- Copydays


@pytest.fixture
def copydays(tmp_path: Path) -> Path:
    folder = tmp_path / "copydays"
    for number in range(5):
        save(noise(number), folder / f"original/{200000 + 100 * number}.jpg")
        save(noise(number), folder / f"jpegqual/75/{200000 + 100 * number}.jpg", quality=75)
    for number in range(4):  # the last original has no strong copy
        save(noise(number)[:, 4:], folder / f"strong/{200001 + 100 * number}.jpg")
    save(noise(0)[4:], folder / "strong/200002.jpg")
    return folder


def test_copydays_searches_in_both_directions(place: Place, copydays: Path, retrieve: Command, tmp_path: Path) -> None:
    out, result = measured(
        retrieve, tmp_path / "c.json", "copydays", "--weights", place.weights, "--data-path", copydays, "--no-cache",
        "--image-size", 32, "--distractors", place.data / "val",
    )  # fmt: skip
    assert "squeezed into a square" in out
    rows = {row["search"]: row for row in result["results"]}
    size = 5 + 4 * len(CLASSES)
    assert {name: (row["queries"], row["database"], row["depth"]) for name, row in rows.items()} == {
        "strong -> original": (5, size, size), "jpegqual/75 -> original": (5, size, size),
        "original -> strong": (4, size, size),
    }  # fmt: skip
    assert rows["jpegqual/75 -> original"]["map"] == 100, "a JPEG copy of quality 75 does not rank its original first"
    assert 0 < rows["strong -> original"]["map"] <= 100
    metrics = {one.name: one for one in read_result(str(tmp_path / "c.json")).metrics}
    assert metrics["strong -> original mAP"].unit == "query"


# ---- labelled folders


def test_labelled_folder_gives_metrics_with_intervals(place: Place, retrieve: Command, tmp_path: Path) -> None:
    shutil.copytree(place.data / "val", tmp_path / "val")
    save(noise(1), tmp_path / "val" / "alone" / "one.png")
    common = ("folder", "--weights", place.weights, "--no-cache", "--data-path", tmp_path / "val")
    out, result = measured(retrieve, tmp_path / "f.json", *common, "--ks", 1, 2, 8, 50)
    assert "warning: k = 50 exceeds the 12 other images" in out
    assert "12 queries, each against the 12 other images" in out
    (row,) = result["results"]
    assert row["recall@1_interval"][0] <= row["recall@1"] <= row["recall@2"] <= row["recall@8"]
    assert row["map@r"] <= row["r_precision"]
    for key in ("recall@1", "r_precision", "map@r"):
        assert f"{row[key]:.1f} [" in out


def test_two_ranks_report_once_and_match_one_process(place: Place, retrieve: Command, tmp_path: Path) -> None:
    words = ("folder", "--device", "cpu", "--weights", place.weights, "--data-path", place.data, "--no-cache")
    first, second = on_two_ranks(run_retrieval, tmp_path, *words, "--json", tmp_path / "two.json")
    assert "queries, each against the 11 other images" in first
    assert second == ""
    _, one = measured(retrieve, tmp_path / "one.json", *words)
    assert json.loads((tmp_path / "two.json").read_text())["results"] == one["results"]


# ---- near duplicates


@pytest.fixture
def two_sets(tmp_path: Path) -> tuple[Path, Path]:
    """Training and test images: of six test images, one is a copied training file and one a training image as JPEG."""
    train, test = tmp_path / "train", tmp_path / "test"
    for number in range(8):
        save(noise(number), train / f"{number}.png")
    for number in range(20, 24):
        save(noise(number), test / f"{number}.png")
    shutil.copy(train / "3.png", test / "copied.png")
    save(noise(5), test / "saved anew.jpg")
    return train, test


def test_duplicates_lists_pairs_and_marks_identical_files(
    place: Place, two_sets: tuple[Path, Path], retrieve: Command, tmp_path: Path
) -> None:
    train, test = two_sets
    out, result = measured(
        retrieve, tmp_path / "d.json", "duplicates", "--weights", place.weights, "--first", train, "--second", test,
        "--threshold", 0.9995, "--no-cache", "--csv", tmp_path / "p.csv", "--sheet", tmp_path / "p.png",
    )  # fmt: skip
    with open(tmp_path / "p.csv", newline="") as file:
        found = {(Path(row["first"]).name, Path(row["second"]).name): row for row in csv.DictReader(file)}
    assert found["3.png", "copied.png"]["kind"] == "identical file"
    assert found["5.png", "saved anew.jpg"]["kind"] == "near"
    (row,) = result["results"]
    assert (row["pairs"], row["identical"], row["first_images"], row["second_images"]) == (len(found), 1, 8, 6)
    assert row["second_with_a_pair"] == len({second for _, second in found})
    assert f"{len(found)} pairs of at least 0.9995, 1 of them identical files" in out
    with Image.open(tmp_path / "p.png") as sheet:
        assert sheet.width > 300


# ---- user errors


@pytest.mark.parametrize(
    ("typed", "word"),
    [
        ("", "no protocol"), ("oxfort", "oxfort"), ("oxford --weights {weights}", "data_path"),
        ("paris --data-path {photos}", "gnd_rparis6k.pkl"), ("copydays --data-path {photos}", "Copydays"),
        ("oxford --data-path {photos} --ground-truth {weights}", "is not a ground truth"),
        ("duplicates", "--first"),
        ("folder --weights {weights} --data-path {photos}/val/dots", "has no labels"),
        ("folder --csv p.csv", "csv is p.csv"), ("folder --distractors v", "distractors is v"),
        ("duplicates --data-path {photos}", "first is empty: duplicates expects --first DIR"),
        ("paris --eval-crop 64 --data-path {photos}", "eval_crop is 64, which has no effect where fit is whole"),
        ("folder --whiten none.npz --weights {weights} --data-path {photos}", "none.npz"),
    ],
)  # fmt: skip
def test_user_error_prints_one_line_and_exits_with_2(place: Place, retrieve: Command, typed: str, word: str) -> None:
    done = retrieve(*typed.format(weights=place.weights, photos=place.data).split())
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert word in done.err
