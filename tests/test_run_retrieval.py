"""run_retrieval.py as a user types it: figures that can be told beforehand, and mistakes."""

from __future__ import annotations

import csv
import functools
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from eval_fixtures import CLASSES, image_tree, tiny_checkpoint
from numpy.typing import NDArray
from PIL import Image
from ranks import two_ranks_run
from run_here import Command, Here

import run_extract
import run_retrieval
from eval.collection.images import images_of
from eval.collection.store import open_collection


class Place(NamedTuple):
    weights: Path
    photos: Path
    """``photos``/{train,val}/{bars,dots,waves}."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("retrieval")
    tree = image_tree(folder / "photos", train=5, val=4)
    return Place(tiny_checkpoint(folder / "run", tree), tree)


@pytest.fixture
def retrieve(here: Here) -> Command:
    """Runs run_retrieval.py in this process."""
    return functools.partial(here, run_retrieval)


@pytest.fixture
def extract(here: Here) -> Command:
    """Runs run_extract.py in this process."""
    return functools.partial(here, run_extract)


def noise(seed: int, width: int = 40, height: int = 32) -> NDArray[np.uint8]:
    """A picture like no other: coarse blocks of random colours."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return blocks.repeat(8, axis=0).repeat(8, axis=1)


def save(pixels: NDArray[np.uint8], path: Path, quality: int = 95) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=quality)


# ---- Revisited Oxford and Paris


@pytest.fixture
def oxford(tmp_path: Path) -> Path:
    """Two buildings. Queries show them in a box within other things; the database has each as it is in the box."""
    folder = tmp_path / "roxford5k"
    names = [f"oxford_{number:06d}" for number in range(6)]
    for number, name in enumerate(names):
        save(noise(number), folder / f"jpg/{name}.jpg")
    gnd = []
    for number in (0, 1):
        scene = noise(100 + number, 96, 80)
        scene[24:56, 16:56] = noise(number)
        save(scene, folder / f"jpg/query_{number}.jpg")
        # The building itself is easy in the first query and hard in the second; the next picture is junk.
        found = {"easy": [0], "hard": []} if number == 0 else {"easy": [], "hard": [1]}
        gnd.append({"bbx": [16, 24, 56, 56], "junk": [2], **found})
    (folder / "gnd_roxford5k.json").write_text(
        json.dumps({"imlist": names, "qimlist": ["query_0", "query_1"], "gnd": gnd})
    )
    return folder


def test_landmarks_cut_queries_to_their_box_and_write_a_figure_a_setup(
    place: Place, oxford: Path, retrieve: Command, tmp_path: Path
) -> None:
    common = ("oxford", "--weights", place.weights, "--data-path", oxford, "--imsize", 32, "--no-cache")
    done = retrieve(*common, "--json", tmp_path / "o.json")
    assert done.code == 0, done.err
    assert "images: whole, in their proportions, the longer side at most 32" in done.out
    card = json.loads((tmp_path / "o.json").read_text())
    assert card["measure"] == "retrieval oxford"
    rows = {row["setup"]: row for row in card["results"]}
    # Within its box each query is its building's very picture, a JPEG away: found first.
    assert [(rows[setup]["map"], rows[setup]["queries"]) for setup in ("easy", "medium", "hard")] == [
        (100, 1),
        (100, 2),
        (100, 1),
    ]
    assert rows["hard"]["ap"] == {"query_0": None, "query_1": 100}
    assert rows["medium"]["mp@10"] == 100
    assert card["protocol"]["ground_truth"]["file"] == "gnd_roxford5k.json"
    assert card["transform"]["crop"] == 32
    assert "whole picture" in card["transform"]["shape"]
    assert {name: part["images"] for name, part in card["data"].items()} == {"database": 6, "queries": 2}

    whole = retrieve(*common, "--queries", "whole", "--json", tmp_path / "w.json")
    assert whole.code == 0, whole.err
    other = json.loads((tmp_path / "w.json").read_text())
    assert other["protocol"]["queries"] == "whole pictures"
    assert other["results"] != card["results"], "the box was of use"


