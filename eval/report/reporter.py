"""Keep the report of a run up to date while it trains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dino_xcit.config import PretrainConfig
from dino_xcit.data import Source
from dino_xcit.errors import InputError, one_line
from dino_xcit.methods import Method
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from eval.report import pictures
from eval.report.contents import PICTURES, read_run
from eval.report.html import write_report

REPORT = "report.html"
DRAWN = 6
"""Epochs with pictures: evenly spaced, the first and the last included."""


class Reporter:
    """Writes ``report.html`` at epoch ends. A report that cannot be written never ends a run."""

    def __init__(self, output_dir: str) -> None:
        self._folder = Path(output_dir)

    def __call__(self, method: Method, epoch: int, run_ends: bool) -> None:
        """Write the report after the 0-based ``epoch``. Must be called on every rank."""
        try:
            self._draw(method, epoch, run_ends)
            if distributed.is_main():
                write_report([read_run(self._folder)], self._folder / REPORT)
        except (InputError, OSError) as error:
            log.warn_once(f"the report is incomplete: {one_line(error)}")

    def _draw(self, method: Method, epoch: int, run_ends: bool) -> None:
        """Draw pictures, if any."""


class PretrainReporter(Reporter):
    """Also draws the views once, and attention, patch features and neighbours at some epochs."""

    def __init__(self, config: PretrainConfig, source: Source, device: torch.device) -> None:
        super().__init__(config.output_dir)
        self._config, self._source = config, source
        self._pictures = pictures.Pictures(source, config.eval_transform(), device)
        self._epochs = set(np.linspace(0, config.epochs - 1, min(DRAWN, config.epochs)).round().astype(int).tolist())

    def _draw(self, method: Method, epoch: int, run_ends: bool) -> None:
        folder, config = self._folder / PICTURES, self._config
        main = distributed.is_main()
        if main and not (folder / "views.jpg").exists():
            folder.mkdir(parents=True, exist_ok=True)
            augmentation = config.augmentation()
            pictures.draw_views(self._source, augmentation, folder / "views.jpg", config.seed, config.white_level)
        if epoch in self._epochs or run_ends:
            for kind, image in self._pictures.draw(method.eval_backbone, main).items():
                pictures.save(image, folder / f"{kind}-{epoch + 1:04d}.jpg")
