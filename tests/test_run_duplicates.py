"""run_retrieval.py duplicates as a user types it: what two sets share, of images, collections, or one of each."""

from __future__ import annotations

import csv
import functools
import json
import shutil
from pathlib import Path

import pytest
from eval_fixtures import tiny_checkpoint
from PIL import Image
from retrieval_fixtures import Place, new_place, noise, save
from run_here import Command, Here

import run_extract
import run_retrieval
from eval.collection.store import open_collection


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return new_place(tmp_path_factory.mktemp("retrieval"))


@pytest.fixture
def retrieve(here: Here) -> Command:
    """Runs run_retrieval.py in this process."""
    return functools.partial(here, run_retrieval)


@pytest.fixture
def extract(here: Here) -> Command:
    """Runs run_extract.py in this process."""
    return functools.partial(here, run_extract)


@pytest.fixture
def two_sets(tmp_path: Path) -> tuple[Path, Path]:
    """Of six test pictures one is a training file, and another the same picture saved anew."""
    train, test = tmp_path / "train", tmp_path / "test"
    for number in range(8):
        save(noise(number), train / f"{number}.png")
    for number in range(20, 24):
        save(noise(number), test / f"{number}.png")
    shutil.copy(train / "3.png", test / "copied.png")
    save(noise(5), test / "saved anew.jpg")
    return train, test


def test_duplicates_name_the_pairs_and_tell_identical_files(
    place: Place, two_sets: tuple[Path, Path], retrieve: Command, tmp_path: Path
) -> None:
    train, test = two_sets
    done = retrieve(
        "duplicates", "--weights", place.weights, "--first", train, "--second", test, "--threshold", 0.9995,
        "--no-cache", "--csv", tmp_path / "p.csv", "--sheet", tmp_path / "p.png", "--json", tmp_path / "d.json",
    )  # fmt: skip
    assert done.code == 0, done.err
    with open(tmp_path / "p.csv", newline="") as file:
        found = {(Path(row["first"]).name, Path(row["second"]).name): row for row in csv.DictReader(file)}
    assert found["3.png", "copied.png"]["kind"] == "identical file"
    assert found["5.png", "saved anew.jpg"]["kind"] == "near"
    (row,) = json.loads((tmp_path / "d.json").read_text())["results"]
    assert row["pairs"] == len(found)
    assert row["identical"] == 1
    assert (row["first_images"], row["second_images"]) == (8, 6)
    assert row["second_with_a_pair"] == len({second for _, second in found})
    assert f"{len(found)} pairs of at least 0.9995, 1 of them identical files" in done.out
    with Image.open(tmp_path / "p.png") as sheet:
        assert sheet.width > 300


def test_duplicates_of_finished_collections_need_no_weights(
    place: Place, two_sets: tuple[Path, Path], retrieve: Command, extract: Command, tmp_path: Path
) -> None:
    for part in two_sets:
        for kind, more in (("v", ()), ("gem", ("--pooling", "gem"))):
            made = extract(
                "--weights", place.weights, "--data-path", part, "--output-dir", tmp_path / f"{kind}-{part.name}",
                "--dtype", "fp16" if part.name == "test" else "fp32", "--no-cache", *more
            )  # fmt: skip
            assert made.code == 0, made.err
    first, second = tmp_path / "v-train", tmp_path / "v-test"
    done = retrieve("duplicates", "--first", first, "--second", second, "--threshold", 0.9995)
    assert done.code == 0, done.err
    assert "1 of them identical files" in done.out

    mixed = retrieve("duplicates", "--first", first, "--second", tmp_path / "gem-test")
    assert mixed.code == 2
    assert "pooling is cls there and gem here" in mixed.err

    shutil.rmtree(two_sets[0])
    both = ("--first", first, "--second", second, "--threshold", 0.9995)
    blind = retrieve("duplicates", *both, "--csv", tmp_path / "p.csv")
    assert blind.code == 0, blind.err
    assert "identical files cannot be told from near ones" in blind.out
    assert ",unknown" in (tmp_path / "p.csv").read_text()


