"""Measure a sample of a data set: the white level of its 16-bit images, mean and std of each channel."""

from __future__ import annotations

import contextlib
from functools import partial

import numpy as np

from dino_xcit.data.channels import highest_uint16
from dino_xcit.data.decode import guarded, highest_of_16_bits, read_image
from dino_xcit.data.source import Source, evenly_spaced
from dino_xcit.errors import InputError
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.transform import WHITE, PixelFormat


def choose_white_level(source: Source, level: int, channels: int = 3) -> int:
    """Return ``level``, or if it is 0 the white level measured on 64 images.

    The measured level is the smallest 2^n - 1 that is not below any 16-bit value, as 12-bit cameras and scanners write
    16-bit files. Warns if ``level`` makes the 16-bit images almost black. All ranks call this; rank 0 reads the images.
    """
    found = distributed.on_main(partial(_white_level_of, source, channels))
    if not level:
        log.info(f"white level of {source.url}: {found:,}, measured")
    elif 4 * found < level:
        log.warning(
            f"16-bit images of {source.url} become almost black: their largest value is at most {found:,}, and white "
            f"is {level:,}; set --white-level {found}"
        )
    return level or found


def _white_level_of(source: Source, channels: int) -> int:
    highest_of = highest_of_16_bits if channels == 3 else highest_uint16
    highest = 0
    for index in evenly_spaced(len(source), 64):
        if source.name(index).lower().endswith((".jpg", ".jpeg")):  # never 16-bit
            continue
        with contextlib.suppress(InputError):  # unreadable images are reported where they are used
            item, _ = source.read(index)
            if isinstance(item, bytes):
                highest = max(highest, guarded(highest_of, item, ""))
    return (1 << highest.bit_length()) - 1 if highest else WHITE


def measure_channels(source: Source, format: PixelFormat) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std of each channel over 256 images. All ranks call this; rank 0 reads the images.

    Raises:
        InputError: None of these images can be read.
    """
    return distributed.on_main(partial(_statistics, source, format))


def _statistics(source: Source, format: PixelFormat) -> tuple[tuple[float, ...], tuple[float, ...]]:
    moments, problem = [], InputError(f"no image in {source.url}")
    for index in evenly_spaced(len(source), 256):
        try:
            pixels = np.asarray(read_image(source, index, format), dtype=np.float64)
        except InputError as error:
            problem = error
            continue
        pixels = pixels / 255 if format.channels == 3 else pixels
        moments.append([pixels.mean(axis=(0, 1)), np.square(pixels).mean(axis=(0, 1))])
    if not moments:
        raise problem
    mean, square = np.mean(moments, axis=0)
    std = np.sqrt(np.maximum(square - mean**2, 1e-6))  # a constant channel
    constant = [str(channel) for channel in np.flatnonzero(std <= 1e-3)]
    if constant:
        log.warning(
            f"constant on a sample of {source.url}: channel {', '.join(constant)}; check --value-range and "
            "--white-level"
        )
    return tuple(mean.round(4).tolist()), tuple(std.round(4).tolist())
