"""Make views from an image of other than three channels, in float32. C: number of channels."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch.nn import functional as F

from dino_xcit.augment import parameters as column
from dino_xcit.augment.photometric import BRIGHTNESS, CONTRAST
from dino_xcit.transform import Channels


class ChannelViewMaker:
    """The counterpart of :class:`dino_xcit.augment.views.ViewMaker`.

    Brightness, contrast, blur and solarisation change each channel by itself. Saturation, hue and grey have no meaning
    for other than three channels; a random gain of each channel and a dropped channel replace them.
    """

    def __init__(self, gain: float, drop: float) -> None:
        """``gain``: strength of the gain, factors from 1 - gain to 1 + gain; ``drop``: probability of a dropped one."""
        self._gain, self._drop = gain, drop
        self._image = torch.empty(0)

    def load(self, image: Channels) -> None:
        """Set the image of the next views: [height, width, C] from 0 to 1, unchanged until :meth:`release`."""
        self._image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))

    def release(self) -> None:
        """Free the image."""
        self._image = torch.empty(0)

    def make(self, row: NDArray[np.float64], out: Channels, photometric: bool = True) -> None:
        """Make one view.

        Args:
            row: Parameters of the view, see :mod:`dino_xcit.augment.parameters`, then random numbers in [0, 1): one for
                each channel, and one for the dropped channel.
            out: [C, size, size] float32, overwritten.
            photometric: Whether to change the values. False: crop, resize and flip only.
        """
        top, left, height, width, flip = row[: column.FLIP + 1].astype(np.int64).tolist()
        crop = self._image[None, :, top : top + height, left : left + width]
        view = F.interpolate(crop, out.shape[1:], mode="bicubic", antialias=True)[0].clamp_(0, 1).numpy()
        out[:] = view[:, :, ::-1] if flip else view
        if photometric:
            self._finish(row, out)

    def _finish(self, row: NDArray[np.float64], out: Channels) -> None:
        for code, factor in row[column.JITTER].reshape(4, 2):
            if code in (BRIGHTNESS, CONTRAST):
                mean = out.mean(axis=(1, 2), keepdims=True) if code == CONTRAST else np.float32(0)
                np.clip(mean + np.float32(factor) * (out - mean), 0, 1, out=out)
        *gains, drop = row[column.COLUMNS :].astype(np.float32)
        np.clip(out * (1 + self._gain * (2 * np.array(gains) - 1))[:, None, None], 0, 1, out=out)
        if len(out) > 1 and drop < self._drop:
            out[int(drop / self._drop * len(out))] = 0
        if row[column.SIGMA] >= 0:
            for axis in (1, 2):
                ndimage.gaussian_filter1d(out, row[column.SIGMA], axis, output=out, mode="nearest")
        if row[column.SOLARIZE]:
            np.subtract(1, out, out=out, where=out >= 0.5)
