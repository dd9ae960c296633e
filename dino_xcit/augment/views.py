"""From a picture and what was drawn to views, on one core."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dino_xcit.augment import parameters as column
from dino_xcit.augment.photometric import finish_view, scratch_size
from dino_xcit.augment.resample import Resampler


class ViewMaker:
    """Makes the views of one picture after another; holds the memory that this takes."""

    def __init__(self) -> None:
        self._resampler = Resampler()
        self._scratch = np.empty(0, dtype=np.uint8)

    def load(self, picture: NDArray[np.uint8]) -> None:
        """The picture that the next views are made of: [height, width, 4] uint8, contiguous, not to be changed."""
        self._resampler.load(picture)

    def release(self) -> None:
        """Let go of the picture."""
        self._resampler.release()

    def make(self, row: NDArray[np.float64], out: NDArray[np.uint8], photometric: bool = True) -> None:
        """One view, into ``out`` [3, size, size] uint8, contiguous.

        Args:
            row: what was drawn for it, see :mod:`dino_xcit.augment.parameters`.
            photometric: False: crop, resize and flip alone; a device does the rest.
        """
        top, left, height, width, flip = row[: column.FLIP + 1].astype(np.int64).tolist()
        self._resampler.cut(top, left, height, width, bool(flip), out)
        if not photometric:
            return
        sigma = float(row[column.SIGMA])
        needed = scratch_size(out.shape[-1], sigma)
        if len(self._scratch) < needed:
            self._scratch = np.empty(needed, dtype=np.uint8)
        jitter = row[column.JITTER]
        finish_view(out, self._scratch, jitter, row[column.GRAY] > 0, sigma, row[column.SOLARIZE] > 0)
