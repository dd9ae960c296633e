"""run_linear.py as one of two ranks (``python linear_process.py OUT``, flags in ``OUT.json``), or forked and killed."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ranks import environments

import run_linear


class Death(NamedTuple):
    """SIGKILL to a process as it calls a function for the ``call``-th time (from 1)."""

    owner: Any
    name: str
    call: int


def forked(words: Sequence[str], log: Path, death: Death | None = None, ranks: int = 1) -> list[int]:
    """Fork the ranks of a run, of which the first dies if there is a ``death``; the others are then killed, as torchrun
    does it. Their exit codes, minus the signal that ended them; what they printed is in ``log``."""
    children = []
    for rank, told in enumerate(environments(ranks)):
        child = os.fork()
        if child == 0:
            os.environ.update(told)
            _run(words, log.with_suffix(f".{rank}"), death if rank == 0 else None)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1])]
    for child in children[1:]:
        if codes[0]:
            os.kill(child, signal.SIGKILL)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return codes


def _run(words: Sequence[str], log: Path, death: Death | None) -> None:
    """In the forked process: the command, and no way back."""
    descriptor = os.open(log, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    if death:
        setattr(death.owner, death.name, _deadly(getattr(death.owner, death.name), death.call))
    code: Any = 1
    try:
        sys.argv = ["run_linear.py", *words]
        run_linear.command()
        code = 0
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _deadly(function: Any, call: int) -> Any:
    left = [call]

    @functools.wraps(function)
    def dies(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    return dies


if __name__ == "__main__":
    sys.argv = ["run_linear.py", *json.loads(Path(f"{sys.argv[1]}.json").read_text())]
    run_linear.command()
