"""Watchdog that ends a process whose main thread stays in one phase for too long, and reports the phase."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from torch.distributed.distributed_c10d import Store

from dino_xcit.errors import LOST
from dino_xcit.runtime import distributed

TICK = 1.0
"""Seconds between checks of the main thread."""
STORE_TIMEOUT = 3.0
"""Seconds to wait for the other ranks' phases."""

RESUMES = "run the same command to resume"

_current: tuple[str, int, bool] = ("starting", 0, False)
"""Phase name, step, and whether the phase has a time limit."""


def phase(name: str, step: int | None = None, *, limit: bool = True) -> None:
    """Enter a phase.

    Args:
        step: None: the current step.
        limit: whether the phase is subject to the timeout.
    """
    global _current
    _current = (name, _current[1] if step is None else step, limit)


def progress() -> None:
    """Reset the timer of the current phase."""
    global _current
    _current = (*_current,)  # a new tuple: the thread compares identities


@contextlib.contextmanager
def watched(timeout: float) -> Iterator[None]:
    """End the process with code :data:`dino_xcit.errors.LOST` if a phase takes longer than ``timeout`` seconds.

    Prints the tracebacks of all threads, this rank's phase and step, and the other ranks' phases from the
    torch.distributed store.

    Raises:
        RunStopped: a loader worker died, or the connection to another rank broke.
    """
    phase("starting", 0, limit=False)
    over, store = threading.Event(), distributed.store()
    # Use a separate connection: a hanging operation blocks its connection.
    arguments = (timeout, over, os.getppid(), None if store is None else store.clone())
    thread = threading.Thread(target=_watch, args=arguments, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    except Exception as error:
        distributed.raise_if_lost(error, f", step {_current[1]} ({_current[0]})", RESUMES)
        raise
    finally:
        over.set()
        distributed.end_children()
        thread.join(timeout=10)  # a store operation during interpreter shutdown would crash the process


def _watch(timeout: float, over: threading.Event, parent: int, store: Store | None) -> None:
    rank, seen, ticks = distributed.rank(), _current, 0
    while not over.wait(TICK):
        # Count ticks, not wall time, so that suspending the machine does not count.
        seen, ticks = _current, ticks + 1 if _current is seen else 0
        where = f"step {seen[1]} ({seen[0]})"
        if store is not None:
            with contextlib.suppress(RuntimeError):  # the host of the store died
                report = f"rank {rank} at {time.strftime('%X')}: {where}, {ticks * TICK:.0f} s"
                store.set(f"phase/{rank}", f"{time.time():.0f} {report}")
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != parent:
            # torchrun died and can no longer forward signals: act as on SIGTERM.
            parent = os.getppid()
            os.kill(os.getpid(), signal.SIGTERM)
        if seen[2] and ticks * TICK > timeout:
            others = _other_phases(store, rank)
            if _current is not seen or over.is_set():
                continue
            try:
                with contextlib.suppress(Exception):  # stderr may not be a file
                    faulthandler.dump_traceback(all_threads=True)
                found = f"error: rank {rank}, {where}: no progress within --hang-timeout {timeout:g} s{others}"
                print(f"{found}; {RESUMES}", file=sys.stderr, flush=True)
                distributed.end_children()
            finally:
                os._exit(LOST)


def _other_phases(store: Store | None, rank: int) -> str:
    """Return the phases of the eight ranks with the oldest reports."""
    if store is None:
        return ""
    found: list[str] = []

    def read() -> None:
        with contextlib.suppress(RuntimeError):
            keys = [f"phase/{other}" for other in range(distributed.world_size()) if other != rank]
            found.extend(store.get(key).decode() for key in keys if store.check([key]))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(STORE_TIMEOUT)  # a store in a stopped process ignores its own timeout
    oldest = ", ".join(report.partition(" ")[2] for report in sorted(found)[:8])
    return f"; last phases of the other ranks: {oldest}" if found else "; the store does not respond"
