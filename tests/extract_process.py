"""run_extract.py as a process that a test can kill, or as one of two ranks (``python extract_process.py OUT``)."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import run_extract

_WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def in_a_child(
    words: Sequence[object], log: Path, folder: Path, die_at: int = 0, die_after: str = ""
) -> tuple[int, str]:
    """Fork a process that runs the command; its exit code (minus the signal that ended it) and what it printed.

    Args:
        die_at: SIGKILL just before the operation of that number (from 1) on a file or folder below ``folder``.
        die_after: SIGKILL just before the next operation when a file has got this name.
            With neither it lives, and prints the count of operations last.
    """
    child = os.fork()
    if child == 0:
        descriptor = os.open(log, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        code: Any = 1
        try:
            seen = _watch(str(folder), die_at, die_after)
            sys.argv = ["run_extract.py", *map(str, words)]
            run_extract.command()
            print(seen[0])
            code = 0
        except SystemExit as end:
            code = end.code
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), log.read_text()


def _watch(folder: str, die_at: int, die_after: str) -> list[int]:
    """Count the operations on files below ``folder`` that Python reports to audit hooks."""
    seen, named = [0], [False]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _WATCHED and any(
            isinstance(a, (str, bytes, os.PathLike)) and os.fsdecode(a).startswith(folder) for a in arguments
        ):
            seen[0] += 1
            if seen[0] == die_at or named[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            named[0] = event == "os.rename" and bool(die_after) and str(arguments[1]).endswith(die_after)

    sys.addaudithook(hook)
    return seen


if __name__ == "__main__":
    out = Path(sys.argv[1])
    sys.argv = ["run_extract.py", *json.loads((out / "words.json").read_text())]
    run_extract.command()
