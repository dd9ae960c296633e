"""Real runs in which a process hangs or dies: live ranks exit in time with code 4; no process or memory is left."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from ranks import Run, Start, children_of

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


def family_of(run: Run) -> set[int]:
    """Return the PIDs of the ranks and of their loader workers."""
    return {*run.pids, *(child for pid in run.pids for child in children_of(pid))}


def assert_nothing_is_left(run: Run, family: set[int], shared_before: set[str]) -> None:
    until = time.monotonic() + 3
    while (any(map(alive, family)) or not shared_memory() <= shared_before) and time.monotonic() < until:
        time.sleep(0.05)
    assert not [pid for pid in family if alive(pid)]
    assert shared_memory() <= shared_before
    assert "Traceback (" not in run.err()


@pytest.mark.parametrize("stopped", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_live_rank_exits_in_time_when_other_rank_is_stopped(start: Start, stopped: int) -> None:
    """SIGSTOP stops the other rank. Rank 0 also hosts the store."""
    before, live = shared_memory(), 1 - stopped
    run = start(*FLAGS, "--num-workers", "1")
    run.until_step(4)
    time.sleep(1.5)  # both ranks have written their phase to the store
    family = family_of(run)
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
    assert "the store does not respond" in sentence if stopped == 0 else "rank 1 at " in sentence
    assert_nothing_is_left(run, family, before)


@pytest.mark.parametrize(
    ("victim", "number", "codes", "said"),
    [
        ("loader", signal.SIGKILL, [LOST, LOST], r"rank 1, step \d+ \(.*loader worker"),
        pytest.param(
            "loader",
            signal.SIGSTOP,
            [LOST, LOST],
            r"rank 1(, step \d+| at \S+: step \d+) \(waiting for images",
            marks=pytest.mark.slow,
        ),
        ("rank", signal.SIGKILL, [LOST, -signal.SIGKILL], r"rank 0, step \d+ \("),
    ],
    ids=["killed loader", "stopped loader", "killed rank"],
)
def test_killed_or_stopped_process_ends_run_in_time(
    start: Start, victim: str, number: signal.Signals, codes: list[int], said: str
) -> None:
    before = shared_memory()
    run = start(*FLAGS, "--num-workers", "1")
    run.until_step(4)
    time.sleep(1.5)
    family = family_of(run)
    (loader,) = children_of(run.pids[1])
    os.kill(loader if victim == "loader" else run.pids[1], number)
    assert run.wait(TIMEOUT + 10) == codes, run.err()
    assert re.search(said, run.err())
    assert_nothing_is_left(run, family, before)
