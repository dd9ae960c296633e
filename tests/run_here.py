"""Run the console entry of a runner in the process of the tests or in forks of it, without new imports."""

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
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    def assert_refused(self, *words: str) -> None:
        """Check that the exit code is 2 and that the last line of stderr is an error with these words."""
        assert "Traceback" not in self.err
        last = self.err.strip().splitlines()[-1]
        assert last.startswith("error: "), self.err
        for word in words:
            assert word in last
        assert self.code == 2


Here = Callable[..., Outcome]
"""``here(run_extract, "--query", image)``: the runner's module, then its arguments, of any type."""
Command = Callable[..., Outcome]
"""Like :data:`Here`, for a fixed runner."""


def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """Return the function that the fixture ``here`` provides."""

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
    """Run a command that must succeed; return its stdout and the content of its result file."""
    done = command(*words, "--json", file)
    assert done.code == 0, done.out + done.err
    return done.out, json.loads(file.read_text())


def forked(
    runner: ModuleType, out: Path, *words: object, ranks: int = 1, before: Callable[[], None] | None = None
) -> list[int]:
    """Fork the ranks of a command. Each writes its stdout to ``out/said-RANK`` and its stderr to ``out/log-RANK``.

    Args:
        before: called by the first rank before the command. If the first rank fails, the others are killed, as by
            torchrun.

    Returns:
        The exit codes of the ranks; the negative signal number for a rank killed by a signal.
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
    """Run a command on two ranks, which must succeed; return the stdout of each."""
    assert forked(runner, out, *words, ranks=2) == [0, 0], [(out / f"log-{rank}").read_text() for rank in range(2)]
    return [(out / f"said-{rank}").read_text() for rank in range(2)]
