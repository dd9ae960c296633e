"""What ``--against DIR`` does: a benchmark of this commit and the same of an earlier one run in turn, side by side.

Each turn is the whole script with the same arguments, in a process that imports its own commit's code. Who begins
changes from round to round. A ratio is this commit's figure over that one's in the same round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

from process_group import clean_up_on_sigterm, process_group

from dino_xcit.errors import InputError, RunStopped

ROOT = Path(__file__).resolve().parent.parent

Figures = dict[str, tuple[Sequence[str], Literal["more", "less"]]]
"""By name: the keys that lead to a figure in the last line's JSON, and what is better."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this module."""
    parser.add_argument("--against", type=Path, metavar="DIR", help="compare with DIR, an earlier commit's checkout")
    parser.add_argument("--against-rounds", type=int, default=3, metavar="N", help="turns of each of the two")


def compare_commits(script: str, figures: Figures, given: argparse.Namespace) -> None:
    """Run both commits' ``script`` in turn, print a table and, as the last line, a JSON object.

    Raises:
        InputError, RunStopped: DIR has no such script, or there is no round; a turn failed, or nothing can be compared.
    """
    folders = [ROOT, given.against.resolve()]
    if not (folders[1] / "benchmarks" / script).is_file():
        raise InputError(
            f"--against {given.against} has no benchmarks/{script}, expected a checkout of an earlier commit: "
            "git worktree add DIR COMMIT makes one"
        )
    if given.against_rounds < 1:
        raise InputError(f"--against-rounds is {given.against_rounds}, expected at least 1")
    clean_up_on_sigterm()
    only_ours = argparse.ArgumentParser(add_help=False)
    add_arguments(only_ours)
    words = only_ours.parse_known_args()[1]  # an earlier commit knows no others
    commits = [commit_of(folder) or name for folder, name in zip(folders, ("this", "that"), strict=True)]
    rounds: list[dict[int, Any]] = []
    for number in range(given.against_rounds):
        rounds.append({})
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            print(f"round {number + 1} of {given.against_rounds}: {script} of {commits[side]}", flush=True)
            rounds[-1][side] = _turn(folders[side], script, words)
    out: dict[str, Any] = {}
    print(f"{'median (least - greatest)':28s} {commits[0]:^32s} {commits[1]:^32s} {'ratio':^24s} better")
    for name, (keys, better) in figures.items():
        pairs = [[_look_up(one[side], keys) for side in (0, 1)] for one in rounds]
        if all(this and that for this, that in pairs):  # not there, or rounded to 0: nothing to compare
            this, that = zip(*pairs, strict=True)
            ratios = [own / theirs for own, theirs in zip(this, that, strict=True)]
            print(f"{name:28s} {_spread(this):^32s} {_spread(that):^32s} {_spread(ratios):^24s} {better}")
            out[name] = {"ratio": round(median(ratios), 4), "rounds": [round(ratio, 4) for ratio in ratios]}
            out[name] |= {"this": round(median(this), 6), "that": round(median(that), 6), "better": better}
    if not out:
        raise RunStopped(1, "error: the two have no figure in common, expected one: run both with fewer arguments")
    print(json.dumps({"commits": commits, "arguments": words, "against": out}))


def commit_of(folder: Path) -> str:
    """The version of the code, with a plus if files differ from it; nothing where git does not know."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _turn(folder: Path, script: str, words: Sequence[str]) -> dict[str, Any]:
    """The object in the last line of one run. It stays in the current directory: paths may be relative to that."""
    command = [sys.executable, str(folder / "benchmarks" / script), *words]
    environment = os.environ | {"PYTHONPATH": str(folder)}  # before any installed version
    with process_group() as group:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=environment, process_group=group
        )
        try:
            printed = child.communicate()[0].splitlines()
        except BaseException:
            child.terminate()  # which lets it remove its temporary files
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(5)
            raise
    with contextlib.suppress(IndexError, ValueError):
        if child.returncode == 0 and isinstance(found := json.loads(printed[-1]), dict):
            return found
    raise RunStopped(
        max(1, child.returncode),
        f"error: a turn ended with code {child.returncode}, expected 0 and a JSON object in its last line: "
        f"PYTHONPATH={shlex.quote(str(folder))} {shlex.join(command)} says more",
    )


def _look_up(found: Any, keys: Sequence[str]) -> float | None:
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, int | float) else None


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.4g} ({min(values):.4g} - {max(values):.4g})"
