"""Watchdog: time limits of phases and errors from lost processes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

from dino_xcit.errors import LOST, RunStopped
from dino_xcit.runtime import distributed, watchdog


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes that the watchdog passes to ``os._exit``, which only records them. It checks ten times a second."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(watchdog, "TICK", 0.1)
    return codes


@pytest.mark.parametrize("limit", [False, True])
def test_watchdog_ends_only_phase_with_limit(codes: list[int], capfd: pytest.CaptureFixture[str], limit: bool) -> None:
    with watchdog.watched(0.2):
        watchdog.phase("indexing", 3, limit=limit)
        time.sleep(0.8)
    assert set(codes) == ({LOST} if limit else set())
    said = capfd.readouterr().err
    assert ("Current thread" in said) is limit  # printed by faulthandler
    assert ("error: rank 0, step 3 (indexing)" in said) is limit


@pytest.mark.parametrize("renew", [lambda step: watchdog.phase("training step", step), lambda _: watchdog.progress()])
def test_phase_change_or_progress_resets_watchdog_timer(codes: list[int], renew: Callable[[int], None]) -> None:
    with watchdog.watched(0.5):
        watchdog.phase("evaluating", 3)
        for step in range(10):
            renew(step)
            time.sleep(0.1)
    assert codes == []


@pytest.mark.parametrize(
    "error",
    [RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), EOFError(), dist.DistNetworkError("gone")],
)
def test_lost_process_raises_run_stopped_with_the_phase(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "world_size", lambda: 2)

    def lose() -> None:
        with watchdog.watched(60):
            watchdog.phase("saving", 5)
            raise error

    with pytest.raises(RunStopped, match=r"rank 0, step 5 \(saving\)") as caught:
        lose()
    assert caught.value.code == LOST
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [ZeroDivisionError(), BrokenPipeError(), RuntimeError("Caught KeyError in DataLoader worker process 0.")]
)
def test_other_errors_propagate_and_watchdog_thread_ends(error: Exception) -> None:
    with pytest.raises(type(error)), watchdog.watched(60):
        raise error
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}
