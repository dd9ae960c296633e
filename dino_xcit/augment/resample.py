"""Crop, resize and mirror on one core: Pillow's antialiased bicubic, bit for bit, several times faster.

Pillow resizes along the rows, rounds to eight bits, then resizes along the columns, with weights in 22-bit fixed point.
From version 13 it swaps the order if the height shrinks by much more. This module does the same with another memory
layout: the image is transposed once, so that each pass adds whole lines, 16 or 32 values per instruction. A pixel has
four bytes (red, green, blue, unused), so that transposing moves 32-bit words.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dino_xcit.augment.compiled import compiled

_I, _U = np.int32, np.uint32
"""Explicit at every step, as Numba widens 32-bit integers to 64 bits, which halves the speed or worse."""

_BITS = 22  # precision of the weights: Pillow's PRECISION_BITS

_KEPT_WORDS = 1 << 24
"""Buffers of up to this number of pixels (64 MB) are kept for the next image."""


class Resampler:
    """Cuts views from one image after another, and reuses its buffers."""

    def __init__(self) -> None:
        self._rows = np.empty((0, 0), dtype=np.uint32)
        self._columns = np.empty((0, 0), dtype=np.uint32)
        self._memory = np.empty(0, dtype=np.uint32)
        self._scratch = np.empty(0, dtype=np.uint32)

    def load(self, image: NDArray[np.uint8]) -> None:
        """Set the image of the next views: [height, width, 4] uint8, contiguous, unchanged until :meth:`release`."""
        height, width, _ = image.shape
        if len(self._memory) < height * width:
            self._memory = np.empty(height * width, dtype=np.uint32)
        columns = self._memory[: height * width].reshape(width, height)
        self._rows, self._columns = _read_only(image.view(np.uint32).reshape(height, width)), _read_only(columns)
        _transpose(self._rows, columns)

    def release(self) -> None:
        """Free the image and large buffers."""
        self._rows = self._columns = np.empty((0, 0), dtype=np.uint32)
        if len(self._memory) > _KEPT_WORDS:
            self._memory = np.empty(0, dtype=np.uint32)
        if len(self._scratch) > _KEPT_WORDS:
            self._scratch = np.empty(0, dtype=np.uint32)

    def cut(self, top: int, left: int, height: int, width: int, flip: bool, out: NDArray[np.uint8]) -> None:
        """Crop, resize and optionally flip the image into ``out`` [3, size, size].

        Same as Pillow's ``image.crop((left, top, left + width, top + height)).resize((size, size), BICUBIC)``.
        """
        size = out.shape[-1]
        needed = 2 * size * (max(height, width) + size)
        if len(self._scratch) < needed:
            self._scratch = np.empty(needed, dtype=np.uint32)
        rows_first = height > size and height - size > 2 * (width - size)  # Pillow's rule
        if rows_first:
            _cut(self._rows, top, left, height, width, rows_first, flip, out, self._scratch)
        else:
            _cut(self._columns, left, top, width, height, rows_first, flip, out, self._scratch)


def _read_only(values: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return a read-only view, so that Numba compiles for one kind of array only."""
    values = values.view()
    values.flags.writeable = False
    return values


@compiled
def _cut(image, first, offset, count, length, rows_first, flip, out, scratch):  # type: ignore[no-untyped-def]
    """Resize ``count`` lines from ``first`` on. Lines are rows of the image if ``rows_first``, else columns."""
    size = out.shape[-1]
    lines = image[first : first + count, offset : offset + length]
    fewer = scratch[: size * length].reshape(size, length)
    turned = scratch[size * length : 2 * size * length].reshape(length, size)
    small = scratch[2 * size * length : size * (2 * length + size)].reshape(size, size)
    _add_lines(lines, fewer)
    _transpose(fewer, turned)
    _add_lines(turned, small)
    if rows_first:
        upright = scratch[size * (2 * length + size) : size * (2 * length + 2 * size)].reshape(size, size)
        _transpose(small, upright)
    else:
        upright = small
    for y in range(size):
        row, red, green, blue = upright[y], out[0, y], out[1, y], out[2, y]
        if flip:
            for x in range(size):
                value = row[size - 1 - x]
                red[x], green[x], blue[x] = np.uint8(value), np.uint8(value >> _U(8)), np.uint8(value >> _U(16))
        else:
            for x in range(size):
                value = row[x]
                red[x], green[x], blue[x] = np.uint8(value), np.uint8(value >> _U(8)), np.uint8(value >> _U(16))


@compiled
def _transpose(values, out):  # type: ignore[no-untyped-def]
    """Transpose [height, width] uint32 to [width, height], 32 lines at a time: two cache lines of ``out``."""
    height, width = values.shape
    whole = height - height % 32
    for start in range(0, whole, 32):
        for x in range(width):
            for y in range(32):
                out[x, start + y] = values[start + y, x]
    for y in range(whole, height):
        for x in range(width):
            out[x, y] = values[y, x]


@compiled
def _add_lines(values, out):  # type: ignore[no-untyped-def]
    """Resize [count, length] to [new count, length]. Each new line is a weighted sum of old lines, per byte."""
    count, length = values.shape
    new_count = out.shape[0]
    scale = count / new_count
    stretch = max(scale, 1.0)  # downscaling averages more lines: antialiasing
    support = 2.0 * stretch
    weights = np.empty(int(np.ceil(support)) * 2 + 1, dtype=np.int32)
    shares = np.empty(len(weights))
    total = np.empty(4 * length, dtype=np.int32)
    for line in range(new_count):
        centre = (line + 0.5) * scale
        first = max(int(centre - support + 0.5), 0)
        taps = min(int(centre + support + 0.5), count) - first
        whole = 0.0
        for tap in range(taps):
            shares[tap] = _bicubic((tap + first - centre + 0.5) * (1.0 / stretch))
            whole += shares[tap]
        for tap in range(taps):
            share = shares[tap] / whole * (1 << _BITS)
            weights[tap] = _I(share - 0.5) if share < 0 else _I(share + 0.5)
        for i in range(4 * length):
            total[i] = _I(1 << (_BITS - 1))
        tap = 0
        while tap + 3 < taps:  # four at a time: a quarter of the memory writes
            a, b = values[first + tap].view(np.uint8), values[first + tap + 1].view(np.uint8)
            c, d = values[first + tap + 2].view(np.uint8), values[first + tap + 3].view(np.uint8)
            of_a, of_b, of_c, of_d = weights[tap], weights[tap + 1], weights[tap + 2], weights[tap + 3]
            for i in range(4 * length):
                pair = _I(_I(_I(a[i]) * of_a) + _I(_I(b[i]) * of_b))
                total[i] = _I(total[i] + pair + _I(_I(_I(c[i]) * of_c) + _I(_I(d[i]) * of_d)))
            tap += 4
        while tap < taps:
            a, of_a = values[first + tap].view(np.uint8), weights[tap]
            for i in range(4 * length):
                total[i] = _I(total[i] + _I(_I(a[i]) * of_a))
            tap += 1
        to = out[line].view(np.uint8)
        for i in range(4 * length):
            to[i] = np.uint8(min(max(total[i] >> _I(_BITS), _I(0)), _I(255)))


@compiled
def _bicubic(x):  # type: ignore[no-untyped-def]
    """Evaluate Keys' cubic convolution kernel with a = -1/2, in Pillow's order of operations."""
    x = abs(x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1
    if x < 2.0:
        return (((x - 5) * x + 8) * x - 4) * -0.5
    return 0.0
