"""Signs of life: each process of a run tells the others, every second, what it is doing, and can ask for theirs.

Through torch.distributed's key-value store, over a connection and from a thread of its own: a store whose host stands
still does not answer, and whoever talks to it waits with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed.distributed_c10d import Store

BEAT = 1.0
"""Seconds between two signs of life."""
SILENT = 3 * BEAT
"""Seconds without one after which a process counts as silent."""


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

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def kill(self) -> None:
        """End it, if it is on this machine: one that was stopped (SIGSTOP) would not hear anything gentler."""
        if self.host == socket.gethostname() and self.pid != os.getpid() and _start_time(self.pid) == self.started:
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Sign:
    """What a process said last."""

    process: Process
    beat: int
    """Counts its signs."""
    doing: str
    step: int
    since: float
    """Seconds it had been at that."""
    last_words: str
    """Why it ended; empty while it lives."""
    heard: float
    """When this process first had that sign, on its own monotonic clock."""


class Heartbeats:
    """Tells, and on request hears, until the process ends."""

    def __init__(self, store: Store, rank: int, world: int) -> None:
        self._store = store.clone()
        self._store.set_timeout(timedelta(seconds=5))
        self._rank, self._world = rank, world
        self._process = Process.this()
        self._own: dict[str, Any] = {}
        self._told: dict[str, Any] = {}
        self._beat = 0
        self._signs: dict[int, Sign] = {}
        self._answered = time.monotonic()
        self._curious, self._over = False, False
        self._wake, self._round = threading.Event(), threading.Condition()
        self._thread = threading.Thread(target=self._talk, name="heartbeats", daemon=True)

    def start(self) -> None:
        """Give the first sign of life, and further ones from now on."""
        self._thread.start()

    def stop(self) -> None:
        """No further signs. A thread that is within the store while Python ends would end it with a signal."""
        self._over = True
        self._wake.set()
        self._thread.join(timeout=10)

    def tell(self, doing: str, step: int, since: float, last_words: str = "") -> None:
        """What the next sign says."""
        self._own = {"doing": doing, "step": step, "since": since, "last_words": last_words}

    def tell_now(self, patience: float = 2.0) -> None:
        """Give a sign at once, and wait for the store to have it; not longer than that many seconds."""
        own = self._own
        with self._round:
            self._wake.set()
            self._round.wait_for(lambda: self._told is own, patience)

    def listen(self, seconds: float) -> dict[int, Sign]:
        """What the others say, after having listened for so long."""
        self._curious = True
        self._wake.set()
        time.sleep(seconds)
        self._curious = False
        return dict(self._signs)

    @property
    def store_is_silent(self) -> bool:
        """Whether the store does not answer."""
        return time.monotonic() - self._answered > SILENT

    @property
    def of_rank_0(self) -> Process | None:
        """Who holds the store, where torchrun does not."""
        return self._signs[0].process if 0 in self._signs else None

    def _talk(self) -> None:
        while not self._over:
            self._beat += 1
            own = self._own
            try:
                message = {"beat": self._beat, **own, **asdict(self._process)}
                self._store.set(f"sign/{self._rank}", json.dumps(message))
                self._told, self._answered = own, time.monotonic()
                # Everybody asks rank 0, once; everybody asks everybody only where something is wrong.
                wanted = range(self._world) if self._curious else range(0 if 0 in self._signs else 1)
                for rank in wanted:
                    if rank != self._rank:
                        self._hear(rank)
                        self._answered = time.monotonic()
            except RuntimeError:  # the store's host is gone: nobody is there to talk to
                return
            with self._round:
                self._round.notify_all()
            self._wake.wait(BEAT / 2 if self._curious else BEAT)
            self._wake.clear()

    def _hear(self, rank: int) -> None:
        if not self._store.check([f"sign/{rank}"]):
            return
        message: Mapping[str, Any] = json.loads(self._store.get(f"sign/{rank}"))
        before = self._signs.get(rank)
        if before is None or before.beat != message["beat"]:
            process = Process(message["host"], message["pid"], message["started"])
            self._signs[rank] = Sign(
                process, message["beat"], message["doing"], message["step"], message["since"], message["last_words"],
                time.monotonic(),
            )  # fmt: skip


def _start_time(pid: int) -> str:
    """Clock ticks since boot at which a process began; empty where there is no /proc, or no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
