"""A runner's console entry, called in the tests' own process: a twentieth of what starting a process costs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


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
