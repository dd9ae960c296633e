"""Workers, the processes that read images: setup, shutdown, and a parallel map over images."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import multiprocessing.util
import os
import shutil
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from dino_xcit.data.source import Source
from dino_xcit.errors import MORE_SHARED_MEMORY, SHARED_MEMORY, InputError
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.distributed import end_children, processes_here
from dino_xcit.runtime.logging import counted
from dino_xcit.runtime.memory import keep_freed_memory

Result = TypeVar("Result")

MAX_WORKERS = 64
"""Maximum number of workers on one machine, or 16 per core if that is more."""
IMAGES_PER_TASK = 4
"""Images per task of :func:`each_image`. A task costs about 0.2 ms, an image of a few hundred pixels about 5 ms."""
_TASKS_PER_WORKER = 3
PREFETCHED = 2
"""Batches that each worker prepares ahead: the default of ``DataLoader``."""

# Registered after multiprocessing's own handler, so that it runs first.
atexit.register(end_children, only_daemons=True)


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_workers(wanted: int, ranks: int, name: str = "num_workers", on_gpu: bool = False) -> int:
    """Return the number of workers of one rank.

    Args:
        wanted: Requested number; negative: the cores of this machine divided by its ranks, 1 to 10, on a GPU up to 20.
        ranks: Number of ranks on this machine.
        name: Name of the setting, for errors.
        on_gpu: Whether the rank computes on a GPU and leaves its cores, but two, to the workers.

    Raises:
        InputError: More than :data:`MAX_WORKERS` are requested.
    """
    cores = usable_cores()
    share = cores // max(1, ranks)
    chosen = max(1, min(10, share), min(20, share - 2) if on_gpu else 0)
    if wanted < 0:
        return chosen
    most = max(max(MAX_WORKERS, 16 * cores) // max(1, ranks), chosen)
    if wanted > most:
        raise InputError(
            f"{name} is {wanted} ({counted(ranks, 'rank')}, {counted(cores, 'core')} here), expected at "
            f"most {most}, such as --{name.replace('_', '-')} {chosen}"
        )
    return wanted


def fit_shared_memory(workers: int, batch: int, sides: Sequence[int]) -> int:
    """Return how many of a rank's workers fit into shared memory with the batches that they prefetch.

    A worker that writes beyond it is killed by a bus error. Containers have 64 MB by default.

    Args:
        workers: Number of workers.
        batch: Number of images per batch.
        sides: Sides of the RGB views of each image.
    """
    each = PREFETCHED * batch * sum(3 * side**2 for side in sides)
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free // processes_here()
    except OSError:  # /dev/shm exists on Linux only
        return workers
    fitting = min(workers, free // max(1, each))
    if fitting < workers:
        log.warn_once(
            f"{SHARED_MEMORY} has {free / 1e6:.0f} MB free per rank, and {counted(workers, 'loader worker')} need "
            f"{workers * each / 1e6:.0f} MB: using {fitting}; {MORE_SHARED_MEMORY} for more"
        )
    return fitting


def worker_init() -> Callable[[int], None]:
    """Return a ``worker_init_fn`` for a DataLoader. Call this before the workers start.

    The parent of the workers is this process, or (the default as of Python 3.14) a server that ends with this process.
    """
    # Creates the folder of the sockets that transfer tensors. Workers inherit it, so killed ones leave none behind.
    multiprocessing.util.get_temp_dir()
    return partial(_set_up_worker, os.getpid() if multiprocessing.get_start_method() == "fork" else None)


def _set_up_worker(parent: int | None, _: int) -> None:
    """Set up a worker: single-threaded, ignores SIGINT, SIGTERM and SIGUSR1, exits with the thread that started it.

    Slurm and terminals signal all processes of a job. A worker that dies of the signal would end the run before it can
    save.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if sys.platform == "linux":
        die_with_parent = 1  # PR_SET_PDEATHSIG of prctl(2), as a parent killed by SIGKILL cannot clean up
        ctypes.CDLL(None, use_errno=True).prctl(die_with_parent, signal.SIGKILL)
        if parent is not None and os.getppid() != parent:  # the parent died before the call
            os._exit(1)


class _Tasks(Dataset[list[Result]]):
    """Map a task number to the results of its images."""

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
    """Yield ``work(source, index)`` for each index, in order.

    At most 12 results per worker are buffered. Close the generator if it is not exhausted.

    Args:
        source: Source of the images.
        indices: Indices of the images.
        work: Function of a module, or a ``functools.partial`` of one. Its results must be picklable.
        workers: Number of processes. 0 or 1: the calling process only; -1: one per core.

    Raises:
        InputError: A worker was killed, or ``workers`` is too large.
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
            f"a worker was killed near {source.name(indices[done])}, probably because the machine ran out of memory: "
            "run the same command with fewer --workers"
        ) from error
