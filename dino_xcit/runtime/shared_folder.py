"""Does every process of a run see the output directory? On several machines it may be each one's own disk."""

from __future__ import annotations

import contextlib
import os
import socket
import time
import uuid
from pathlib import Path

from dino_xcit.runtime import distributed

PATIENCE = 5.0
"""Seconds in which a network file system shows to all what one has written."""


def who_does_not_see(folder: Path) -> list[str]:
    """Processes that do not find, in the folder they were told, a file that the main process writes into its own.

    All processes call it. Nothing is left behind.

    Returns:
        On every process the same: ``process 8 on node2`` each; empty where all see it, or there is one process only.

    Raises:
        OSError: (on the main process) the file cannot be written.
    """
    if distributed.world_size() == 1:
        return []
    token = distributed.main_decides(f".seen-{uuid.uuid4().hex}.tmp")  # atomic.remove_leftovers knows such names
    if distributed.is_main():
        (folder / token).touch()
    distributed.barrier()
    try:
        return blind(folder / token, PATIENCE)
    finally:
        if distributed.is_main():
            with contextlib.suppress(OSError):
                (folder / token).unlink()


def blind(path: Path, patience: float = 0.0) -> list[str]:
    """Processes for which there is no such file. All call it; the answer is the same on every one.

    ``patience``: seconds in which it may yet appear.
    """
    until = time.monotonic() + patience
    while not (seen := path.is_file()) and time.monotonic() < until:
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # so that a network file system asks its server
        time.sleep(0.1)
    own = "" if seen else f"process {distributed.rank()} on {socket.gethostname()}"
    return [name for name in distributed.gather_objects(own) if name]


def some(processes: list[str]) -> str:
    """The first of them, and how many more."""
    more = len(processes) - 1
    return processes[0] + (f" and {more:,} more" if more else "")
