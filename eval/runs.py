"""List pretraining and supervised runs with their state.

python -m eval.runs [runs/ ...]
"""

from __future__ import annotations

# Import before torch: it sets how OpenMP threads wait.
import dino_xcit  # noqa: F401  # isort: skip

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from dino_xcit.bounds import IsPath, Positional, Repeatable
from dino_xcit.cli import parse
from dino_xcit.errors import InputError, printable, run_main
from dino_xcit.metrics import METRICS_FILE
from dino_xcit.runtime.run_lock import LOCK, is_locked
from eval.report.contents import RunRecord, read_run
from eval.table import table


@dataclass(frozen=True)
class RunsConfig:
    """List runs with state, progress, accuracy, verdict and the time since the last logged step."""

    folders: Annotated[tuple[str, ...], IsPath, Positional, Repeatable] = ("runs",)
    """Folders that contain runs, at any depth (the flag --folders itself may be omitted)."""


def main() -> None:
    """Run the command.

    Raises:
        InputError: there are no runs.
    """
    config = parse(RunsConfig, sys.argv[1:], "python -m eval.runs")
    found = sorted({path.parent for root in config.folders for path in Path(root).rglob(METRICS_FILE)})
    if not found:
        raise InputError(f"there are no runs in {', '.join(config.folders)}: give the folders that contain them")
    rows = list(map(row_of, found))
    print(table(["run", "state", "progress", "k-NN or top-1 %", "verdict", "last step"], rows))


def row_of(folder: Path) -> list[str]:
    """Describe a run in a row."""
    seconds = time.time() - (folder / METRICS_FILE).stat().st_mtime
    try:
        run = read_run(folder)
    except InputError:
        return [printable(str(folder)), "unreadable", "-", "-", "-", f"{age(seconds)} ago"]
    accuracy = run.latest.get("knn_top1", run.latest.get("top1"))
    progress = f"{100 * run.step / run.total_steps:.0f}% of {run.total_steps:,} steps" if run.total_steps else "-"
    shown = "-" if accuracy is None else f"{accuracy:.1f}"
    return [printable(str(folder)), state_of(run), progress, shown, run.state or "-", f"{age(seconds)} ago"]


def state_of(run: RunRecord) -> str:
    """Return ``running`` if a process holds the folder, else ``finished`` or ``stopped``."""
    try:
        if (run.folder / LOCK).exists() and is_locked(run.folder):
            return "running"
    except OSError:
        return "unknown"
    return "finished" if run.total_steps and run.step >= run.total_steps else "stopped"


def age(seconds: float) -> str:
    """Format a duration in its largest unit."""
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        count = int(seconds // size)
        if count:
            return f"{count} {unit}{'s' * (count > 1)}"
    return f"{max(0, int(seconds))} s"


if __name__ == "__main__":
    run_main(main)
