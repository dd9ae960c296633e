"""Real runs in which a process hangs or dies: the live ranks end in time with code 4 and leave nothing behind."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from ranks import Run, Server, children_of

from dino_xcit.errors import LOST

TIMEOUT = 5.0
FLAGS = ["--batch-size-per-gpu", "2", "--max-steps", "400", "--epochs", "20", "--save-every", "2"]
FLAGS += ["--hang-timeout", str(TIMEOUT)]


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith(("torch_", "sem.", "psm_", "pym"))}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_nothing_is_left(run: Run, family: set[int], shared_before: set[str]) -> None:
    until = time.monotonic() + 3
    while (any(map(alive, family)) or not shared_memory() <= shared_before) and time.monotonic() < until:
        time.sleep(0.05)
    assert not [pid for pid in family if alive(pid)]
    assert shared_memory() <= shared_before
    assert "Traceback (" not in run.err()


@pytest.mark.parametrize("stopped", [0, 1])
def test_the_live_rank_ends_in_time_when_the_other_is_stopped(
    server: Server, photos: Path, tmp_path: Path, stopped: int
) -> None:
    """SIGSTOP. Rank 0 also holds the store."""
    before, live = shared_memory(), 1 - stopped
    run = server.start(tmp_path / "run", "--data-path", photos, *FLAGS, "--num-workers", "1")
    run.until_step(4)
    time.sleep(1.5)  # both have written their phase to the store
    family = {*run.pids, *(child for pid in run.pids for child in children_of(pid))}
    assert len(family) == 4
    began = time.monotonic()
    run.send(signal.SIGSTOP, stopped)
    run.until(lambda: run.codes()[live] is not None, TIMEOUT + 10)
    assert time.monotonic() - began >= TIMEOUT
    run.kill(stopped)  # as torchrun and Slurm do
    codes = run.wait(10)
    assert codes[live] == LOST, run.err()
    (sentence,) = [line for line in run.err(live).splitlines() if line.startswith("error: ")]
    assert re.search(rf"rank {live}, step \d+ \((training step|exchanging stop flags)\)", sentence)
    assert "the store does not answer" in sentence if stopped == 0 else "rank 1 at " in sentence
    assert_nothing_is_left(run, family, before)


def test_a_killed_loader_process_ends_the_run_at_once(server: Server, photos: Path, tmp_path: Path) -> None:
    before = shared_memory()
    run = server.start(tmp_path / "run", "--data-path", photos, *FLAGS, "--num-workers", "2")
    run.until_step(4)
    workers = children_of(run.pids[1])
    assert len(workers) == 2
    family = {*run.pids, *children_of(run.pids[0]), *workers}
    os.kill(workers[0], signal.SIGKILL)
    assert run.wait(TIMEOUT + 10) == [LOST, LOST], run.err()
    assert re.search(r"rank 1, step \d+ \(.*loader process", run.err(1))
    assert_nothing_is_left(run, family, before)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stopped_loader_process_ends_the_run_in_time(
    server: Server, photos: Path, tmp_path: Path, ranks: int
) -> None:
    before = shared_memory()
    run = server.start(tmp_path / "run", "--data-path", photos, *FLAGS, "--num-workers", "1", ranks=ranks)
    run.until_step(4)
    time.sleep(1.5)
    (worker,) = children_of(run.pids[-1])
    family = {*run.pids, *children_of(run.pids[0]), worker}
    os.kill(worker, signal.SIGSTOP)
    assert run.wait(TIMEOUT + 10) == [LOST] * ranks, run.err()
    assert re.search(rf"rank {ranks - 1}(, step \d+| at \S+: step \d+) \(waiting for images", run.err())
    assert_nothing_is_left(run, family, before)


def test_a_killed_rank_ends_the_other_and_the_loader_processes_of_both(
    server: Server, photos: Path, tmp_path: Path
) -> None:
    before = shared_memory()
    run = server.start(tmp_path / "run", "--data-path", photos, *FLAGS, "--num-workers", "1")
    run.until_step(4)
    family = {*run.pids, *(child for pid in run.pids for child in children_of(pid))}
    run.kill(1)
    assert run.wait(15) == [LOST, -signal.SIGKILL], run.err()
    assert re.search(r"rank 0, step \d+ \(", run.err(0))
    assert_nothing_is_left(run, family, before)