def test_landmarks_take_pooling_scales_and_what_was_kept(
    place: Place, oxford: Path, retrieve: Command, tmp_path: Path
) -> None:
    common = ("oxford", "--weights", place.weights, "--data-path", oxford, "--image-size", 32)
    common += ("--pooling", "gem", "--scales", 1, 0.5, "--cache-dir", tmp_path / "kept", "--json", tmp_path / "o.json")
    first = retrieve(*common)
    assert first.code == 0, first.err
    card = json.loads((tmp_path / "o.json").read_text())
    assert card["protocol"]["descriptor"] == {"pooling": "gem", "gem_p": 3.0, "scales": [1.0, 0.5]}
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*")}
    assert len(list((tmp_path / "kept").iterdir())) == 2
    again = retrieve(*common)
    assert again.out.splitlines()[-6:] == first.out.splitlines()[-6:]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*")} == kept


def test_distractors_are_searched_with_the_landmarks_and_are_never_right(
    place: Place, oxford: Path, retrieve: Command, tmp_path: Path
) -> None:
    common = ("oxford", "--weights", place.weights, "--data-path", oxford, "--imsize", 32, "--no-cache")
    common += ("--json", tmp_path / "o.json")
    # What query 0 looks for, once more, and nearer to it: its very box.
    with Image.open(oxford / "jpg/query_0.jpg") as scene:
        save(np.asarray(scene.crop((16, 24, 56, 56))), tmp_path / "more/same.png")
    save(noise(50), tmp_path / "more/other.jpg")
    done = retrieve(*common, "--distractors", tmp_path / "more")
    assert done.code == 0, done.err
    card = json.loads((tmp_path / "o.json").read_text())
    rows = {row["setup"]: row for row in card["results"]}
    assert rows["easy"]["database"] == 8
    assert rows["easy"]["ap"]["query_0"] == 25, "the one right image is the second of the ranking"
    assert rows["hard"]["ap"]["query_1"] == 100
    assert card["protocol"]["distractors"] == 2
    assert card["data"]["distractors"]["images"] == 2

    twice = retrieve(*common, "--distractors", oxford / "jpg")
    assert twice.code == 2
    assert "8 of the 8 distractors" in twice.err


# ---- Copydays


@pytest.fixture
def copydays(tmp_path: Path) -> Path:
    folder = tmp_path / "copydays"
    for number in range(5):
        save(noise(number), folder / f"original/{200000 + 100 * number}.jpg")
        save(noise(number), folder / f"jpegqual/75/{200000 + 100 * number}.jpg", quality=75)
    for number in range(4):  # the last has no strong copy
        save(noise(number)[:, 4:], folder / f"strong/{200001 + 100 * number}.jpg")
    save(noise(0)[4:], folder / "strong/200002.jpg")
    return folder


