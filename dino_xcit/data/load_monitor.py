"""Measures how long training waits for images, and which stage of the loader is slowest."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from dino_xcit.data.loader import Batch
from dino_xcit.data.workers import usable_cores
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import counted

MAX_WAIT_SHARE = 0.2
"""Share of the time that training may wait for images."""
MIN_SLOW_REPORTS = 3
"""Consecutive slow reports before a warning, so that the loader's start does not count."""

STAGES = ("read", "decode", "augment")


class DataLoadMonitor:
    """Sums the time of the loader's stages, and warns once if training waits too long for images."""

    def __init__(self, workers: int, relieve: Callable[[], None] | None = None, cores: int | None = None) -> None:
        """``workers``: this rank's loader processes; ``cores``: those that this process may use.

        ``relieve``: moves a part of their work to the device; called before the first warning.
        """
        self._workers, self._cores, self._relieve = workers, cores or usable_cores(), relieve
        self._seconds, self._images = [0.0, 0.0, 0.0], 0
        self._slow_reports, self._warned = 0, False

    def note(self, batches: Iterable[Batch]) -> None:
        """Add the timings of batches."""
        for batch in batches:
            self._seconds = [total + part for total, part in zip(self._seconds, batch.seconds, strict=True)]
            self._images += len(batch.indices)

    def metrics(self, data_wait: float) -> dict[str, float]:
        """Milliseconds an image and stage since the last call, of one loader process.

        Args:
            data_wait: share of the time since then for which training waited for images.
        """
        spent = {
            f"{stage}_ms": 1e3 * seconds / max(1, self._images)
            for stage, seconds in zip(STAGES, self._seconds, strict=True)
        }
        self._seconds, self._images = [0.0, 0.0, 0.0], 0
        self._slow_reports = self._slow_reports + 1 if data_wait > MAX_WAIT_SHARE else 0
        if self._slow_reports >= MIN_SLOW_REPORTS and self._relieve:
            self._relieve()
            self._relieve, self._slow_reports = None, 0
            log.info(
                f"training waits for images {100 * data_wait:.0f}% of the time: moving jitter, blur and solarisation "
                "to the GPU, with the same bits (--augment-device cpu prevents it)"
            )
        elif self._slow_reports >= MIN_SLOW_REPORTS and not self._warned:
            self._warned = True
            log.warning(self._sentence(data_wait, spent))
        return spent

    def _sentence(self, data_wait: float, spent: dict[str, float]) -> str:
        slowest = max(STAGES, key=lambda stage: spent[f"{stage}_ms"])
        parts = ", ".join(f"{stage} {spent[f'{stage}_ms']:.1f}" for stage in STAGES)
        if self._workers == 0:
            way = "the training process itself loads them: raise --num-workers to 2 or more"
        else:
            there = f"{counted(self._workers, 'loader process')} a rank, {counted(self._cores, 'core')} here"
            way = f"{there}: raise --num-workers"
            if slowest == "read":
                way += ", or use a faster disk"
            if slowest == "decode":
                way += ", or make the files smaller"
        return (
            f"training waits for images {100 * data_wait:.0f}% of the time (ms per image: {parts}; slowest: {slowest})"
            f"; {way}"
        )
