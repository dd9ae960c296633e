"""Runs of real processes one of which stands still or dies: they end in time, name it, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from ranks import Run, Server

from dino_xcit.errors import LOST

TIMEOUT = 5.0
FLAGS = ["--batch-size-per-gpu", "2", "--max-steps", "400", "--epochs", "20", "--save-every", "2"]
FLAGS += ["--hang-timeout", str(TIMEOUT)]


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith(("torch_", "sem.", "psm_", "pym"))}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_nothing_is_left(run: Run, family: set[int], shared_before: set[str]) -> None:
    until = time.monotonic() + 3
    while any(map(alive, family)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not [pid for pid in family if alive(pid)]
    assert shared_memory() <= shared_before
    assert "Traceback" not in run.err()


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_stands_still_is_named_and_the_run_ends_in_time(
    server: Server, photos: Path, tmp_path: Path, stopped: int
) -> None:
    """SIGSTOP. Rank 0 also holds the store through which the ranks tell each other that they live."""
    before = shared_memory()
    run = server.start(tmp_path / "run", "--data-path", photos, *FLAGS, "--num-workers", "1")
    run.until_step(4)
    time.sleep(1.5)  # each has told the others that it lives
    family = {*run.pids, *(child for pid in run.pids for child in children_of(pid))}
    assert len(family) == 4
    began = time.monotonic()
    run.send(signal.SIGSTOP, stopped)
    codes = run.wait(TIMEOUT + 10)
    took = time.monotonic() - began
    assert codes[1 - stopped] == LOST, run.err()
    assert codes[stopped] == -signal.SIGKILL  # the other one ended it: it would not have listened
    assert TIMEOUT <= took < TIMEOUT + 10
    said = run.err(1 - stopped)
    assert f"rank {1 - stopped} has stood still for" in said
    assert f"rank {stopped}" in said
    assert f"process {run.pids[stopped]}" in said
    assert "stands still" in said
    assert "training step" in said or "agreeing with the others" in said  # what it waited for
    assert_nothing_is_left(run, family, before)


def test_a_loader_process_that_is_killed_ends_the_run_at_once_and_is_named(
    server: Server, photos: Path, tmp_path: Path
) -> None:
    before = shared_memory()
    run = server.start(tmp_path / "run", "--data-path", photos, *FLAGS, "--num-workers", "2")
    run.until_step(4)
    workers = children_of(run.pids[1])
    assert len(workers) == 2
    family = {*run.pids, *children_of(run.pids[0]), *workers}
    began = time.monotonic()
    os.kill(workers[0], signal.SIGKILL)
    assert run.wait(TIMEOUT + 10) == [LOST, LOST], run.err()
    assert time.monotonic() - began < TIMEOUT + 10
    assert "rank 1 lost a loader process" in run.err(1)
    assert str(workers[0]) in run.err(1)
    assert "rank 1 ended: rank 1 lost a loader process" in run.err(0)
    assert_nothing_is_left(run, family, before)


def test_a_loader_process_that_stands_still_is_found_out_too(server: Server, photos: Path, tmp_path: Path) -> None:
    before = shared_memory()
    run = server.start(tmp_path / "run", "--data-path", photos, *FLAGS, "--num-workers", "1")
    run.until_step(4)
    time.sleep(1.5)
    (worker,) = children_of(run.pids[1])
    family = {*run.pids, *children_of(run.pids[0]), worker}
    os.kill(worker, signal.SIGSTOP)
    assert run.wait(TIMEOUT + 10) == [LOST, LOST], run.err()
    assert "(waiting for images)" in run.err()
    assert "rank 1" in run.err(0)
    assert_nothing_is_left(run, family, before)


def test_a_killed_rank_is_named_and_its_loader_processes_die_with_it(
    server: Server, photos: Path, tmp_path: Path
) -> None:
    before = shared_memory()
    run = server.start(tmp_path / "run", "--data-path", photos, *FLAGS, "--num-workers", "1")
    run.until_step(4)
    time.sleep(1.5)
    family = {*run.pids, *(child for pid in run.pids for child in children_of(pid))}
    run.kill(1)
    assert run.wait(15) == [LOST, -signal.SIGKILL], run.err()
    assert f"lost the others: rank 1 (process {run.pids[1]} on " in run.err(0)
    assert_nothing_is_left(run, family, before)


def test_a_single_process_whose_images_do_not_come_ends_too(server: Server, photos: Path, tmp_path: Path) -> None:
    run = server.start(tmp_path / "run", "--data-path", photos, *FLAGS, "--num-workers", "1", ranks=1)
    run.until_step(3)
    (worker,) = children_of(run.pids[0])
    os.kill(worker, signal.SIGSTOP)
    assert run.wait(TIMEOUT + 10) == [LOST], run.err()
    assert "rank 0 has stood still for" in run.err()
    assert "(waiting for images)" in run.err()
    assert not alive(worker)
