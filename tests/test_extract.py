"""run_extract.py: killed, shared by processes, pooled, whitened, in half precision, added to, with images missing."""

from __future__ import annotations

import functools
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from eval_fixtures import CLASSES, image_tree, tiny_checkpoint, unit
from extract_process import in_a_child
from PIL import Image
from ranks import two_ranks_run
from run_here import Command, Here, Outcome

import run_extract
from dino_xcit.data import open_source
from eval.collection import index as search_index
from eval.collection.contact_sheet import TILE
from eval.collection.store import FILES, Collection, open_collection

COUNT = 8 * len(CLASSES)


class Place(NamedTuple):
    data: Path
    weights: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("extract")
    tree = image_tree(folder / "photos")
    return Place(tree, tiny_checkpoint(folder / "run", tree))


@pytest.fixture
def command(here: Here) -> Command:
    """Runs run_extract.py in this process."""
    return functools.partial(here, run_extract)


def words(place: Place, *more: object, data: object = None) -> tuple[object, ...]:
    return (
        "--weights", place.weights, "--data-path", data or place.data / "train", "--no-cache", "--batch-size", 2,
        "--shard-images", 4, "--num-workers", 0, *more,
    )  # fmt: skip


def content(folder: Path) -> dict[str, Any]:
    """All files by name, the card without what tells the time."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    card = json.loads(files["card.json"])
    del card["date"]
    return files | {"card.json": card}


def done(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.out + outcome.err
    return outcome


# ---- kills


def test_killed_between_two_parts_the_same_command_goes_on_and_ends_with_the_same_bytes(
    place: Place, command: Command, tmp_path: Path
) -> None:
    done(command(*words(place, "--output-dir", tmp_path / "straight")))
    killed = words(place, "--output-dir", tmp_path / "killed")
    made: dict[str, int] = {}
    for last in (0, 2, 3):
        child = in_a_child(killed, tmp_path / "log", tmp_path / "killed", die_after=f"part-{last:06d}.json")
        assert child[0] == -9
        there = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed" / ".parts").glob("part-*")}
        assert len(there) == 2 * (last + 1), "each part and its hash"
        assert made.items() <= there.items(), "finished parts are kept as they are"
        made = there
    told = done(command(*killed)).out
    assert "going on: 4 of 6 parts are there" in told
    assert content(tmp_path / "killed") == content(tmp_path / "straight")
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == sorted(FILES)


def kill_at_each(place: Place, command: Command, tmp_path: Path, step: int, *more: object) -> int:
    """Kill at every ``step``-th operation on a file, go on, compare. How many were killed."""
    done(command(*words(place, "--output-dir", tmp_path / "straight", *more)))
    wanted = content(tmp_path / "straight")
    folder = tmp_path / "counted"
    code, log = in_a_child(words(place, "--output-dir", folder, *more), tmp_path / "log", folder)
    assert code == 0, log
    operations = int(log.splitlines()[-1])
    kills = 0
    for number in range(1, operations + 1, step):
        folder = tmp_path / str(number)
        again = words(place, "--output-dir", folder, *more)
        assert in_a_child(again, tmp_path / "log", folder, number)[0] == -9
        kills += 1
        outcome = command(*again)
        assert outcome.code == 0, (number, outcome.err)
        assert content(folder) == wanted, number
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")], number
        shutil.rmtree(folder)
    return kills


def test_killed_at_some_file_operation_the_same_command_ends_with_the_same_bytes(
    place: Place, command: Command, tmp_path: Path
) -> None:
    assert kill_at_each(place, command, tmp_path, 17, "--dtype", "fp16") >= 5


@pytest.mark.slow
def test_killed_at_any_file_operation_the_same_command_ends_with_the_same_bytes(
    place: Place, command: Command, tmp_path: Path
) -> None:
    assert kill_at_each(place, command, tmp_path, 1) >= 60


def test_killed_while_adding_nothing_is_lost_and_the_same_command_ends_it(
    place: Place, command: Command, tmp_path: Path
) -> None:
    first = words(place, "--output-dir", tmp_path / "first", data=place.data / "train" / "bars")
    done(command(*first))

    def adding(folder: Path) -> tuple[object, ...]:
        return words(place, "--output-dir", folder, "--add", data=place.data / "train" / "dots")

    shutil.copytree(tmp_path / "first", tmp_path / "straight")
    code, log = in_a_child(adding(tmp_path / "straight"), tmp_path / "log", tmp_path / "straight")
    assert code == 0, log
    wanted, operations = content(tmp_path / "straight"), int(log.splitlines()[-1])
    for number in [*range(1, operations - 20, 20), *range(operations - 20, operations + 1, 3)]:
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "first", folder)
        assert in_a_child(adding(folder), tmp_path / "log", folder, number)[0] == -9
        done(command(*adding(folder)))
        assert content(folder) == wanted, number


# ---- processes


def test_two_processes_share_the_parts_and_leave_the_bytes_of_one(
    place: Place, command: Command, tmp_path: Path
) -> None:
    shared = ("--pooling", "gem", "--scales", "1", "0.5", "--device", "cpu")
    done(command(*words(place, "--output-dir", tmp_path / "one", *shared)))
    two = words(place, "--output-dir", tmp_path / "two", *shared)
    (tmp_path / "words.json").write_text(json.dumps([str(word) for word in two]))
    two_ranks_run("extract_process.py", tmp_path, timeout=120)
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(FILES)


# ---- what a vector is


def test_a_query_is_pooled_scaled_and_whitened_as_the_collection_was(
    place: Place, command: Command, tmp_path: Path
) -> None:
    kind = ("--pooling", "cls+mean", "--scales", "1", "0.7071", "1.4142")
    done(command(*words(place, "--output-dir", tmp_path / "val", *kind, data=place.data / "val")))
    whitening = tmp_path / "w.npz"
    told = done(command("--learn-whitening", whitening, "--index", tmp_path / "val", "--whiten-dim", 6)).out
    assert "whitening of 128 numbers to 6, learned from 9 vectors" in told
    done(command(*words(place, "--output-dir", tmp_path / "v", *kind, "--whiten", whitening)))
    collection = open_collection(tmp_path / "v")
    assert collection.vectors.shape == (COUNT, 6) == (collection.card["count"], collection.card["dimension"])
    assert collection.vectors == pytest.approx(unit(collection.vectors), abs=1e-6)
    assert collection.card["whitening"]["learned_on"]["data"][0]["images"] == 9
    assert "PCA-whitened to 6 numbers" in collection.card["feature"]

    whitening.unlink()  # the collection has its own copy
    wanted = collection.names[5]
    done(command("--query", wanted, "--index", tmp_path / "v", "--top", 3, "--json", tmp_path / "found.json"))
    first = json.loads((tmp_path / "found.json").read_text())["results"][0]
    assert (first["path"], first["row"]) == (wanted, 5)
    assert first["score"] == pytest.approx(1, abs=1e-4), "the query's vector is the stored one"


def test_a_whitening_of_other_vectors_is_refused_with_the_difference(
    place: Place, command: Command, tmp_path: Path
) -> None:
    done(command(*words(place, "--output-dir", tmp_path / "val", "--pooling", "gem", data=place.data / "val")))
    done(command("--learn-whitening", tmp_path / "w.npz", "--index", tmp_path / "val"))
    whitened = words(place, "--output-dir", tmp_path / "v", "--whiten", tmp_path / "w.npz")
    refused = command(*whitened)
    assert refused.code == 2
    assert (
        "was learned from other vectors: pooling is gem there and cls here; gem_p is 3.0 there and none" in refused.err
    )
    assert not (tmp_path / "v").exists()
    done(command(*whitened, "--pooling", "gem"))
    again = command("--learn-whitening", tmp_path / "w2.npz", "--index", tmp_path / "v")
    assert "are whitened already" in again.err
    assert "no index given" in command("--learn-whitening", tmp_path / "w2.npz").err


def test_half_precision_halves_the_folder_and_finds_the_same(place: Place, command: Command, tmp_path: Path) -> None:
    for dtype in ("fp32", "fp16"):
        done(command(*words(place, "--output-dir", tmp_path / dtype, "--dtype", dtype)))
    wide, half = (open_collection(tmp_path / dtype) for dtype in ("fp32", "fp16"))
    assert half.vectors.dtype == np.float16
    assert half.vectors.astype(np.float32) == pytest.approx(wide.vectors, abs=5e-4)
    for name in ("vectors.npy", "index.faiss"):
        sizes = [(tmp_path / dtype / name).stat().st_size for dtype in ("fp32", "fp16")]
        assert sizes[0] - sizes[1] == pytest.approx(COUNT * 64 * 2, abs=100), name
    queries = np.asarray(wide.vectors[::3])
    (near, rows), (near_half, rows_half) = wide.search(queries, 5), half.search(queries, 5)
    assert near_half == pytest.approx(near, abs=2e-3)
    assert (rows[:, 0] == rows_half[:, 0]).all()


def test_an_approximate_index_states_its_recall_on_the_screen_and_in_the_card(
    place: Place, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = done(command(*words(place, "--output-dir", tmp_path / "v", "--index-type", "hnsw"))).out
    recall = open_collection(tmp_path / "v").card["index"]["recall"]
    assert f"index hnsw: recall@10 {recall['percent']:.1f} % of exact search (24 vectors of the collection)" in told
    refused = command(*words(place, "--output-dir", tmp_path / "w", "--index-type", "ivfpq"))
    assert (refused.code, "learned from 1,000 images or more, found 24" in refused.err) == (2, True)
    assert not (tmp_path / "w").exists(), "before anything is extracted"
    monkeypatch.setattr(search_index, "LEAST_IVFPQ", 10)
    monkeypatch.setattr(run_extract, "LEAST_IVFPQ", 10)
    done(command(*words(place, "--output-dir", tmp_path / "w", "--index-type", "ivfpq")))
    name = open_collection(tmp_path / "w").names[2]
    assert f"1  1.0000  {name}" in done(command("--query", name, "--index", tmp_path / "w", "--top", 2)).out


# ---- what a query leaves


def test_the_answer_is_written_before_the_sheet_which_only_those_who_named_it_must_have(
    place: Place, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    done(command(*words(place, "--output-dir", tmp_path / "v", "--json=~/v.json", data=place.data / "val")))
    assert json.loads((tmp_path / "v.json").read_text())["count"] == 9
    (tmp_path / "v" / "contact_sheet.png").mkdir()
    query = ("--query", next((place.data / "val" / "bars").iterdir()), "--index", tmp_path / "v")
    told = done(command(*query, "--json=~/q.json")).out
    assert "notice: cannot write the contact sheet" in told
    assert "Is a directory; choose another file with --sheet" in told
    assert len(json.loads((tmp_path / "q.json").read_text())["results"]) == 9
    refused = command(*query, "--sheet", tmp_path / f"{'s' * 250}.png", "--json", tmp_path / "r.json")
    assert refused.code == 2
    assert refused.err.endswith("File name too long; choose another file\n")
    assert (tmp_path / "r.json").exists()


def test_a_sheet_shows_a_hundred_images_of_a_query_and_says_so(
    place: Place, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_extract._MOST_DRAWN == 100
    monkeypatch.setattr(run_extract, "_MOST_DRAWN", 5)
    done(command(*words(place, "--output-dir", tmp_path / "v", data=place.data / "val")))
    query = ("--query", next((place.data / "val" / "bars").iterdir()), "--index", tmp_path / "v")
    assert "notice" not in done(command(*query, "--top", 5)).out
    sheet = (tmp_path / "v" / "contact_sheet.png").read_bytes()
    told = done(command(*query, "--top", 9)).out
    assert "notice: the contact sheet shows the first 5 images of each query" in told
    assert "   9  " in told
    assert (tmp_path / "v" / "contact_sheet.png").read_bytes() == sheet


# ---- adding


def test_images_that_are_added_are_as_if_they_had_been_there_from_the_start(
    place: Place, command: Command, tmp_path: Path
) -> None:
    train = place.data / "train"
    images = [*sorted((train / "bars").iterdir()), *sorted((train / "dots").iterdir())]
    (tmp_path / "all.txt").write_text("\n".join(map(str, images)))
    kind = ("--pooling", "mean", "--dtype", "fp16")
    done(command(*words(place, "--output-dir", tmp_path / "all", *kind, data=tmp_path / "all.txt")))
    done(command(*words(place, "--output-dir", tmp_path / "v", *kind, data=train / "bars")))
    add = words(place, "--output-dir", tmp_path / "v", "--add", *kind, data=train / "dots")
    assert "16 vectors of 64 numbers" in done(command(*add)).out
    for name in ("vectors.npy", "paths.txt", "index.faiss"):
        assert (tmp_path / "v" / name).read_bytes() == (tmp_path / "all" / name).read_bytes(), name
    card = open_collection(tmp_path / "v").card
    assert (card["count"], card["data"]["images"], [data["images"] for data in card["added"]]) == (16, 8, [8])
    assert "already there" in done(command(*add)).out
    query = done(command("--query", images[12], "--index", tmp_path / "v", "--top", 1))
    assert query.out.splitlines()[-2].split(maxsplit=2)[::2] == ["1", str(images[12])]


def test_what_cannot_be_added_is_refused_with_the_difference(place: Place, command: Command, tmp_path: Path) -> None:
    train = place.data / "train"
    done(command(*words(place, "--output-dir", tmp_path / "v", data=train / "bars")))
    before = content(tmp_path / "v")

    def add(*more: object, data: Path = train / "dots", place: Place = place) -> str:
        refused = command(*words(place, "--output-dir", tmp_path / "v", "--add", *more, data=data))
        assert refused.code == 2
        assert content(tmp_path / "v") == before
        return refused.err

    assert f"cannot add to {tmp_path / 'v'}: pooling is cls there and mean here; repeat" in add("--pooling", "mean")
    assert "dtype is fp32 there and fp16 here; index_type is flat there and hnsw here" in add(
        "--dtype", "fp16", "--index-type", "hnsw"
    )
    assert "'crop': 28" in add("--eval-crop", 24)
    other = Place(place.data, tiny_checkpoint(tmp_path / "other", place.data, seed=1))
    assert "weights is" in add(place=other)
    same_names = add(data=train)
    assert "it has images of the same names already" in same_names
    assert "bars 00.jpg" in same_names
    assert "and 5 more" in same_names
    assert "both --add and --overwrite" in add("--overwrite")
    nowhere = command(*words(place, "--output-dir", tmp_path / "none", "--add"))
    assert "is no complete collection" in nowhere.err
    assert not (tmp_path / "none").exists()


def test_added_pictures_that_are_no_files_are_drawn_from_their_own_source(tmp_path: Path) -> None:
    parts = [open_source("sample:fashion-mnist", part) for part in ("val", "train")]
    names = [part.name(index) for part in parts for index in range(len(part))]
    data = [
        {"url": f"sample:fashion-mnist/{part}", "images": len(one)}
        for part, one in zip(("val", "train"), parts, strict=True)
    ]
    collection = Collection(tmp_path, {"data": data[0], "added": data[1:]}, names, None)
    wanted = np.asarray(parts[1].read(7)[0])
    run_extract._draw(
        collection, [("q", Image.new("RGB", (9, 9)))], [[(0.9, len(parts[0]) + 7)]], tmp_path / "sheet.png"
    )
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("L"))
    enlarged = wanted.reshape(28, 28).repeat(TILE // 28, axis=0).repeat(TILE // 28, axis=1)
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (1, TILE))[:, :, 0]
    middle = enlarged[TILE // 2]
    assert (windows == middle).all(axis=-1).any(), "the picture is there, enlarged by whole pixels"


def test_a_sheet_shows_what_was_found_in_an_archive_of_which_an_image_was_left_out(
    place: Place, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    colours = [(40 * number, 250 - 40 * number, 7) for number in range(6)]
    (tmp_path / "made").mkdir()
    for number, colour in enumerate(colours):
        Image.new("RGB", (32, 32), colour).save(tmp_path / "made" / f"{number}.png")
    (tmp_path / "made" / "2.png").write_bytes(b"not a picture")
    with tarfile.open(tmp_path / "made" / "photos.tar", "w") as archive:
        for number in range(6):
            archive.add(tmp_path / "made" / f"{number}.png", f"{number}.png")
    monkeypatch.chdir(tmp_path / "made")
    done(command(*words(place, "--output-dir", tmp_path / "v", "--unreadable", "skip", data="tar:photos.tar")))
    monkeypatch.chdir(tmp_path)  # from where the archive's own name leads nowhere
    done(command("--query", tmp_path / "made" / "0.png", "--index", tmp_path / "v", "--top", 5))
    with Image.open(tmp_path / "v" / "contact_sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    areas = [int((pixels == colour).all(axis=-1).sum()) for colour in colours]
    assert [area > TILE**2 / 2 for area in areas] == [True, True, False, True, True, True]


def test_a_finished_collection_leaves_the_parts_of_images_that_are_being_added(
    place: Place, command: Command, tmp_path: Path
) -> None:
    first = words(place, "--output-dir", tmp_path / "v", data=place.data / "train" / "bars")
    add = words(place, "--output-dir", tmp_path / "v", "--add", data=place.data / "train" / "dots")
    done(command(*first))
    assert in_a_child(add, tmp_path / "log", tmp_path / "v", die_after="part-000000.json")[0] == -9
    assert "already complete" in done(command(*first)).out
    assert "going on: 1 of 2 parts are there" in done(command(*add)).out
    assert "already there" in done(command(*add)).out
    assert not (tmp_path / "v" / ".parts").exists()


# ---- images that cannot be read


def test_a_damaged_image_ends_the_run_and_is_left_out_on_request_without_losing_the_parts(
    place: Place, command: Command, tmp_path: Path
) -> None:
    shutil.copytree(place.data / "train", tmp_path / "train")
    broken = tmp_path / "train" / "waves" / "waves 03.png"
    broken.write_bytes(b"not a picture")
    given = words(place, "--output-dir", tmp_path / "v", data=tmp_path / "train")
    refused = command(*given)
    assert refused.code == 2
    assert "waves 03.png cannot be read" in refused.err
    assert "(--unreadable skip leaves such images out)" in refused.err
    skipping = (*given, "--unreadable", "skip")
    told = done(command(*skipping)).out
    assert "going on: 4 of 6 parts are there" in told
    assert "notice: left out 1 image that could not be read; card.json has the names" in told
    complete = f"{tmp_path / 'v'} holds the vectors of 23 of these 24 images; 1 could not be read and were left out"
    assert f"already complete: {complete}, card.json names them; nothing" in done(command(*skipping)).out
    assert "although --unreadable is refuse now (mend them, then --overwrite)" in done(command(*given)).out
    collection = open_collection(tmp_path / "v")
    assert len(collection.names) == COUNT - 1 == collection.card["count"]
    assert str(broken) not in collection.names
    assert collection.card["data"]["unreadable"] == {"count": 1, "first": [str(broken)]}
    assert (
        f"1  1.0000  {collection.names[-1]}"
        in done(command("--query", collection.names[-1], "--index", tmp_path / "v", "--top", 1)).out
    )


def test_where_no_image_can_be_read_there_is_no_collection(place: Place, command: Command, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "bad.png").write_bytes(b"not a picture")
    refused = command(*words(place, "--output-dir", tmp_path / "v", "--unreadable", "skip", data=tmp_path / "bad"))
    assert (refused.code, "none of the 1 images of" in refused.err) == (2, True)


# ---- where a collection may lie


@pytest.mark.parametrize("inside", ["", "vectors", "bars/vectors"])
def test_a_collection_among_its_images_is_refused_before_anything_is_written(
    place: Place, command: Command, tmp_path: Path, inside: str
) -> None:
    images = tmp_path / "images"
    shutil.copytree(place.data / "val", images)
    before = sorted(images.rglob("*"))
    refused = command(*words(place, "--output-dir", images / inside, data=images))
    assert refused.code == 2
    assert refused.err.startswith(f"error: output_dir is {images / inside}, which lies within the folder of the images")
    assert refused.err.endswith(f"choose another, such as --output-dir {images}-vectors\n")
    (tmp_path / "link").symlink_to(images)
    assert command(*words(place, "--output-dir", tmp_path / "link" / "v", data=images)).code == 2
    assert sorted(images.rglob("*")) == before


def test_a_collection_of_listed_images_may_lie_among_them(place: Place, command: Command, tmp_path: Path) -> None:
    """The list names its images: nothing becomes one by lying beside them."""
    images = tmp_path / "images"
    shutil.copytree(place.data / "val" / "bars", images)
    (images / "all.txt").write_text("\n".join(path.name for path in sorted(images.iterdir())))
    given = words(place, "--output-dir", images / "v", data=images / "all.txt")
    done(command(*given))
    done(command("--query", images / "bars 00.jpg", "--index", images / "v"))
    assert (images / "v" / "contact_sheet.png").exists()
    assert "already complete" in done(command(*given)).out


def test_a_query_draws_nothing_among_the_images_unless_told_where(
    place: Place, command: Command, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    shutil.copytree(place.data / "val", images)
    given = words(place, "--output-dir", tmp_path / "v", data=images)
    done(command(*given))
    shutil.move(tmp_path / "v", images / "v")  # it may have been put there by hand, or by an earlier version
    query = ("--query", next((images / "bars").iterdir()), "--index", images / "v")
    told = done(command(*query)).out
    assert f"notice: {images / 'v'} lies within the folder of its images" in told
    assert not list(images.rglob("contact_sheet.png"))
    assert f"contact sheet: {tmp_path / 's.png'}" in done(command(*query, "--sheet", tmp_path / "s.png")).out
    shutil.move(images / "v", tmp_path / "v")
    assert "already complete" in done(command(*given)).out, "the images are what they were"


# ---- what is there already


def test_a_damaged_plan_of_parts_is_said_and_nothing_has_to_be_removed_by_hand(
    place: Place, command: Command, tmp_path: Path
) -> None:
    first = words(place, "--output-dir", tmp_path / "v")
    assert in_a_child(first, tmp_path / "log", tmp_path / "v", 25)[0] == -9
    plan = tmp_path / "v" / ".parts" / "plan.json"
    plan.write_bytes(plan.read_bytes()[:40])
    told = done(command(*first)).out
    assert f"notice: {plan} is damaged, so that the parts beside it are of no use: beginning anew" in told
    assert len(open_collection(tmp_path / "v").names) == COUNT


def test_a_card_that_contradicts_its_vectors_is_refused_by_queries_and_additions(
    place: Place, command: Command, tmp_path: Path
) -> None:
    val = place.data / "val"
    done(command(*words(place, "--output-dir", tmp_path / "v", data=val / "bars")))
    card = json.loads((tmp_path / "v" / "card.json").read_text())
    card["descriptor"]["pooling"] = "cls+mean"
    (tmp_path / "v" / "card.json").write_text(json.dumps(card))
    add = words(place, "--output-dir", tmp_path / "v", "--add", "--pooling", "cls+mean", data=val / "dots")
    query = ("--query", next((val / "bars").iterdir()), "--index", tmp_path / "v")
    for refused in (command(*query), command(*add)):
        assert refused.code == 2
        assert "is damaged (its vectors were made of 64 numbers, and what its card.json says makes 128)" in refused.err


def test_an_unfinished_extraction_is_not_mixed_with_another(place: Place, command: Command, tmp_path: Path) -> None:
    first = words(place, "--output-dir", tmp_path / "v")
    assert in_a_child(first, tmp_path / "log", tmp_path / "v", 25)[0] == -9
    refused = command(*first, "--pooling", "gem")
    assert refused.code == 2
    assert "parts of an extraction that is not finished, with another pooling" in refused.err
    done(command(*first, "--pooling", "gem", "--overwrite"))
    assert open_collection(tmp_path / "v").card["descriptor"]["pooling"] == "gem"


def test_parts_serve_whatever_is_made_of_the_rows_later(place: Place, command: Command, tmp_path: Path) -> None:
    first = words(place, "--output-dir", tmp_path / "v")
    assert in_a_child(first, tmp_path / "log", tmp_path / "v", 40)[0] == -9
    told = done(command(*first, "--dtype", "fp16", "--no-normalise", "--index-type", "hnsw")).out
    assert "going on" in told


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (("--pooling", "gem"), "pooling is gem"),
        (("--scales", "1", "0.5"), "scales is 1 0.5"),
        (("--whiten", "w.npz"), "whiten is w.npz"),
        (("--dtype", "fp16"), "dtype is fp16"),
        (("--no-normalise",), "normalise is off"),
        (("--add",), "add is on"),
        (("--eval-crop", "24"), "eval_crop is 24"),
        (("--eval-resize", "32"), "eval_resize is 32"),
    ],
)
def test_a_query_takes_no_settings_of_the_collection(flags: tuple[str, ...], found: str, command: Command) -> None:
    refused = command("--query", "q.png", "--index", "v", *flags)
    assert refused.code == 2
    assert refused.err == (
        f"error: {found}, which decides nothing for --query: the collection is as its card says; leave it out\n"
    )


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--pooling", "max"), "pooling"),
        (("--gem-p", "0"), "gem_p is 0, expected more than 0"),
        (("--scales", "1", "0"), "scales is 1 0, expected 1 to 16 numbers"),
        (("--scales", "1", "0.5", "--no-normalise"), "scales is 1 0.5, whose vectors are averaged at length 1"),
        (("--shard-images", "0"), "shard_images is 0, expected at least 1"),
        (("--whiten-dim", "3"), "whiten_dim is 3, but nothing is learned"),
        (("--whiten", "none.npz"), "there is no whitening none.npz"),
    ],
)
def test_a_mistake_ends_in_one_sentence(
    flags: tuple[str, ...], sentence: str, place: Place, command: Command, tmp_path: Path
) -> None:
    refused = command(*words(place, "--output-dir", tmp_path / "v", *flags))
    assert refused.code == 2
    assert refused.err.startswith("error: ")
    assert refused.err.count("\n") == 1
    assert sentence in refused.err
    assert not (tmp_path / "v").exists()
