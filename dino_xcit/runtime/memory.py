"""Memory of this machine, and settings of the allocator."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from pathlib import Path

import torch

from dino_xcit.runtime import distributed

SPARE = 0.1
"""Share of the memory that a batch leaves free."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed_memory() -> None:
    """Keep up to 256 MB of freed memory in the process, for blocks of up to 32 MB. No effect without glibc.

    By default glibc returns each block above about 100 KB to the system when it is freed. For decoded images and
    batches, the page faults of allocating them again cost as much time as computing them.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 256 << 20)


def available_memory() -> int:
    """Return the bytes that new allocations can use without swapping, ``MemAvailable`` of Linux; 1 PB elsewhere."""
    return _bytes_in("/proc/meminfo", "MemAvailable") or 1 << 50


def total_memory(device: torch.device) -> int:
    """Return the bytes that a training process can use: those of its GPU, or its share of this machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return (available_memory() + peak_memory(device)) // distributed.processes_here()


def peak_memory(device: torch.device) -> int:
    """Return the bytes of the peak so far: of tensors on a GPU, else resident memory of this process (0: unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _bytes_in("/proc/self/status", "VmHWM")


def reset_peak_memory(device: torch.device) -> None:
    """Start :func:`peak_memory` anew from the memory in use; on a CPU only on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # memory that the allocator keeps would hide a part of the peak
        Path("/proc/self/clear_refs").write_text("5")


def _bytes_in(file: str, field: str) -> int:
    try:
        found = re.search(rf"{field}:\s+(\d+) kB", Path(file).read_text())
    except OSError:  # not Linux
        found = None
    return int(found[1]) << 10 if found else 0
