"""Forked processes that a test can kill at a chosen file operation."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def fork(act: Callable[[], object], log: Path) -> int:
    """Fork a process that calls ``act`` and exits, with stdout and stderr in ``log``; return its process ID."""
    child = os.fork()
    if child:
        return child
    descriptor = os.open(log, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    code: Any = 1
    try:
        act()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def end_of(child: int) -> int:
    """Wait for the process and return its exit code, or the negative number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_a_child(
    act: Callable[[], object], log: Path, folder: Path, die_at: int = 0, die_at_part: int = 0
) -> tuple[int, str]:
    """Call ``act`` in a forked process and return its exit code and output.

    A process that is not killed prints the number of operations as its last line.

    Args:
        die_at: send SIGKILL just before this operation (from 1) on a file or folder below ``folder``.
        die_at_part: send SIGKILL just before the first operation after this many complete parts of an extraction.
    """

    def watched() -> None:
        seen = _watch(str(folder), die_at, die_at_part)
        act()
        print(seen[0])

    return end_of(fork(watched, log)), log.read_text()


def run_in_a_child(
    runner: ModuleType, words: Sequence[object], log: Path, folder: Path, die_at: int = 0, die_at_part: int = 0
) -> tuple[int, str]:
    """Run a runner's command as :func:`in_a_child` does."""

    def command() -> None:
        sys.argv = [f"{runner.__name__}.py", *map(str, words)]
        runner.command()

    return in_a_child(command, log, folder, die_at, die_at_part)


def _watch(folder: str, die_at: int, die_at_part: int) -> list[int]:
    """Count the file operations below ``folder`` that Python reports to audit hooks, and kill this process at one."""
    seen, parts = [0], [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _WATCHED and any(
            isinstance(a, (str, bytes, os.PathLike)) and os.fsdecode(a).startswith(folder) for a in arguments
        ):
            seen[0] += 1
            if seen[0] == die_at or 0 < die_at_part == parts[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            target = os.fsdecode(arguments[1]) if event == "os.rename" else ""
            parts[0] += os.path.basename(os.path.dirname(target)) == ".parts" and not target.endswith(".json")

    sys.addaudithook(hook)
    return seen
