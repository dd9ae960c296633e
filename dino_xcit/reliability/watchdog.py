"""A run that stands still ends, and says which process it waited for.

Each process tells the others through torch.distributed's key-value store, every second, that it lives and what it is
doing. A process whose own work has not moved for ``timeout`` seconds looks who has fallen silent, says so, and ends
the run, together with silent processes on its own machine: a stopped one (SIGSTOP) would not hear anything gentler.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from dino_xcit import distributed
from dino_xcit.errors import LOST, InputError, RunStopped

BEAT = 1.0
"""Seconds between two signs of life."""
SILENT = 3 * BEAT
"""Seconds without one after which a process counts as silent."""
_LAST_WORDS = "last words"

COLLECTIVE = ("training step", "agreeing with the others", "end")
"""What a process may be doing while it merely waits for others."""


@dataclass(frozen=True)
class Process:
    """Where a process of the run lives."""

    host: str
    pid: int
    started: str
    """From /proc, so that a process number that was given out again is not mistaken for it; empty elsewhere."""

    @classmethod
    def this(cls) -> Process:
        """The one that asks."""
        return cls(socket.gethostname(), os.getpid(), _start_time(os.getpid()))

    def kill(self) -> None:
        """End it, if it is on this machine."""
        if self.host == socket.gethostname() and self.pid != os.getpid() and _start_time(self.pid) == self.started:
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


class Watchdog:
    """Watches this process's main thread; a context in which it turns lost processes into one sentence.

        with Watchdog(timeout) as watchdog:
            watchdog.now("training step", 17)

    Raises:
        RunStopped: (from the context) a loader process was killed, or another process of the run was lost.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._rank, self._world = distributed.rank(), distributed.world_size()
        store = distributed.store()
        # A connection of its own: the main thread may hold the other one while it waits.
        self._store = store.clone() if store is not None else None
        if self._store is not None:
            self._store.set_timeout(timedelta(seconds=5))
        self._doing, self._step, self._since = "starting", 0, time.monotonic()
        self._process = Process.this()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._beats = 0
        self._known: dict[int, Process] = {}
        """Where the other processes live: asked for early, because later the store may not answer."""

    def now(self, doing: str, step: int) -> None:
        """The main thread is at something new."""
        self._doing, self._step, self._since = doing, step, time.monotonic()

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if error is None:
            return
        _end_children()
        sentence = None
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            sentence = (
                f"rank {self._rank} lost a loader process ({' '.join(str(error).split())[:160]}): perhaps the machine "
                "ran out of memory (fewer --num-workers need less); the same command carries on from the last "
                "checkpoint"
            )
        elif self._world > 1 and is_lost_connection(error):
            found = self._others(look_for=2 * SILENT)
            sentence = f"rank {self._rank}, in step {self._step} ({self._doing}), lost the others: {found}"
        self._tell(_LAST_WORDS, sentence or _in_a_word(error))
        if sentence:
            raise RunStopped(LOST, f"error: {sentence}") from error

    # ---- the thread

    def _watch(self) -> None:
        while not self._over.wait(BEAT):
            self._beats += 1
            self._tell("alive", self._beats)
            if len(self._known) < self._world - 1:
                self._ask_all()
            standing = time.monotonic() - self._since
            if standing > self._timeout:
                self._give_up(standing)

    def _give_up(self, standing: float) -> None:
        doing, step = self._doing, self._step
        found = self._others(look_for=SILENT + BEAT) if self._world > 1 else ""
        if time.monotonic() - self._since < self._timeout or self._over.is_set():
            return  # it moved while we looked
        sentence = f"rank {self._rank} has stood still for {standing:.0f} s in step {step} ({doing})"
        sentence += f"; {found}" if found else ""
        print(f"error: {sentence} (--hang-timeout is {self._timeout:g} s)", file=sys.stderr, flush=True)
        self._tell(_LAST_WORDS, sentence)
        _end_children()
        os._exit(LOST)

    def _tell(self, what: str, value: object) -> None:
        if self._store is not None:
            message = {"doing": self._doing, "step": self._step, "for": time.monotonic() - self._since, what: value}
            with contextlib.suppress(RuntimeError):  # the store's host is gone or stands still
                key = _LAST_WORDS if what == _LAST_WORDS else "alive"
                self._store.set(f"{key}/{self._rank}", json.dumps(message | vars(self._process)))

    def _others(self, look_for: float) -> str:
        """What the other processes do, those who keep silent first; ends silent ones on this machine."""
        first = self._ask_all()
        until, latest = time.monotonic() + look_for, first
        while time.monotonic() < until:
            time.sleep(BEAT / 2)
            self._beats += 1
            self._tell("alive", self._beats)  # so that nobody takes us for silent meanwhile
            latest = self._ask_all()
            if latest is None or first is None:
                break
        if first is None or latest is None:
            holder = "torchrun of rank 0" if "TORCHELASTIC_RUN_ID" in os.environ else "rank 0"
            if holder == "rank 0" and 0 in self._known:
                self._known[0].kill()
                holder += f" (process {self._known[0].pid} on {self._known[0].host})"
            return f"{holder} was killed or stands still: torch.distributed's store, which it holds, does not answer"
        words = self._ask_all(_LAST_WORDS) or {}
        silent, slow, same = [], [], []
        for rank in range(self._world):
            if rank == self._rank:
                continue
            now, before = latest.get(rank), first.get(rank)
            if rank in words:
                silent.append(f"rank {rank} ended: {words[rank][_LAST_WORDS]}")
            elif now is None:
                silent.append(f"rank {rank} never came")
            elif before is not None and now["alive"] == before["alive"]:
                silent.append(
                    f"rank {rank} (process {now['pid']} on {now['host']}) was killed or stands still; its last word "
                    f"was of step {now['step']} ({now['doing']})"
                )
                self._known[rank].kill()
            elif now["doing"] not in COLLECTIVE:
                slow.append(f"rank {rank} on {now['host']} has been at step {now['step']} ({now['doing']}) for "
                            f"{now['for']:.0f} s")  # fmt: skip
            else:
                same.append(f"rank {rank} waits too, in step {now['step']} ({now['doing']})")
        return "; ".join((silent or slow or same)[:4]) or "nobody else is there"

    def _ask_all(self, key: str = "alive") -> dict[int, Mapping[str, Any]] | None:
        """Each other process's latest message; None where the store does not answer."""
        assert self._store is not None
        found = {}
        try:
            for rank in range(self._world):
                if rank != self._rank and self._store.check([f"{key}/{rank}"]):
                    message = json.loads(self._store.get(f"{key}/{rank}"))
                    found[rank] = message
                    self._known[rank] = Process(message["host"], message["pid"], message["started"])
        except RuntimeError:
            return None
        return found


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error of torch.distributed says that another process is gone."""
    words = ("gloo", "connection closed", "connection reset", "broken pipe", "nccl", "timed out")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def guarded(main: Callable[[], None]) -> Callable[[], None]:
    """``main``, which turns a lost process into one sentence where that happens outside a :class:`Watchdog` too."""

    def run() -> None:
        try:
            main()
        except RuntimeError as error:
            if not is_lost_connection(error):
                raise
            text = " ".join(str(error).split())[:200]
            raise RunStopped(LOST, f"error: rank {distributed.rank()} lost the other processes ({text})") from error

    return run


def _in_a_word(error: BaseException) -> str:
    if isinstance(error, (InputError, RunStopped)):
        return str(error) or "another process says why"
    return f"{type(error).__name__} {' '.join(str(error).split())[:200]}".strip()


def _end_children() -> None:
    """Loader processes do not outlive a run that ends in an error."""
    for child in multiprocessing.active_children():
        child.kill()


def _start_time(pid: int) -> str:
    """Clock ticks since boot at which a process began; empty where there is no /proc, or no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
