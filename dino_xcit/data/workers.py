"""Processes that read images: how they are set up, how they end, and a function of every image in several of them."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
from collections.abc import Callable, Generator
from functools import partial
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from dino_xcit.data.source import Source
from dino_xcit.errors import InputError
from dino_xcit.runtime.distributed import end_children
from dino_xcit.runtime.logging import counted
from dino_xcit.runtime.memory import keep_freed_memory

Result = TypeVar("Result")

MAX_WORKERS = 64
"""Loader processes on one machine, or sixteen a core if that is more: more are a mistake."""
IMAGES_PER_TASK = 4
"""Of :func:`each_image`: handing over a task costs some 0.2 ms, an image of a few hundred pixels some 5 ms."""
_TASKS_PER_WORKER = 3

# Registered after multiprocessing's own handler, so that it runs first.
atexit.register(end_children, only_daemons=True)


def usable_cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_workers(wanted: int, processes_here: int, name: str = "num_workers") -> int:
    """Loader processes for one rank: ``wanted``, or this machine's cores shared among its ranks, ten at most.

    ``name``: of the setting.

    Raises:
        InputError: so many are wanted that starting them would take the machine's memory and an hour.
    """
    cores = usable_cores()
    chosen = max(1, min(10, cores // max(1, processes_here)))
    if wanted < 0:
        return chosen
    most = max(max(MAX_WORKERS, 16 * cores) // max(1, processes_here), chosen)
    if wanted > most:
        raise InputError(
            f"{name} is {wanted} ({counted(processes_here, 'rank')}, {counted(cores, 'core')} here), expected at "
            f"most {most}, such as --{name.replace('_', '-')} {chosen}"
        )
    return wanted


def worker_init() -> Callable[[int], None]:
    """A DataLoader's ``worker_init_fn``. Call it before the workers start.

    Their parent is this process, or, as of Python 3.14 by default, a server that ends when this process does.
    """
    # The folder of the sockets that hand over tensors. Workers inherit it, and a killed one cannot leave its own.
    multiprocessing.util.get_temp_dir()
    return partial(_set_up_worker, os.getpid() if multiprocessing.get_start_method() == "fork" else None)


def _set_up_worker(parent: int | None, _: int) -> None:
    """Set up a process that reads images: single-threaded, ignores SIGINT and SIGTERM, exits with its parent.

    It exits with the thread that started it. Slurm and terminals signal every process of a job; a worker that died of
    the signal would end the run before it could save.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if sys.platform == "linux":
        die_with_parent = 1  # PR_SET_PDEATHSIG, of prctl(2): a parent killed by SIGKILL cannot clean up
        ctypes.CDLL(None, use_errno=True).prctl(die_with_parent, signal.SIGKILL)
        if parent is not None and os.getppid() != parent:  # it died just before that
            os._exit(1)


class _Tasks(Dataset[list[Result]]):
    """Task number to the results of its images."""

    def __init__(self, source: Source, indices: range, work: Callable[[Source, int], Result]) -> None:
        self.source, self.indices, self.work = source, indices, work

    def __len__(self) -> int:
        return -(-len(self.indices) // IMAGES_PER_TASK)

    def __getitem__(self, task: int) -> list[Result]:
        start = task * IMAGES_PER_TASK
        return [self.work(self.source, index) for index in self.indices[start : start + IMAGES_PER_TASK]]


def each_image(
    source: Source, indices: range, work: Callable[[Source, int], Result], workers: int
) -> Generator[Result, None, None]:
    """``work(source, index)`` for each index, in order.

    At most 12 results a process exist at a time. Close the iterator where it is not taken to its end.

    Args:
        source: where the images are.
        indices: which images.
        work: a function of a module, or a ``functools.partial`` of one; its results must be picklable.
        workers: processes; 0 or 1: this one; -1: as many as there are cores.

    Raises:
        InputError: a process was killed, or too many are wanted.
    """
    workers = usable_cores() if workers < 0 else choose_workers(workers, 1, "workers")
    if workers <= 1 or len(indices) <= IMAGES_PER_TASK:
        yield from (work(source, index) for index in indices)
        return
    tasks = _Tasks(source, indices, work)
    loader: DataLoader[list[Result]] = DataLoader(
        tasks,
        batch_size=None,
        num_workers=min(workers, len(tasks)),
        prefetch_factor=_TASKS_PER_WORKER,
        worker_init_fn=worker_init(),
    )
    done = 0
    try:
        for results in loader:
            done += len(results)
            yield from results
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            f"a process was killed while it read {source.name(indices[done])} or an image soon after it, as the system "
            "does where memory runs out: run the same command with fewer --workers"
        ) from error
