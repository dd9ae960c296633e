"""Write the report of a run, or overlay several runs.

python -m eval.report runs/a                            runs/a/report.html
python -m eval.report runs/a runs/b --out both.html     curves of both, and how their settings differ
"""

from __future__ import annotations

# Import before torch: it sets how OpenMP threads wait.
import dino_xcit  # noqa: F401  # isort: skip

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from annotated_types import MinLen

from dino_xcit.bounds import FilePath, IsPath, Positional, Repeatable, Suffix
from dino_xcit.cli import parse
from dino_xcit.errors import printable, run_main
from eval.report.contents import read_run
from eval.report.html import write_report
from eval.report.reporter import REPORT
from eval.setup import demand_writable


@dataclass(frozen=True)
class ReportConfig:
    """Write the report of a run as one HTML file, or overlay the curves of several runs."""

    runs: Annotated[tuple[str, ...], IsPath, MinLen(1), Positional, Repeatable] = ()
    """Output directories of runs (the flag --runs itself may be omitted)."""
    out: Annotated[FilePath, Suffix(".html")] = ""
    """File to write. Default: report.html in the folder of the run; for several runs, in the current folder."""


def main() -> None:
    """Run the command.

    Raises:
        InputError: a folder is no run, or the file cannot be written.
    """
    config = parse(ReportConfig, sys.argv[1:], "python -m eval.report")
    runs = [read_run(Path(folder)) for folder in config.runs]
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=str(run.folder)) for run in runs]
    path = Path(config.out) if config.out else (runs[0].folder if len(runs) == 1 else Path()) / REPORT
    demand_writable({"out": str(path)})
    write_report(runs, path)
    print(printable(f"written: {path}"))


if __name__ == "__main__":
    run_main(main)
