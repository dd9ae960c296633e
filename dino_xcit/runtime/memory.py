"""Memory that a program frees and takes again a moment later."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed_memory() -> None:
    """Let this process keep what it frees, up to 256 MB, for its next blocks of up to 32 MB.

    By default glibc gives each block of more than some 100 KB back to the system and asks for it anew, and the system
    hands it out page by page, filled with zeros: for decoded images and batches that costs as much as computing them.
    Elsewhere than on glibc: nothing.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 256 << 20)
