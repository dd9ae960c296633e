"""A run that stands still ends, and says which process it waited for."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

import torch.distributed as dist

from dino_xcit.errors import LOST, InputError, RunStopped
from dino_xcit.runtime import distributed
from dino_xcit.runtime.heartbeats import BEAT, SILENT, Heartbeats, Process, Sign

WAITING = ("training step", "agreeing with the others", "leaving")
"""What a process may be doing while it merely waits for others."""


class Watchdog:
    """Watches this process's main thread; a context in which a lost process becomes one sentence.

        with Watchdog(timeout) as watchdog:
            watchdog.now("training step", 17)

    If nothing new is heard from the main thread for ``timeout`` seconds, the process finds out who of the others has
    fallen silent, says so, and ends with :data:`dino_xcit.errors.LOST`, together with silent processes on its machine.

    Raises:
        RunStopped: (from the context) a loader process was killed, or another process of the run was lost.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._rank, self._world = distributed.rank(), distributed.world_size()
        store = distributed.store()
        self._hearts = Heartbeats(store, self._rank, self._world) if store is not None else None
        self._over = threading.Event()
        self._parent = os.getppid()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.now("starting", 0)

    def now(self, doing: str, step: int, *, patient: bool = False) -> None:
        """The main thread is at something new; ``patient``: it may take as long as it likes, and shows its progress."""
        self._doing, self._step, self._since, self._patient = doing, step, time.monotonic(), patient
        self._tell()

    def __enter__(self) -> Watchdog:
        self._tell()
        if self._hearts:
            self._hearts.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        distributed.end_children()
        if error is None:
            if self._hearts:
                self._hearts.stop()
            return
        sentence = None
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            sentence = (
                f"rank {self._rank} lost a loader process ({' '.join(str(error).split())[:160]}): perhaps the machine "
                "ran out of memory (fewer --num-workers need less); the same command carries on from the last "
                "checkpoint"
            )
        elif self._world > 1 and is_lost_connection(error):
            sentence = f"rank {self._rank}, in step {self._step} ({self._doing}), lost the others: {self._blame()[0]}"
        if self._hearts:
            self._tell(sentence or _in_a_word(error))
            self._hearts.tell_now()
        if sentence:
            raise RunStopped(LOST, f"error: {sentence}") from error

    def _tell(self, last_words: str = "") -> None:
        if self._hearts:
            self._hearts.tell(self._doing, self._step, time.monotonic() - self._since, last_words)

    def _watch(self) -> None:
        # Counted in beats, not by the clock: a job that was suspended as a whole has not stood still meanwhile.
        since, beats = self._since, 0
        while not self._over.wait(BEAT):
            self._tell()
            if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self._parent:
                # torchrun was killed, and the machine is perhaps given to somebody else: as if it had asked to stop.
                self._parent = os.getppid()
                os.kill(os.getpid(), signal.SIGTERM)
            since, beats = self._since, (beats + 1 if since == self._since else 0)
            if beats * BEAT > self._timeout and not self._patient:
                self._give_up(since)

    def _give_up(self, since: float) -> None:
        doing, step = self._doing, self._step
        found, silent = self._blame()
        if since != self._since or self._over.is_set():
            return  # it moved while we listened
        sentence = f"rank {self._rank} has stood still for {time.monotonic() - since:.0f} s in step {step} ({doing})"
        sentence += f"; {found}" if found else ""
        try:
            print(f"error: {sentence} (--hang-timeout is {self._timeout:g} s)", file=sys.stderr, flush=True)
            for process in silent:
                process.kill()
            if self._hearts:
                self._tell(sentence)
                self._hearts.tell_now()
            distributed.end_children()
        finally:
            os._exit(LOST)

    def _blame(self) -> tuple[str, list[Process]]:
        """What the other processes do, those who keep silent first; and who these are, as far as that is known."""
        if not self._hearts:
            return "", []
        signs = self._hearts.listen(SILENT + BEAT)
        if self._hearts.store_is_silent:
            holder, process = "rank 0", self._hearts.of_rank_0
            if "TORCHELASTIC_RUN_ID" in os.environ:
                holder, process = "the torchrun of rank 0", None
            elif process:
                holder += f" ({process})"
            found = f"{holder} was killed or stands still: the store through which all talk does not answer"
            return found, [process] if process else []
        silent, slow, waiting = [], [], []
        processes = []
        for rank in range(self._world):
            if rank == self._rank:
                continue
            sign = signs.get(rank)
            if sign is None:
                silent.append(f"rank {rank} never came")
            elif sign.last_words:
                silent.append(f"rank {rank} ended: {sign.last_words}")
            elif time.monotonic() - sign.heard > SILENT:
                silent.append(f"rank {rank} ({sign.process}) was killed or stands still; {_last_seen(sign)}")
                processes.append(sign.process)
            elif sign.doing not in WAITING:
                slow.append(f"rank {rank} ({sign.process}) lives; {_last_seen(sign)}")
            else:
                waiting.append(f"rank {rank} waits too, in step {sign.step} ({sign.doing})")
        return "; ".join((silent or slow or waiting)[:4]), processes


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error of torch.distributed says that another process is gone."""
    words = ("gloo", "nccl error", "connection closed by peer", "connection reset by peer", "broken pipe")
    return "WORLD_SIZE" in os.environ and (
        isinstance(error, dist.DistError)
        or (isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words))
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


def _last_seen(sign: Sign) -> str:
    return f"it was in step {sign.step} ({sign.doing}), for {sign.since:.0f} s, when it last said so"


def _in_a_word(error: BaseException) -> str:
    if isinstance(error, (InputError, RunStopped)):
        return str(error) or "another process says why"
    return f"{type(error).__name__} {' '.join(str(error).split())[:200]}".strip()
