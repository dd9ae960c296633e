"""The watchdog ends a process whose main thread stays in one phase for too long, and reports the phase."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

import torch.distributed as dist

from dino_xcit.errors import LOST, RunStopped, one_line
from dino_xcit.runtime import distributed

TICK = 1.0
"""Seconds between two looks at the main thread."""
STORE_TIMEOUT = 3.0
"""Seconds that the other ranks' phases may take to arrive."""
_RESUMES = "the same command resumes from the last checkpoint"


class Watchdog:
    """A context that ends the process with code :data:`dino_xcit.errors.LOST` when a phase exceeds its time limit.

        with Watchdog(timeout) as watchdog:
            watchdog.phase("indexing", 0, limit=False)
            watchdog.phase("training step", 17)

    Before it ends the process it prints all threads' tracebacks, this rank's phase and step, and the phases that the
    other ranks wrote to the torch.distributed store.

    Raises:
        RunStopped: (from the context) a loader process died, or the connection to another rank broke.
    """

    def __init__(self, timeout: float) -> None:
        """``timeout``: seconds that a phase may take."""
        self._timeout = timeout
        self._rank, self._world = distributed.rank(), distributed.world_size()
        store = distributed.store()
        # A separate connection: an operation that hangs blocks its connection.
        self._store = store.clone() if store is not None else None
        self._over = threading.Event()
        self._parent = os.getppid()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._current = ("starting", 0, False)

    def phase(self, name: str, step: int | None = None, *, limit: bool = True) -> None:
        """The main thread enters a phase, in the same step if none is given. Without ``limit`` it may take any time."""
        self._current = (name, self._current[1] if step is None else step, limit)

    def progress(self) -> None:
        """Reset the timer of the current phase."""
        name, step, limit = self._current
        self._current = (name, step, limit)  # a new tuple: the thread compares identities

    def __enter__(self) -> Watchdog:
        global _active
        _active = self
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _active
        _active = None
        self._over.set()
        distributed.end_children()
        self._thread.join(timeout=10)  # a thread inside the store while Python shuts down would crash the process
        name, step, _ = self._current
        where = f"error: rank {self._rank}, step {step} ({name})"
        if error and is_lost_worker(error):
            why = f"{one_line(error) or type(error).__name__}; if it ran out of memory, lower --num-workers"
            raise RunStopped(LOST, f"{where}: lost a loader process ({why}); {_RESUMES}") from error
        if error and self._world > 1 and is_lost_connection(error):
            raise RunStopped(LOST, f"{where}: lost another rank ({one_line(error)}); {_RESUMES}") from error

    def _watch(self) -> None:
        # Count ticks, not wall time, so that suspending the machine does not count.
        watched, ticks = self._current, 0
        while not self._over.wait(TICK):
            watched, ticks = self._current, (ticks + 1 if self._current is watched else 0)
            self._tell(ticks * TICK)
            if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self._parent:
                # torchrun died and can no longer forward signals: treat it as SIGTERM.
                self._parent = os.getppid()
                os.kill(os.getpid(), signal.SIGTERM)
            if watched[2] and ticks * TICK > self._timeout:
                others = self._others()
                if self._current is watched and not self._over.is_set():
                    self._give_up(others)

    def _give_up(self, others: str) -> None:
        name, step, _ = self._current
        try:
            faulthandler.dump_traceback(all_threads=True)
            print(
                f"error: rank {self._rank}, step {step} ({name}): no progress within --hang-timeout "
                f"{self._timeout:g} s{others}; {_RESUMES}",
                file=sys.stderr,
                flush=True,
            )
            distributed.end_children()
        finally:
            os._exit(LOST)

    def _tell(self, age: float) -> None:
        """Write this rank's phase to the store. ``set`` does not wait for an answer."""
        if self._store is not None:
            name, step, _ = self._current
            message = f"{time.time():.0f} rank {self._rank} at {time.strftime('%X')}: step {step} ({name}, {age:.0f} s)"
            with contextlib.suppress(RuntimeError):  # the store's host is gone
                self._store.set(f"phase/{self._rank}", message)

    def _others(self) -> str:
        """The last phases of the other ranks, the oldest report first."""
        store, found = self._store, list[str]()
        if store is None:
            return ""

        def read() -> None:
            with contextlib.suppress(RuntimeError):
                keys = [f"phase/{rank}" for rank in range(self._world) if rank != self._rank]
                found.extend(store.get(key).decode() for key in keys if store.check([key]))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        reader.join(STORE_TIMEOUT)  # a store on a stopped process never answers, whatever its own timeout is
        messages = [message.partition(" ")[2] for message in sorted(found)[:8]]
        return f"; last phases of the other ranks: {', '.join(messages)}" if messages else "; the store does not answer"


_active: Watchdog | None = None


def phase(name: str, step: int | None = None, *, limit: bool = True) -> None:
    """:meth:`Watchdog.phase` of the active watchdog; no-op without one."""
    if _active:
        _active.phase(name, step, limit=limit)


def progress() -> None:
    """:meth:`Watchdog.progress`, likewise."""
    if _active:
        _active.progress()


def is_lost_worker(error: BaseException) -> bool:
    """Whether a loader process died. EOFError and ConnectionError: it died while it sent a batch."""
    named = isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
    return named or isinstance(error, EOFError | ConnectionError)


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error of torch.distributed says that another rank is gone."""
    words = ("gloo", "nccl error", "connection closed by peer", "connection reset by peer", "broken pipe")
    return "WORLD_SIZE" in os.environ and (
        isinstance(error, dist.DistError)
        or (isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words))
    )


def guarded(main: Callable[[], None]) -> Callable[[], None]:
    """``main``, with a lost connection turned into RunStopped outside a :class:`Watchdog` too."""

    def run() -> None:
        try:
            main()
        except RuntimeError as error:
            if not is_lost_connection(error):
                raise
            sentence = f"error: rank {distributed.rank()} lost another rank ({one_line(error)}); {_RESUMES}"
            raise RunStopped(LOST, sentence) from error

    return run
