"""run_extract.py: vectors, --add, queries, invalid flags, kills, two ranks, unreadable images, existing folders."""

from __future__ import annotations

import functools
import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from dying_child import run_in_a_child
from eval_fixtures import noise_source, tiny_checkpoint, unit
from extract_fixtures import COUNT, Place, content, done, new_place, words
from run_here import Command, Here, on_two_ranks

import run_extract
from dino_xcit.errors import InputError
from eval.retrieval.collection import FILES, claim, open_collection
from eval.retrieval_config import ExtractConfig


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return new_place(tmp_path_factory.mktemp("extract"))


@pytest.fixture(scope="module")
def straight(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted extraction."""
    folder = tmp_path_factory.mktemp("straight")
    code, log = run_in_a_child(run_extract, words(place, "--output-dir", folder / "v"), folder / "log", folder)
    assert code == 0, log
    return folder / "v"


@pytest.fixture
def command(here: Here) -> Command:
    """Run run_extract.py in this process."""
    return functools.partial(here, run_extract)


# ---- vectors


def test_query_uses_transform_and_whitening_of_collection(place: Place, command: Command, tmp_path: Path) -> None:
    kind = ("--pooling", "cls+mean", "--scales", 1, 0.7071, 1.4142, "--eval-crop", 24, "--eval-resize", 40)
    done(command(*words(place, "--output-dir", tmp_path / "val", *kind, data=place.data / "val")))
    whitening = tmp_path / "w.npz"
    told = done(command("--learn-whitening", whitening, "--index", tmp_path / "val", "--whiten-dim", 6)).out
    assert "whitening from 128 to 6 dimensions, learned from 9 vectors" in told
    whitened = words(place, "--output-dir", tmp_path / "v", "--whiten", whitening)
    refused = command(*whitened)
    assert (refused.code, "pooling is cls+mean there and cls here" in refused.err) == (2, True)
    assert not (tmp_path / "v").exists()
    done(command(*whitened, *kind))
    collection = open_collection(tmp_path / "v")
    assert collection.vectors.shape == (COUNT, 6) == (collection.metadata["count"], collection.metadata["dimension"])
    assert collection.vectors == pytest.approx(unit(collection.vectors), abs=1e-6)
    assert collection.metadata["whitening"]["learned_on"]["data"][0]["images"] == 9
    assert "are already whitened" in command("--learn-whitening", tmp_path / "w2.npz", "--index", tmp_path / "v").err

    whitening.unlink()  # the collection has its own copy
    wanted = collection.names[5]
    told = done(command("--query", wanted, "--index", tmp_path / "v", "--top", 3, "--json", tmp_path / "q.json")).out
    assert "resize to 40, centre crop 24" in told
    first = json.loads((tmp_path / "q.json").read_text())["results"][0]
    assert (first["path"], first["row"]) == (wanted, 5)
    assert first["score"] == pytest.approx(1, abs=1e-4), "the vector of the query differs from the stored one"


def test_approximate_index_prints_its_recall_and_stores_it_in_metadata(
    place: Place, command: Command, tmp_path: Path
) -> None:
    told = done(command(*words(place, "--output-dir", tmp_path / "v", "--index-type", "hnsw"))).out
    collection = open_collection(tmp_path / "v")
    recall, name = collection.metadata["index"]["recall"], collection.names[2]
    assert f"index hnsw: recall@10 {recall['percent']:.1f} % of exact search" in told
    assert f"{COUNT}  " in done(command("--query", name, "--index", tmp_path / "v", "--top", COUNT)).out


# ---- --add


def test_add_writes_same_bytes_as_single_extraction(place: Place, command: Command, tmp_path: Path) -> None:
    train = place.data / "train"
    images = [*sorted((train / "bars").iterdir()), *sorted((train / "dots").iterdir())]
    (tmp_path / "all.txt").write_text("\n".join(map(str, images)))
    kind = ("--pooling", "mean", "--dtype", "fp16")
    done(command(*words(place, "--output-dir", tmp_path / "all", *kind, data=tmp_path / "all.txt")))
    done(command(*words(place, "--output-dir", tmp_path / "v", *kind, data=train / "bars")))
    add = words(place, "--output-dir", tmp_path / "v", "--add", *kind, data=train / "dots")
    assert "16 vectors of size 64" in done(command(*add)).out
    for name in ("vectors.npy", "paths.txt", "index.faiss"):
        assert (tmp_path / "v" / name).read_bytes() == (tmp_path / "all" / name).read_bytes(), name
    metadata = open_collection(tmp_path / "v").metadata
    assert (metadata["count"], metadata["data"]["images"]) == (16, 8)
    assert [data["images"] for data in metadata["added"]] == [8]
    assert np.load(tmp_path / "v" / "vectors.npy").dtype == np.float16
    assert "already there" in done(command(*add)).out
    query = done(command("--query", images[12], "--index", tmp_path / "v", "--top", 1))
    assert query.out.splitlines()[-2].split(maxsplit=2)[::2] == ["1", str(images[12])]


def test_add_refuses_mismatch_and_names_difference(place: Place, command: Command, tmp_path: Path) -> None:
    train = place.data / "train"
    done(command(*words(place, "--output-dir", tmp_path / "v", data=train / "bars")))
    before = content(tmp_path / "v")
    other = Place(place.data, tiny_checkpoint(tmp_path / "other", place.data, seed=1))
    for changed, more, data, said in (
        (place, ("--pooling", "mean"), train / "dots", "pooling is cls there and mean here"),
        (place, ("--dtype", "fp16", "--index-type", "hnsw"), train / "dots", "fp16 here; index_type is flat there and"),
        (place, ("--eval-crop", 24), train / "dots", "'crop': 28"),
        (other, (), train / "dots", "weights is"),
        (place, (), train, "bars 00.jpg; give other images"),
    ):
        refused = command(*words(changed, "--output-dir", tmp_path / "v", "--add", *more, data=data))
        assert (refused.code, said in refused.err) == (2, True), refused.err
        assert content(tmp_path / "v") == before
    refused = command(*words(place, "--output-dir", tmp_path / "none", "--add"))
    assert "is no collection: expected a folder" in refused.err
    assert not (tmp_path / "none").exists()


# ---- collection inside the folder of its images


def test_collection_in_subfolder_of_its_images_is_not_extracted(place: Place, command: Command, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(place.data / "val", images)
    assert "the folder of the images" in command(*words(place, "--output-dir", images, data=images)).err
    given = words(place, "--output-dir", images / "v", data=images)
    done(command(*given))
    query = ("--query", images / "bars" / "bars 00.jpg", "--index", images / "v")
    assert f"contact sheet: {images}/v" in done(command(*query)).out
    assert "already there" in done(command(*given)).out, "the contact sheet counts as an image of the data"


# ---- invalid flags


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("--query q.png --index v --pooling gem", "pooling"), ("--query q.png", "index"),
        ("--query q.png --index v --data-path photos", "data_path"), ("--output-dir v --scales 1 0", "scales"),
        ("--output-dir v --scales 1 0.5 --no-normalise", "scales"), ("--output-dir v --whiten-dim 3", "whiten_dim"),
        ("--output-dir v --add --overwrite", "--add"),
    ],
)  # fmt: skip
def test_invalid_flags_error_names_setting(typed: str, name: str, command: Command) -> None:
    refused = command(*typed.split())
    assert refused.code == 2
    assert name in refused.err


# ---- kills


def test_extraction_resumes_after_kill_between_shards(
    place: Place, command: Command, straight: Path, tmp_path: Path
) -> None:
    killed = words(place, "--output-dir", tmp_path / "killed")
    made: dict[Path, int] = {}
    for more, count in ((1, 1), (2, 3)):
        code, _ = run_in_a_child(run_extract, killed, tmp_path / "log", tmp_path / "killed", die_at_part=more)
        assert code == -9
        parts = (tmp_path / "killed" / ".parts").glob("*/features.npy")
        there = {path: path.stat().st_mtime_ns for path in parts}
        assert len(there) == count
        assert made.items() <= there.items(), "a complete shard was deleted or rewritten"
        made = there
    assert "resuming from the shards of an earlier extraction" in done(command(*killed)).out
    assert content(tmp_path / "killed") == content(straight)
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == sorted(FILES)


def kill_at_each(place: Place, command: Command, tmp_path: Path, straight: Path, step: int) -> int:
    """Kill at every ``step``-th file operation, resume and compare the files; return the number of kills."""
    wanted = content(straight)
    folder = tmp_path / "counted"
    code, log = run_in_a_child(run_extract, words(place, "--output-dir", folder), tmp_path / "log", folder)
    assert code == 0, log
    kills = range(1, int(log.splitlines()[-1]) + 1, step)
    for number in kills:
        folder = tmp_path / str(number)
        again = words(place, "--output-dir", folder)
        assert run_in_a_child(run_extract, again, tmp_path / "log", folder, number)[0] == -9
        outcome = command(*again)
        assert outcome.code == 0, (number, outcome.err)
        assert content(folder) == wanted, number
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")], number
        shutil.rmtree(folder)
    return len(kills)


@pytest.mark.parametrize(("step", "most"), [(23, 4), pytest.param(1, 60, marks=pytest.mark.slow)])
def test_extraction_resumed_after_kill_at_file_operation_is_identical(
    place: Place, command: Command, straight: Path, tmp_path: Path, step: int, most: int
) -> None:
    assert kill_at_each(place, command, tmp_path, straight, step) >= most


@pytest.mark.parametrize(("early", "late"), [(60, 6), pytest.param(20, 3, marks=pytest.mark.slow)])
def test_add_resumed_after_kill_at_file_operation_is_identical(
    place: Place, command: Command, tmp_path: Path, early: int, late: int
) -> None:
    """Kills are denser among the last file operations, which rename the files."""
    done(command(*words(place, "--output-dir", tmp_path / "first", data=place.data / "train" / "bars")))

    def adding(folder: Path) -> tuple[object, ...]:
        return words(place, "--output-dir", folder, "--add", data=place.data / "train" / "dots")

    shutil.copytree(tmp_path / "first", tmp_path / "straight")
    code, log = run_in_a_child(run_extract, adding(tmp_path / "straight"), tmp_path / "log", tmp_path / "straight")
    assert code == 0, log
    wanted, operations = content(tmp_path / "straight"), int(log.splitlines()[-1])
    for number in [*range(1, operations - 20, early), *range(operations - 20, operations + 1, late)]:
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "first", folder)
        assert run_in_a_child(run_extract, adding(folder), tmp_path / "log", folder, number)[0] == -9
        done(command(*adding(folder)))
        assert content(folder) == wanted, number


# ---- two ranks


def test_two_ranks_write_same_bytes_as_one_process(place: Place, straight: Path, tmp_path: Path) -> None:
    on_two_ranks(run_extract, tmp_path, *words(place, "--output-dir", tmp_path / "two", "--device", "cpu"))
    assert content(tmp_path / "two") == content(straight)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(FILES)


# ---- unreadable images


def test_unreadable_image_is_refused_unless_skip_is_given(place: Place, command: Command, tmp_path: Path) -> None:
    shutil.copytree(place.data / "train", tmp_path / "train")
    broken = tmp_path / "train" / "waves" / "waves 03.png"
    broken.write_bytes(b"not a picture")
    given = words(place, "--output-dir", tmp_path / "v", data=tmp_path / "train")
    refused = command(*given)
    assert refused.code == 2
    assert "waves 03.png cannot be read" in refused.err
    assert "(--unreadable skip skips unreadable images)" in refused.err
    skipping = (*given, "--unreadable", "skip")
    told = done(command(*skipping)).out
    assert "resuming from the shards of an earlier extraction" in told
    assert "warning: skipped 1 unreadable image" in told
    for again in (skipping, given):
        assert "already there" in done(command(*again)).out
    collection = open_collection(tmp_path / "v")
    assert len(collection.names) == COUNT - 1 == collection.metadata["count"]
    assert collection.metadata["data"]["unreadable"] == {"count": 1, "first": [str(broken)]}
    last = collection.names[-1]
    assert f"1  1.0000  {last}" in done(command("--query", last, "--index", tmp_path / "v", "--top", 1)).out


# ---- existing folders


def test_shards_of_another_extraction_are_not_reused(
    place: Place, command: Command, straight: Path, tmp_path: Path
) -> None:
    given = words(place, "--output-dir", tmp_path / "v")
    gem = (*given, "--pooling", "gem")
    assert run_in_a_child(run_extract, gem, tmp_path / "log", tmp_path / "v", die_at_part=2)[0] == -9
    done(command(*given))
    assert content(tmp_path / "v") == content(straight)


def test_damaged_collection_is_refused_unless_overwrite_is_given(
    place: Place, command: Command, straight: Path, tmp_path: Path
) -> None:
    shutil.copytree(straight, tmp_path / "v")
    (tmp_path / "v" / "index.faiss").write_bytes(b"IxF")
    given = words(place, "--output-dir", tmp_path / "v")
    refused = command(*given)
    assert (refused.code, "--overwrite" in refused.err) == (2, True)
    assert len(list((tmp_path / "v").iterdir())) == len(FILES)
    done(command(*given, "--overwrite"))
    assert content(tmp_path / "v") == content(straight)


def test_claim_refuses_folder_in_use_by_another_extraction(tmp_path: Path) -> None:
    config, source = ExtractConfig(output_dir="v"), noise_source(3)
    with ExitStack() as first, ExitStack() as second:
        assert claim(tmp_path / "v", {}, source, config, first) == ""
        with pytest.raises(InputError, match="is in use by another run"):
            claim(tmp_path / "v", {}, source, config, second)
    with ExitStack() as third:
        assert claim(tmp_path / "v", {}, source, config, third) == ""


def test_shard_with_only_unreadable_images_is_skipped(place: Place, command: Command, tmp_path: Path) -> None:
    photos = shutil.copytree(place.data / "train", tmp_path / "photos")
    files = sorted(photos.rglob("*.*"))
    for path in files[4:8]:  # the second shard
        path.write_bytes(b"broken")
    flags = words(place, "--output-dir", tmp_path / "v", "--unreadable", "skip", data=photos)
    done(command(*flags))
    assert open_collection(tmp_path / "v").names == [str(path) for path in (*files[:4], *files[8:])]
    for path in files:
        path.write_bytes(b"broken")
    refused = command(*flags, "--overwrite")
    assert (refused.code, f"all {COUNT} images" in refused.err) == (2, True)
