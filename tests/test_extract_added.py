"""run_extract.py --add: more images behind those of a collection."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from dying_child import run_in_a_child
from eval_fixtures import tiny_checkpoint
from extract_fixtures import Place, content, done, new_place, words
from PIL import Image
from run_here import Command, Here

import run_extract
from dino_xcit.data import open_source
from eval.collection.contact_sheet import TILE
from eval.collection.store import Collection, open_collection


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return new_place(tmp_path_factory.mktemp("extract"))


@pytest.fixture
def command(here: Here) -> Command:
    """Runs run_extract.py in this process."""
    return functools.partial(here, run_extract)


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


def test_a_finished_collection_leaves_the_parts_of_images_that_are_being_added(
    place: Place, command: Command, tmp_path: Path
) -> None:
    first = words(place, "--output-dir", tmp_path / "v", data=place.data / "train" / "bars")
    add = words(place, "--output-dir", tmp_path / "v", "--add", data=place.data / "train" / "dots")
    done(command(*first))
    assert run_in_a_child(run_extract, add, tmp_path / "log", tmp_path / "v", die_after="part-000000.json")[0] == -9
    assert "already complete" in done(command(*first)).out
    assert "going on: 1 of 2 parts are there" in done(command(*add)).out
    assert "already there" in done(command(*add)).out
    assert not (tmp_path / "v" / ".parts").exists()
