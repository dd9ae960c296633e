"""Packing is always the same bytes: however often it was killed, with any number of processes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bad_images import encoded, photograph, write_corpus
from dying_child import in_a_child
from pack_fixtures import FIVE, class_tree, content, members
from ranks import ENVIRONMENT, HERE

from dino_xcit.data import open_source
from dino_xcit.data.packing.command import main, pack
from dino_xcit.data.packing.folder import Options


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return class_tree(tmp_path / "tree")


def test_any_number_of_processes_writes_the_same_bytes(tmp_path: Path) -> None:
    write_corpus(tmp_path / "in", good=40, seed=2)
    source = open_source(str(tmp_path / "in"))
    options = Options(max_side=64, shard_images=9)
    for workers in (1, 2):
        pack(source, tmp_path / str(workers), options, workers)
    assert content(tmp_path / "1") == content(tmp_path / "2")
    assert len(members(tmp_path / "1")) == 40


def test_killed_before_any_operation_on_a_file_the_same_command_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source = open_source(str(class_tree(tmp_path / "in")))
    (tmp_path / "in" / "n01" / "n01_3.v1.JPEG").write_bytes(b"broken")
    pack(source, tmp_path / "whole", FIVE, 1)
    expected = content(tmp_path / "whole")
    for number in range(1, 200):
        broken = tmp_path / f"killed{number}"
        ended, _ = in_a_child(lambda b=broken: pack(source, b, FIVE, 1), tmp_path / "log", broken, number)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        kept = {path: path.stat().st_mtime_ns for path in broken.glob("*.tar")}
        pack(source, broken, FIVE, 1)
        assert content(broken) == expected
        again = [path for path, when in kept.items() if path.stat().st_mtime_ns != when]
        assert len(again) <= 1  # the one that had its name already, but was not listed yet
    assert number > 25


def test_killed_in_the_middle_of_a_shard_nothing_has_its_name(tree: Path, tmp_path: Path) -> None:
    source = open_source(str(tree))

    def act() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        pack(source, tmp_path / "out", FIVE, 1)

    assert in_a_child(act, tmp_path / "log", tmp_path / "out")[0] == -signal.SIGXFSZ
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        ".shard-000000.tar.tmp",
        "classes.json",
        "pack.json",
    }
    pack(source, tmp_path / "out", FIVE, 1)
    pack(source, tmp_path / "whole", FIVE, 1)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.slow
def test_a_real_command_killed_with_its_processes_goes_on_and_leaves_none_behind(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for number in range(160):
        (source / f"{number:03d}.jpg").write_bytes(encoded(photograph(number).resize((600, 450)), "JPEG"))
    out, options = tmp_path / "out", ["--max-side", "500", "--shard-images", "20", "--workers", "2"]
    command = [sys.executable, "-m", "dino_xcit.data", "pack", str(source), str(out), *options]
    environment = os.environ | ENVIRONMENT
    with subprocess.Popen(
        command, env=environment, cwd=HERE.parent, stdout=subprocess.DEVNULL, start_new_session=True
    ) as run:
        until = time.monotonic() + 60
        while not (out / "shard-000001.tar").exists() and time.monotonic() < until:
            time.sleep(0.002)
        run.kill()
    assert run.returncode == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")}
    assert 2 <= len(before) < 8
    until = time.monotonic() + 20
    while processes_of_session(run.pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert processes_of_session(run.pid) == []
    assert main([str(source), str(out), *options]) == 0
    again = [path for path, when in before.items() if path.stat().st_mtime_ns != when]
    assert len(again) <= 1
    assert main([str(source), str(tmp_path / "whole"), *options[:-1], "1"]) == 0
    assert content(out) == content(tmp_path / "whole")


def processes_of_session(session: int) -> list[int]:
    """Which processes live that were started in this session."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(folder.name))
    return found


def test_a_shard_that_is_gone_or_cut_short_is_made_again_and_no_other(tree: Path, tmp_path: Path) -> None:
    (tree / "n01" / "n01_0.v1.JPEG").write_bytes(b"broken")
    source, out = open_source(str(tree)), tmp_path / "out"
    pack(source, out, FIVE, 1)
    expected = content(out)
    assert pack(source, out, FIVE, 1)[1] == 0
    (out / "shard-000000.tar").unlink()
    os.truncate(out / "shard-000002.tar", 512)
    untouched = (out / "shard-000001.tar").stat().st_mtime_ns
    assert pack(source, out, FIVE, 1)[1] == 6 + 1
    assert content(out) == expected
    assert (out / "shard-000001.tar").stat().st_mtime_ns == untouched


@pytest.mark.parametrize("readers", [0, 1, 4])
def test_a_shard_in_which_one_bit_turned_is_made_again(tree: Path, tmp_path: Path, readers: int) -> None:
    source, out = open_source(str(tree)), tmp_path / "out"
    pack(source, out, FIVE, 1)
    expected = content(out)
    damaged = bytearray(expected["shard-000001.tar"])
    damaged[1234] ^= 1
    (out / "shard-000001.tar").write_bytes(damaged)
    assert pack(source, out, FIVE, readers)[1] == 5
    assert content(out) == expected
