"""One run per output directory: a file lock, and run.json with its owner."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from dino_xcit.errors import InputError, one_line
from dino_xcit.runtime import atomic

LOCK = ".lock"
OWNER = "run.json"
"""File with the host, process, start time and command of the run that holds the lock."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder against other runs. Call it on rank 0 only.

    The kernel releases the lock when the process ends for any reason. Forked children do not hold it.

    Raises:
        InputError: another run holds the lock, or the folder cannot be written or locked.
    """
    lock = FileLock(folder / LOCK, blocking=False, thread_local=False, fallback_to_soft=False)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock)
        except Timeout as error:
            raise InputError(
                f"{folder} is in use by another run: {_owner(folder)}; choose another --output-dir or wait until it "
                "ends"
            ) from error
        except OSError as error:
            raise InputError(
                f"cannot lock {folder / LOCK} ({one_line(error)}); choose an --output-dir on a writable file "
                "system with flock"
            ) from error
        with contextlib.suppress(OSError):  # on a full disk the lock works without run.json
            (folder / OWNER).unlink(missing_ok=True)
            atomic.write_json(
                folder / OWNER,
                {
                    "host": socket.gethostname(),
                    "process": os.getpid(),
                    "started": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
                    "command": shlex.join(sys.argv),
                },
            )
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # the folder may have been deleted
                (folder / OWNER).unlink()


def is_locked(folder: Path) -> bool:
    """Return whether a run holds the lock.

    Raises:
        OSError: no permission, or no flock.
    """
    try:
        with FileLock(folder / LOCK, blocking=False, thread_local=False, fallback_to_soft=False):
            return False
    except Timeout:
        return True


def _owner(folder: Path) -> str:
    try:
        return "process {process} on {host} since {started}".format_map(json.loads((folder / OWNER).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):  # the file is not written yet
        return f"owner unknown ({OWNER} is missing)"
