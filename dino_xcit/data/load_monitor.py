"""Measures how long training waits for images, and which stage of the loader is slowest."""

from __future__ import annotations

from collections.abc import Iterable

from dino_xcit.data.loader import Batch
from dino_xcit.data.workers import usable_cores
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import counted

MAX_WAIT_SHARE = 0.2
"""Maximum share of time that training may wait for images without a warning."""
MIN_SLOW_REPORTS = 3
"""Consecutive slow reports before a warning, so that the start of the loader does not count."""

STAGES = ("read", "decode", "augment")


class DataLoadMonitor:
    """Measures the stages of the loader, and warns once if training waits too long for images.

    Args:
        workers: Number of workers of this rank.
        cores: Number of cores of this machine; None: the usable ones.
    """

    def __init__(self, workers: int, cores: int | None = None) -> None:
        self._workers, self._cores = workers, cores or usable_cores()
        self._seconds, self._images = [0.0, 0.0, 0.0], 0
        self._slow_reports, self._warned = 0, False

    def note(self, batches: Iterable[Batch]) -> None:
        """Add the timings of some batches."""
        for batch in batches:
            self._seconds = [total + part for total, part in zip(self._seconds, batch.seconds, strict=True)]
            self._images += len(batch.indices)

    def metrics(self, data_wait: float) -> dict[str, float]:
        """Return the milliseconds per image for each stage in one worker, since the last call.

        Args:
            data_wait: Share of the time since the last call that training waited for images.
        """
        spent = {
            f"{stage}_ms": 1e3 * seconds / max(1, self._images)
            for stage, seconds in zip(STAGES, self._seconds, strict=True)
        }
        self._seconds, self._images = [0.0, 0.0, 0.0], 0
        self._slow_reports = self._slow_reports + 1 if data_wait > MAX_WAIT_SHARE else 0
        if self._slow_reports >= MIN_SLOW_REPORTS and not self._warned:
            self._warned = True
            log.warning(self._sentence(data_wait, spent))
        return spent

    def _sentence(self, data_wait: float, spent: dict[str, float]) -> str:
        slowest = max(STAGES, key=lambda stage: spent[f"{stage}_ms"])
        parts = ", ".join(f"{stage} {spent[f'{stage}_ms']:.1f}" for stage in STAGES)
        if self._workers == 0:
            remedy = "the training process itself loads them: raise --num-workers to 2 or more"
        else:
            remedy = f"{counted(self._workers, 'worker')} per rank, {counted(self._cores, 'core')}: raise --num-workers"
            if slowest == "read":
                remedy += ", or use a faster disk"
            if slowest == "decode":
                remedy += ", or use smaller files"
            if slowest == "augment":
                remedy += ", or on a GPU try --augment-device cuda"
        return (
            f"training waits for images {100 * data_wait:.0f}% of the time (ms per image: {parts}; slowest: {slowest})"
            f"; {remedy}"
        )