def test_copydays_searches_originals_with_copies_and_the_other_way(
    place: Place, copydays: Path, retrieve: Command, tmp_path: Path
) -> None:
    done = retrieve(
        "copydays", "--weights", place.weights, "--data-path", copydays, "--image-size", 32, "--no-cache",
        "--distractors", place.photos / "val", "--json", tmp_path / "c.json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "squeezed to 32 x 32" in done.out
    rows = {row["search"]: row for row in json.loads((tmp_path / "c.json").read_text())["results"]}
    distractors = 4 * len(CLASSES)
    counts = {name: (row["queries"], row["database"], row["depth"]) for name, row in rows.items()}
    assert counts == {
        "strong -> original": (5, 5 + distractors, 5 + distractors),
        "jpegqual/75 -> original": (5, 5 + distractors, 5 + distractors),
        "original -> strong": (4, 5 + distractors, 5 + distractors),
    }
    assert rows["jpegqual/75 -> original"]["map"] == 100, "hardly another picture"
    assert 0 < rows["strong -> original"]["map"] <= 100


# ---- any labelled folder


def test_a_folder_and_its_collection_have_the_same_figures(
    place: Place, retrieve: Command, extract: Command, tmp_path: Path
) -> None:
    common = ("--weights", place.weights, "--no-cache")
    done = retrieve("folder", *common, "--data-path", place.photos, "--json", tmp_path / "f.json")
    assert done.code == 0, done.err
    assert "exceeds" not in done.out
    assert (
        "notice: k = 12, 50 exceeds the 11 other images: using all of them"
        in retrieve("folder", *common, "--data-path", place.photos, "--ks", 50, 11, 12).out
    )
    assert f"{4 * len(CLASSES)} queries, each among the {4 * len(CLASSES) - 1} other images" in done.out
    assert [line.split()[0] for line in done.out.splitlines()[-7:-1]] == [
        "recall@1", "recall@2", "recall@4", "recall@8", "R-precision", "mAP@R",
    ]  # fmt: skip
    card = json.loads((tmp_path / "f.json").read_text())
    (row,) = card["results"]
    assert row["recall@1_interval"][0] <= row["recall@1"] <= row["recall@2"] <= row["recall@8"]
    assert row["map@r"] <= row["r_precision"]

    # The same images, in two extractions of which the second was added to the first.
    vectors = tmp_path / "vectors"
    for name, added in (("bars", ()), ("more", ("--add",))):
        half = tmp_path / name
        for one in CLASSES[:1] if name == "bars" else CLASSES[1:]:
            shutil.copytree(place.photos / "val" / one, half / one)
        made = extract(*common, "--data-path", half, "--output-dir", vectors, *added)
        assert made.code == 0, made.err
    collected = retrieve("folder", "--index", vectors, "--json", tmp_path / "i.json")
    assert collected.code == 0, collected.err
    other = json.loads((tmp_path / "i.json").read_text())
    figures = [name for name in row if not name.endswith("_interval")]
    assert [other["results"][0][name] for name in figures] == pytest.approx([row[name] for name in figures])
    assert other["weights"]["hash"] == card["weights"]["hash"]
    assert len(other["data"]["images"]["added"]) == 1

    shutil.rmtree(tmp_path / "more" / CLASSES[1])
    gone = retrieve("folder", "--index", vectors)
    assert gone.code == 2
    assert "are not where they were" in gone.err


def test_images_of_a_collection_are_found_by_relative_names_too(
    place: Place, extract: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.photos)
    made = extract(
        "--weights", place.weights, "--data-path", "val", "--output-dir", tmp_path / "v", "--no-cache"
    )  # fmt: skip
    assert made.code == 0, made.err
    monkeypatch.chdir(tmp_path)
    collection = open_collection(tmp_path / "v")
    images = images_of(collection.card, collection.names)
    assert images is not None
    assert not collection.names[3].startswith("/")
    assert images.read(3)[0] == (place.photos / collection.names[3]).read_bytes()
    assert images.classes == CLASSES
    assert images.labels is not None
    assert images.labels.tolist() == np.repeat(range(3), 4).tolist()


def test_an_image_alone_in_its_class_is_left_out_and_said(place: Place, retrieve: Command, tmp_path: Path) -> None:
    shutil.copytree(place.photos / "val", tmp_path / "birds")
    save(noise(1), tmp_path / "birds/alone/one.png")
    done = retrieve("folder", "--weights", place.weights, "--data-path", tmp_path / "birds", "--no-cache")
    assert done.code == 0, done.err
    assert "notice: 1 image alone in a class: no query, but among what is searched" in done.out


@pytest.mark.parametrize("finished", [False, True])
def test_two_processes_have_the_figures_of_one_and_report_once(
    place: Place, retrieve: Command, extract: Command, tmp_path: Path, finished: bool
) -> None:
    common: tuple[object, ...] = ("folder", "--device", "cpu")
    if finished:
        extract("--weights", place.weights, "--data-path", place.photos / "val", "--output-dir", tmp_path / "v")
        common += ("--index", tmp_path / "v")
    else:
        common += ("--weights", place.weights, "--data-path", place.photos, "--no-cache")
    assert retrieve(*common, "--json", tmp_path / "one.json").code == 0
    words = [*common, "--json", tmp_path / "two.json"]
    (tmp_path / "words.json").write_text(json.dumps([str(word) for word in words]))
    two_ranks_run("retrieval_process.py", tmp_path, timeout=120)
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    assert "queries, each among the 11 other images" in said[0]
    assert said[1] == ""
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["results"] == one["results"]


# ---- near duplicates


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
    pooled = retrieve("duplicates", "--first", first, "--second", second, "--pooling", "gem")
    assert pooled.code == 2
    assert "pooling is gem, which decides nothing for a finished collection" in pooled.err

    shutil.rmtree(two_sets[0])
    blind = retrieve(
        "duplicates",
        "--first",
        first,
        "--second",
        second,
        "--threshold",
        0.9995,
        "--csv",
        tmp_path / "p.csv",
    )
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
    assert "pooling is gem, which decides nothing for a finished collection" in pooled.err
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
    assert f"notice: there is no pair to draw: {sheet} is not written\n" in told
    sheet.write_bytes(b"old")
    assert "and the file of that name is an older one" in retrieve(*words, "--sheet", sheet).out
    assert sheet.read_bytes() == b"old"


# ---- mistakes


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "no protocol given: expected oxford, paris, copydays, folder or duplicates"),
        (["oxfort"], "invalid choice 'oxfort'"),
        (["oxford", "--weights", "{weights}"], "no data_path given: oxford needs --data-path"),
        (["paris", "--data-path", "{photos}"], "holds no gnd_rparis6k.pkl"),
        (["oxford", "--data-path", "{photos}", "--ground-truth", "{weights}"], "is no ground truth"),
        (["copydays", "--data-path", "{photos}"], "holds no folder original"),
        (["folder", "--data-path", "{photos}"], "no weights given"),
        (["folder", "--weights", "{weights}", "--data-path", "{photos}/val/dots"], "has no labels"),
        (["folder", "--index", "{photos}"], "is no complete collection"),
        (["folder", "--ks", "0"], "ks is 0, expected whole numbers"),
        (["duplicates"], "no images given: use --first"),
        (["duplicates", "--first", "{photos}/none", "--second", "{photos}/val"], "no data at"),
        (["duplicates", "--threshold", "2"], "threshold is 2, expected a cosine"),
        (["oxford", "--scales", "0"], "scales is 0, expected"),
        (["folder", "--distractors", "v"], "distractors is a setting of oxford and paris and copydays, not of folder"),
        (["folder", "--csv", "p.csv"], "csv is a setting of duplicates, not of folder: leave it out"),
        (["copydays", "--queries", "whole"], "queries is a setting of oxford and paris, not of copydays"),
        (["duplicates", "--data-path", "{photos}"], "data_path is a setting of oxford and paris and"),
        (["folder", "--index", "{photos}", "--data-path", "{photos}"], "both index and data_path are given"),
        (["folder", "--index", "v", "--weights", "{weights}"], "which decides nothing for a finished collection: its"),
        (["folder", "--index", "v", "--scales", "1", "0.5"], "scales is 1 0.5, which decides nothing for a finished"),
        (["folder", "--index", "v", "--whiten", "w.npz"], "whiten is w.npz, which decides nothing for a finished"),
        (["folder", "--whiten", "{photos}/none.npz", "--weights", "{weights}", "--data-path", "{photos}"], "none.npz"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(place: Place, retrieve: Command, words: list[str], sentence: str) -> None:
    done = retrieve(*(word.format(weights=place.weights, photos=place.photos) for word in words))
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert len(done.err.splitlines()) == 1
    assert sentence in done.err
