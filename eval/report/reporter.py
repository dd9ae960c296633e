"""Keep the report of a run up to date while it trains."""

from __future__ import annotations

from pathlib import Path

from dino_xcit.errors import one_line
from dino_xcit.methods import Method
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from eval.report.contents import read_run
from eval.report.html import write_report
from eval.report.pictures import Pictures

REPORT = "report.html"


class Reporter:
    """Writes ``report.html`` at epoch ends. A report that cannot be written never ends a run."""

    def __init__(self, output_dir: str, pictures: Pictures | None = None) -> None:
        self._folder, self._pictures = Path(output_dir), pictures

    def __call__(self, method: Method, epoch: int, run_ends: bool) -> None:
        """Write the report after the 0-based ``epoch``. Must be called on every rank."""
        pictures = self._pictures if self._pictures and (run_ends or self._pictures.due(epoch)) else None
        features = pictures.extract(method.eval_backbone) if pictures else None
        if not distributed.is_main():
            return
        try:
            if pictures and features:
                pictures.write(method.eval_backbone, features, epoch)
        except Exception as error:
            log.warn_once(f"the report has no new pictures ({type(error).__name__}: {one_line(error)})")
        try:
            write_report([read_run(self._folder)], self._folder / REPORT)
        except Exception as error:
            log.warn_once(f"cannot write {self._folder / REPORT} ({type(error).__name__}: {one_line(error)})")
