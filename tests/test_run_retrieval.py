"""run_retrieval.py as a user types it: figures that can be told beforehand, and mistakes."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from eval_fixtures import CLASSES
from PIL import Image
from ranks import Server
from retrieval_fixtures import Place, new_place, noise, save
from run_here import Command, Here
from safetensors.torch import save_file

import run_extract
import run_retrieval
from dino_xcit.models import build_backbone
from eval.collection.images import images_of
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
    found = {setup: (row["map"], row["queries"]) for setup, row in rows.items()}
    assert found == {"easy": (100, 1), "medium": (100, 2), "hard": (100, 1)}
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


@pytest.mark.parametrize("scales", [(1,), (1, 0.7071)])
def test_landmarks_of_any_proportions_can_be_shown_to_a_transformer_of_patches(
    oxford: Path, retrieve: Command, tmp_path: Path, scales: tuple[float, ...]
) -> None:
    weights = tmp_path / "vit.safetensors"
    backbone = build_backbone("vit_tiny_1_p16_32")
    state = {key.removeprefix("model."): value for key, value in backbone.state_dict().items()}
    save_file(state, weights, {"arch": "vit_tiny_1_p16_32"})
    # 40 x 32 pixels: two and a half patches of 16 by two. The second query's box is narrower than one.
    truth = json.loads((oxford / "gnd_roxford5k.json").read_text())
    truth["gnd"][1]["bbx"] = [16, 24, 56, 34]
    (oxford / "gnd_roxford5k.json").write_text(json.dumps(truth))
    done = retrieve(
        "oxford", "--weights", weights, "--data-path", oxford, "--imsize", 40, "--no-cache", "--scales", *scales,
        "--json", tmp_path / "o.json",
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = {row["setup"]: row for row in json.loads((tmp_path / "o.json").read_text())["results"]}
    assert rows["easy"]["map"] == 100, "within its box the query is its building's very picture"
    assert 0 < rows["medium"]["ap"]["query_1"] <= 100


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
        "warning: k = 12, 50 exceeds the 11 other images: using all of them"
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
    assert "warning" not in collected.out
    replaced = next((tmp_path / "more" / CLASSES[1]).iterdir())
    save(noise(7), replaced)
    assert f"warning: {tmp_path / 'more'} is not as it was" in retrieve("folder", "--index", vectors).out
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
    assert "1 image alone in a class: no query, but among what is searched" in done.out


@pytest.mark.parametrize("finished", [False, True])
def test_two_processes_have_the_figures_of_one_and_report_once(
    place: Place, retrieve: Command, extract: Command, server: Server, tmp_path: Path, finished: bool
) -> None:
    common: tuple[object, ...] = ("folder", "--device", "cpu")
    if finished:
        extract("--weights", place.weights, "--data-path", place.photos / "val", "--output-dir", tmp_path / "v")
        common += ("--index", tmp_path / "v")
    else:
        common += ("--weights", place.weights, "--data-path", place.photos, "--no-cache")
    assert retrieve(*common, "--json", tmp_path / "one.json").code == 0
    words = [*common, "--json", tmp_path / "two.json"]
    server.runner_on_two_ranks("run_retrieval", words, tmp_path, timeout=300)
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    assert "queries, each among the 11 other images" in said[0]
    assert said[1] == ""
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["results"] == one["results"]


# ---- mistakes


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "no protocol given: expected oxford, paris, copydays, folder or duplicates"),
        (["oxfort"], "'oxfort'"),
        (["oxford", "--weights", "{weights}"], "no data_path given: oxford needs --data-path"),
        (["paris", "--data-path", "{photos}"], "holds no gnd_rparis6k.pkl"),
        (["oxford", "--data-path", "{photos}", "--ground-truth", "{weights}"], "is no ground truth"),
        (["copydays", "--data-path", "{photos}"], "holds no folder original"),
        (["folder", "--data-path", "{photos}"], "no weights given"),
        (["folder", "--weights", "{weights}", "--data-path", "{photos}/val/dots"], "has no labels"),
        (["folder", "--index", "{photos}"], "is no complete collection"),
        (["folder", "--ks", "0"], "ks is 0"),
        (["duplicates"], "no images given: use --first"),
        (["duplicates", "--first", "{photos}/none", "--second", "{photos}/val"], "no data at"),
        (["duplicates", "--threshold", "2"], "threshold is 2"),
        (["oxford", "--scales", "0"], "scales is 0, expected"),
        (["folder", "--distractors", "v"], "distractors is v"),
        (["folder", "--csv", "p.csv"], "csv is p.csv"),
        (["copydays", "--queries", "whole"], "queries is whole"),
        (["duplicates", "--data-path", "{photos}"], "data_path is "),
        (["folder", "--index", "{photos}", "--data-path", "{photos}"], "both index and data_path are given"),
        (["folder", "--index", "v", "--weights", "{weights}"], "weights is "),
        (["folder", "--index", "v", "--scales", "1", "0.5"], "scales is 1 0.5"),
        (["folder", "--index", "v", "--whiten", "w.npz"], "whiten is w.npz"),
        (["folder", "--whiten", "{photos}/none.npz", "--weights", "{weights}", "--data-path", "{photos}"], "none.npz"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(place: Place, retrieve: Command, words: list[str], sentence: str) -> None:
    done = retrieve(*(word.format(weights=place.weights, photos=place.photos) for word in words))
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert len(done.err.splitlines()) == 1
    assert sentence in done.err
