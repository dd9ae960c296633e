"""Processes that end with the one that started them, however it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def process_group() -> Iterator[int]:
    """A process group, killed as a whole at the end of the block: what ``Popen(process_group=...)`` takes.

    If this process is killed before that, by SIGKILL too, a shell in the group kills it: the pipe that it reads ends.
    """
    watcher = subprocess.Popen(["sh", "-c", "read -r _; kill -KILL 0"], stdin=subprocess.PIPE, process_group=0)
    with watcher:
        try:
            yield watcher.pid
        finally:
            os.killpg(watcher.pid, signal.SIGKILL)


def clean_up_on_sigterm() -> None:
    """Let SIGTERM end this process as an exception does: temporary files go, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
