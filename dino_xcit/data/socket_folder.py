"""Where loader processes hand over their batches: one folder of sockets a run, not one each that a kill leaves behind.

PyTorch passes tensors from process to process by sockets, for which each process that sends makes a folder
``pymp-XXXXXXXX`` in the temporary folder, and removes it when it ends. Ours are ended by SIGKILL, so that they would
leave theirs. But those that begin after their parent has such a folder use that one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from multiprocessing.util import get_temp_dir
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: no such sockets there
    fcntl = None  # type: ignore[assignment]

MARK = "dino-xcit.lock"
_YOUNG = 60.0
"""Seconds in which a mark may not be locked yet."""

_held: dict[int, int] = {}
"""This process's id to the descriptor that holds its mark; a forked child makes a folder of its own only if it asks."""


def share_socket_folder() -> None:
    """Make this process's folder now, and remove those of runs that were killed. Call it before processes begin.

    A folder is a run's as long as a process of it holds the lock on the mark in it; the lock ends with them.
    """
    if fcntl is None or os.getpid() in _held:
        return
    folder = Path(get_temp_dir())
    file = os.open(folder / MARK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # a child of a process that has it already, or a file system without locks
        os.close(file)
        return
    _held[os.getpid()] = file
    for mark in Path(tempfile.gettempdir()).glob(f"pymp-*/{MARK}"):
        if mark.parent != folder and _is_left(mark):
            shutil.rmtree(mark.parent, ignore_errors=True)


def _is_left(mark: Path) -> bool:
    """Whether nobody holds a mark any more; one of another user counts as held."""
    try:
        status = mark.lstat()
        if status.st_uid != os.getuid() or time.time() - status.st_mtime < _YOUNG:
            return False
        file = os.open(mark, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(file)
    return True
