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
"""While a run owns the folder: its host, process, start time and command."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder against other runs. Only the main process of a run calls this.

    The kernel drops the lock when the process ends, however it ends. Forked children do not keep it.

    Raises:
        InputError: another run owns the folder, or the folder cannot be written to or locked.
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
        with contextlib.suppress(OSError):  # a full disk leaves the owner unnamed
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
            with contextlib.suppress(OSError):  # the folder may be gone
                (folder / OWNER).unlink()


def _owner(folder: Path) -> str:
    try:
        return "process {process} on {host} since {started}".format_map(json.loads((folder / OWNER).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):  # it has not written the file yet
        return f"owner unknown ({OWNER} is missing)"
