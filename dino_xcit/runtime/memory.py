"""Memory of this machine, and settings of the allocator."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

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
    try:
        found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) << 10 if found else 1 << 50
