"""A runner's console entry, called in the tests' own process or in forks of it: nothing is imported anew."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from dying_child import end_of, fork
from ranks import environments


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    def assert_refused(self, *words: str) -> None:
        """Exit code 2, and one sentence with these words as the last line of stderr."""
        assert "Traceback" not in self.err
        last = self.err.strip().splitlines()[-1]
        assert last.startswith("error: "), self.err
        for word in words:
            assert word in last
        assert self.code == 2


Here = Callable[..., Outcome]
"""``here(run_extract, "--query", image)``: the runner's module, then the words of its command line, of any type."""
Command = Callable[..., Outcome]
"""The same of one runner, without its module."""


def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """What the fixture ``here`` gives to a test."""

    def run(runner: ModuleType, *words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", [f"{runner.__name__}.py", *map(str, words)])
        capsys.readouterr()
        code: object = 0
        try:
            runner.command()
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return Outcome(int(str(code or 0)), captured.out, captured.err)

    return run


def measured(command: Command, file: Path, *words: object) -> tuple[str, dict[str, Any]]:
    """What a command prints and the result file that it writes, if it ends well."""
    done = command(*words, "--json", file)
    assert done.code == 0, done.out + done.err
    return done.out, json.loads(file.read_text())


def forked(
    runner: ModuleType, out: Path, *words: object, ranks: int = 1, before: Callable[[], None] | None = None
) -> list[int]:
    """Fork the ranks of a command. What each prints is in ``out/said-RANK``, and its errors in ``out/log-RANK``.

    Args:
        before: what the first rank does beforehand. If it ends in failure the others are killed, as torchrun does it.

    Returns:
        The ranks' exit codes, minus the signals that ended them.
    """

    def run(rank: int, told: dict[str, str]) -> None:
        os.environ.update(told)
        sys.argv = [f"{runner.__name__}.py", *map(str, words)]
        if before and rank == 0:
            before()
        with open(out / f"said-{rank}", "w") as file, contextlib.redirect_stdout(file):
            runner.command()

    children = [
        fork(functools.partial(run, rank, told), out / f"log-{rank}") for rank, told in enumerate(environments(ranks))
    ]
    codes = [end_of(children[0])]
    for child in children[1:]:
        if codes[0]:
            os.kill(child, signal.SIGKILL)
        codes.append(end_of(child))
    return codes


def on_two_ranks(runner: ModuleType, out: Path, *words: object) -> list[str]:
    """What each of two ranks prints that run a command together and end well."""
    assert forked(runner, out, *words, ranks=2) == [0, 0], [(out / f"log-{rank}").read_text() for rank in range(2)]
    return [(out / f"said-{rank}").read_text() for rank in range(2)]
