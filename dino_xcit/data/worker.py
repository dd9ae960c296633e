"""Processes that read images: how they are set up, and how they end."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from functools import partial

import torch

from dino_xcit.data.socket_folder import share_socket_folder
from dino_xcit.runtime.distributed import end_children
from dino_xcit.runtime.memory import keep_freed_memory

# Registered after multiprocessing's own handler, so that it runs first.
atexit.register(end_children, only_daemons=True)


def usable_cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_init() -> Callable[[int], None]:
    """A DataLoader's ``worker_init_fn``. Call it before the workers start.

    Their parent is this process, or, as of Python 3.14 by default, a server that ends when this process does.
    """
    share_socket_folder()
    return partial(set_up_worker, os.getpid() if multiprocessing.get_start_method() == "fork" else None)


def set_up_worker(parent: int | None, _: int) -> None:
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
