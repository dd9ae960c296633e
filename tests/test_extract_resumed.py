"""run_extract.py: killed, shared by processes, with images missing, over what is there already."""

from __future__ import annotations

import functools
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from dying_child import run_in_a_child
from eval_fixtures import noise_source
from extract_fixtures import COUNT, Place, content, done, new_place, words
from ranks import Server
from run_here import Command, Here

import run_extract
from dino_xcit.errors import InputError
from eval.retrieval.collection import FILES, claim, open_collection
from eval.retrieval_config import ExtractConfig


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return new_place(tmp_path_factory.mktemp("extract"))


@pytest.fixture
def command(here: Here) -> Command:
    """Runs run_extract.py in this process."""
    return functools.partial(here, run_extract)


# ---- kills


def test_killed_between_two_parts_the_same_command_goes_on_and_ends_with_the_same_bytes(
    place: Place, command: Command, tmp_path: Path
) -> None:
    done(command(*words(place, "--output-dir", tmp_path / "straight")))
    killed = words(place, "--output-dir", tmp_path / "killed")
    made: dict[Path, int] = {}
    for more, count in ((1, 1), (1, 2), (2, 4)):
        code, _ = run_in_a_child(run_extract, killed, tmp_path / "log", tmp_path / "killed", die_at_part=more)
        assert code == -9
        parts = (tmp_path / "killed" / ".parts").glob("*/features.npy")
        there = {path: path.stat().st_mtime_ns for path in parts}
        assert len(there) == count
        assert made.items() <= there.items(), "finished parts are kept as they are"
        made = there
    assert "resuming: 4 of 6 parts are there" in done(command(*killed)).out
    assert content(tmp_path / "killed") == content(tmp_path / "straight")
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == sorted(FILES)


def kill_at_each(place: Place, command: Command, tmp_path: Path, step: int, *more: object) -> int:
    """Kill at every ``step``-th operation on a file, go on, compare. How many were killed."""
    done(command(*words(place, "--output-dir", tmp_path / "straight", *more)))
    wanted = content(tmp_path / "straight")
    folder = tmp_path / "counted"
    code, log = run_in_a_child(run_extract, words(place, "--output-dir", folder, *more), tmp_path / "log", folder)
    assert code == 0, log
    operations = int(log.splitlines()[-1])
    kills = 0
    for number in range(1, operations + 1, step):
        folder = tmp_path / str(number)
        again = words(place, "--output-dir", folder, *more)
        assert run_in_a_child(run_extract, again, tmp_path / "log", folder, number)[0] == -9
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
    code, log = run_in_a_child(run_extract, adding(tmp_path / "straight"), tmp_path / "log", tmp_path / "straight")
    assert code == 0, log
    wanted, operations = content(tmp_path / "straight"), int(log.splitlines()[-1])
    for number in [*range(1, operations - 20, 20), *range(operations - 20, operations + 1, 3)]:
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "first", folder)
        assert run_in_a_child(run_extract, adding(folder), tmp_path / "log", folder, number)[0] == -9
        done(command(*adding(folder)))
        assert content(folder) == wanted, number


# ---- processes


def test_two_processes_share_the_parts_and_leave_the_bytes_of_one(
    place: Place, command: Command, server: Server, tmp_path: Path
) -> None:
    shared = ("--pooling", "gem", "--scales", "1", "0.5", "--device", "cpu")
    done(command(*words(place, "--output-dir", tmp_path / "one", *shared)))
    two = words(place, "--output-dir", tmp_path / "two", *shared)
    server.runner_on_two_ranks("run_extract", two, tmp_path, timeout=120)
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(FILES)


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
    assert "resuming: 4 of 6 parts are there" in told
    assert "warning: left out 1 image" in told
    for again in (skipping, given):
        assert "already there" in done(command(*again)).out
    collection = open_collection(tmp_path / "v")
    assert len(collection.names) == COUNT - 1 == collection.metadata["count"]
    assert str(broken) not in collection.names
    assert collection.metadata["data"]["unreadable"] == {"count": 1, "first": [str(broken)]}
    assert (
        f"1  1.0000  {collection.names[-1]}"
        in done(command("--query", collection.names[-1], "--index", tmp_path / "v", "--top", 1)).out
    )


# ---- what is there already


def test_an_unfinished_extraction_is_not_mixed_with_another(place: Place, command: Command, tmp_path: Path) -> None:
    first = words(place, "--output-dir", tmp_path / "v")
    assert run_in_a_child(run_extract, first, tmp_path / "log", tmp_path / "v", die_at_part=2)[0] == -9
    other = (*first[:-1], tmp_path / "w", "--pooling", "gem")
    done(command(*other))
    done(command(*first, "--pooling", "gem"))
    assert content(tmp_path / "v") == content(tmp_path / "w")


def test_two_extractions_into_one_folder_do_not_meet(tmp_path: Path) -> None:
    config, source = ExtractConfig(output_dir="v"), noise_source(3)
    with ExitStack() as first, ExitStack() as second:
        assert claim(tmp_path / "v", {}, source, config, first) == ""
        with pytest.raises(InputError, match="is in use by another run"):
            claim(tmp_path / "v", {}, source, config, second)
    with ExitStack() as third:
        assert claim(tmp_path / "v", {}, source, config, third) == ""


def test_vectors_that_are_no_numbers_end_the_work(place: Place, command: Command, tmp_path: Path) -> None:
    state = torch.load(place.weights.with_name("backbone.pth"), weights_only=True)
    state["norm.weight"][3] = torch.inf
    torch.save(state, tmp_path / "diverged.pth")
    refused = command(*words(Place(place.data, tmp_path / "diverged.pth"), "--output-dir", tmp_path / "v"))
    assert (refused.code, "not finite" in refused.err) == (2, True)