@pytest.mark.parametrize("kind", [(), ("--pooling", "cls+gem", "--gem-p", 4, "--scales", 1, 0.5), ("--whiten",)])
def test_images_beside_a_collection_are_extracted_as_its_card_says(
    place: Place,
    two_sets: tuple[Path, Path],
    retrieve: Command,
    extract: Command,
    tmp_path: Path,
    kind: tuple[object, ...],
) -> None:
    train, test = two_sets
    made = ("--weights", place.weights, "--no-cache", "--eval-crop", 24)
    if kind == ("--whiten",):
        extract(*made, "--data-path", place.photos / "train", "--output-dir", tmp_path / "learn")
        extract("--learn-whitening", tmp_path / "w.npz", "--index", tmp_path / "learn", "--whiten-dim", 6)
        kind = ("--whiten", tmp_path / "w.npz")
    for part in two_sets:
        outcome = extract(*made, *kind, "--data-path", part, "--output-dir", tmp_path / f"v-{part.name}")
        assert outcome.code == 0, outcome.err
    if kind:
        (tmp_path / "w.npz").unlink(missing_ok=True)  # the collection has its own copy

    def pairs(*words: object) -> str:
        outcome = retrieve("duplicates", *words, "--threshold", 0.99, "--csv", tmp_path / "p.csv", "--no-cache")
        assert outcome.code == 0, outcome.err
        return (tmp_path / "p.csv").read_text()

    both = pairs("--first", tmp_path / "v-train", "--second", tmp_path / "v-test")
    assert "identical file" in both
    assert pairs("--first", tmp_path / "v-train", "--second", test) == both, "with the weights that the card names"
    assert pairs("--first", train, "--second", tmp_path / "v-test", "--weights", place.weights) == both


def test_images_beside_a_collection_take_its_weights_and_none_of_its_settings(
    place: Place, two_sets: tuple[Path, Path], retrieve: Command, extract: Command, tmp_path: Path
) -> None:
    train, test = two_sets
    extract("--weights", place.weights, "--data-path", train, "--output-dir", tmp_path / "v", "--no-cache")
    common = ("duplicates", "--first", tmp_path / "v", "--second", test, "--no-cache")
    other = retrieve(*common, "--weights", tiny_checkpoint(tmp_path / "other", place.photos, seed=1))
    assert other.code == 2
    assert f"did not make the vectors in {tmp_path / 'v'}" in other.err
    pooled = retrieve(*common, "--pooling", "gem")
    assert pooled.code == 2
    assert "pooling is gem" in pooled.err
    done = retrieve(*common, "--weights", place.weights, "--json", tmp_path / "d.json")
    assert done.code == 0, done.err
    card = json.loads((tmp_path / "d.json").read_text())
    assert {name: part["images"] for name, part in card["data"].items()} == {"first": 8, "second": 6}
    assert card["weights"]["hash"] == open_collection(tmp_path / "v").card["weights"]["hash"]


def test_duplicates_within_one_set(
    place: Place, two_sets: tuple[Path, Path], retrieve: Command, tmp_path: Path
) -> None:
    train, _ = two_sets
    shutil.copy(train / "3.png", train / "3 again.png")
    done = retrieve(
        "duplicates", "--weights", place.weights, "--first", train, "--threshold", 0.99999, "--no-cache", "--json",
        tmp_path / "d.json",
    )  # fmt: skip
    assert done.code == 0, done.err
    card = json.loads((tmp_path / "d.json").read_text())
    assert card["results"] == [{"pairs": 1, "identical": 1, "first_images": 9, "first_with_a_pair": 2}]
    assert card["protocol"]["within_one_set"] is True


def test_without_a_pair_there_is_no_sheet_and_an_older_one_is_named_as_such(
    place: Place, two_sets: tuple[Path, Path], retrieve: Command, tmp_path: Path
) -> None:
    words = ("duplicates", "--weights", place.weights, "--first", two_sets[0], "--threshold", 1, "--no-cache")
    sheet = tmp_path / "p.png"
    told = retrieve(*words, "--sheet", sheet).out
    assert f"warning: there is no pair to draw: {sheet} is not written\n" in told
    sheet.write_bytes(b"old")
    assert "and the file of that name is an older one" in retrieve(*words, "--sheet", sheet).out
    assert sheet.read_bytes() == b"old"


@pytest.mark.parametrize("flag", ["--json", "--csv", "--sheet"])
def test_a_file_that_cannot_be_written_is_told_before_anything_is_searched(
    two_sets: tuple[Path, Path], retrieve: Command, tmp_path: Path, flag: str
) -> None:
    refused = retrieve("duplicates", "--first", two_sets[0], flag, tmp_path)
    assert refused.code == 2
    name = flag.removeprefix("--")
    # Before it is found, too, that there are no weights.
    assert (
        refused.err == f"error: {name} is {tmp_path}, which cannot be written: it is a folder; choose another place\n"
    )
