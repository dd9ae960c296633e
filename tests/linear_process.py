"""run_linear.py, forked and killed."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dying_child import end_of, fork
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

    def run(told: dict[str, str], death: Death | None) -> None:
        os.environ.update(told)
        if death:
            setattr(death.owner, death.name, _deadly(getattr(death.owner, death.name), death.call))
        sys.argv = ["run_linear.py", *words]
        run_linear.command()

    children = [
        fork(functools.partial(run, told, None if rank else death), log.with_suffix(f".{rank}"))
        for rank, told in enumerate(environments(ranks))
    ]
    codes = [end_of(children[0])]
    for child in children[1:]:
        if codes[0]:
            os.kill(child, signal.SIGKILL)
        codes.append(end_of(child))
    return codes


def _deadly(function: Any, call: int) -> Any:
    left = [call]

    @functools.wraps(function)
    def dies(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    return dies
