"""Does training wait for images, and for which part of the work on them?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from dino_xcit.data.loader import Batch
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import counted

TOO_LONG = 0.2
"""Share of the time that training may wait for images."""
IN_A_ROW = 3
"""So many times in a row it has to be more, so that the loader's start does not count."""

STAGES = ("read", "decode", "augment")


class DataLoadMonitor:
    """Adds up what the loader's processes spend, and says once, in a plain sentence, that they are too slow."""

    def __init__(self, workers: int, relieve: Callable[[], None] | None = None, cores: int | None = None) -> None:
        """``workers``: this rank's loader processes; ``cores``: this machine's, for all of its ranks.

        ``relieve``: moves a part of their work to the device; called before anything is complained of.
        """
        self._workers, self._cores, self._relieve = workers, cores or os.cpu_count() or 1, relieve
        self._seconds, self._images = [0.0, 0.0, 0.0], 0
        self._hungry, self._said = 0, False

    def note(self, batches: Iterable[Batch]) -> None:
        """Some batches came."""
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
        self._hungry = self._hungry + 1 if data_wait > TOO_LONG else 0
        if self._hungry >= IN_A_ROW and self._relieve:
            self._relieve()
            self._relieve, self._hungry = None, 0
            log.info(
                f"{100 * data_wait:.0f}% of the time goes by waiting for images: jitter, blur and solarisation "
                "move to the GPU, where they give the same bits (--augment-device cpu keeps them)"
            )
        elif self._hungry >= IN_A_ROW and not self._said:
            self._said = True
            log.warning(self._sentence(data_wait, spent))
        return spent

    def _sentence(self, data_wait: float, spent: dict[str, float]) -> str:
        slowest = max(STAGES, key=lambda stage: spent[f"{stage}_ms"])
        parts = ", ".join(f"{stage} {spent[f'{stage}_ms']:.1f}" for stage in STAGES)
        if self._workers == 0:
            way = "images are read by the training process itself: give --num-workers 2, or more"
        else:
            there = f"{counted(self._workers, 'loader process')} a rank, {counted(self._cores, 'core')} here"
            way = f"{there}: try more --num-workers"
            if slowest == "read":
                way += ", or a faster disk"
            if slowest == "decode":
                way += ", or smaller files"
        return (
            f"{100 * data_wait:.0f}% of the time goes by waiting for images; ms an image: {parts}; most for "
            f"{slowest}; {way}"
        )
