"""Make views from an image and their parameters, on one core."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dino_xcit.augment import parameters as column
from dino_xcit.augment.photometric import finish_view, scratch_size
from dino_xcit.augment.resample import Resampler


class ViewMaker:
    """Makes the views of one image after another, and reuses its buffers."""

    def __init__(self) -> None:
        self._resampler = Resampler()
        self._scratch = np.empty(0, dtype=np.uint8)

    def load(self, image: NDArray[np.uint8]) -> None:
        """Set the image of the next views: [height, width, 4] uint8, contiguous, unchanged until :meth:`release`."""
        self._resampler.load(image)

    def release(self) -> None:
        """Free the image."""
        self._resampler.release()

    def make(self, row: NDArray[np.float64], out: NDArray[np.uint8], photometric: bool = True) -> None:
        """Make one view.

        Args:
            row: Parameters of the view, see :mod:`dino_xcit.augment.parameters`.
            out: [3, size, size] uint8, contiguous, overwritten.
            photometric: Whether to apply the photometric part. False: crop, resize and flip only.
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
