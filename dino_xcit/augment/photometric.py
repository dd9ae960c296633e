"""The photometric part of a view, on one core: Pillow's arithmetic, bit for bit, many times faster.

Each operation gives the same bits as Pillow, or as torchvision on a Pillow image, for the same factor
(tests/test_photometric.py: hue for all 16.7 million colours). Numba compiles the loops to vector instructions. They use
only integers and correctly rounded floating-point operations in a fixed order, so all processors and GPUs
(dino_xcit/kernels/photometric.py) give the same bits.

Shapes: a view is [3, height, width] uint8; ``red``, ``green`` and ``blue`` are its planes, flat.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dino_xcit.augment.compiled import compiled

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""Codes of the jitter's operations; -1: none."""

_I, _U, _F = np.int32, np.uint32, np.float32
"""Explicit at every step, as Numba widens 32-bit integers to 64 bits, which halves the speed or worse."""


@compiled  # type: ignore[untyped-decorator]
def finish_view(
    view: NDArray[np.uint8],
    scratch: NDArray[np.uint8],
    operations: NDArray[np.float64],
    gray: bool,
    sigma: float,
    solarize: bool,
) -> None:
    """Apply jitter, grey, blur and solarisation in place, in the order of the reference.

    Args:
        view: [3, height, width], modified in place.
        scratch: :func:`scratch_size` bytes, overwritten.
        operations: [8], (code, factor) of four operations in the order of application.
        gray: Whether to convert the view to grey.
        sigma: Std of the blur in pixels, as in Pillow. Negative: no blur.
        solarize: Whether to invert values of 128 and more.
    """
    for number in range(4):
        code, factor = operations[2 * number], operations[2 * number + 1]
        if code == BRIGHTNESS:
            _blend(view, 0, factor)
        elif code == CONTRAST:
            _blend(view, _mean_gray(view), factor)
        elif code == SATURATION:
            _saturate(view[0].ravel(), view[1].ravel(), view[2].ravel(), factor)
        elif code == HUE:
            _turn_hue(view[0].ravel(), view[1].ravel(), view[2].ravel(), factor)
    if gray:
        _to_gray(view[0].ravel(), view[1].ravel(), view[2].ravel())
    if sigma >= 0:
        _blur(view, scratch, box_radius(sigma))
    if solarize:
        _solarize(view.ravel())


def scratch_size(size: int, sigma: float) -> int:
    """Return the scratch bytes of :func:`finish_view` for a view of ``size`` x ``size`` pixels and this ``sigma``."""
    return 2 * size * (size + 2 * (int(box_radius(max(sigma, 0.0))) + 1))


@compiled  # type: ignore[untyped-decorator]
def box_radius(sigma: float) -> np.float32:
    """Return the radius of the box that, applied three times, has the variance of a Gaussian of ``sigma`` pixels.

    Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering" (SSVM 2011), with
    Pillow's rounding.
    """
    variance = _F(sigma) * _F(sigma) / _F(3)
    length = _F(np.sqrt(12.0 * float(variance) + 1.0))
    whole = _F(np.floor((float(length) - 1.0) / 2.0))
    next_whole = whole + _F(1)
    rest = (_F(2) * whole + _F(1)) * (whole * next_whole - _F(3) * variance)
    return whole + rest / (_F(6) * (variance - next_whole * next_whole))


@compiled
def _mix(value, other, factor):  # type: ignore[no-untyped-def]
    """Interpolate as ImageEnhance: ``other`` + factor * (value - other), clipped to 0 .. 255, truncated. float32."""
    mixed = other + factor * (value - other)
    return np.uint8(_I(min(max(mixed, _F(0)), _F(255))))


@compiled
def _gray(red, green, blue):  # type: ignore[no-untyped-def]
    """Compute Pillow's luma (ITU-R 601-2) in 16-bit fixed point, uint32."""
    return _U(_U(_U(red) * _U(19595)) + _U(_U(green) * _U(38470)) + _U(_U(blue) * _U(7471)) + _U(0x8000)) >> _U(16)


@compiled
def _blend(out, other, factor):  # type: ignore[no-untyped-def]
    """Blend with a constant: black for brightness, the mean grey for contrast."""
    values, constant, share = out.ravel(), _F(other), _F(factor)
    for i in range(values.size):
        values[i] = _mix(_F(values[i]), constant, share)


@compiled
def _mean_gray(out):  # type: ignore[no-untyped-def]
    """Return the mean luma, rounded half up."""
    _, height, width = out.shape
    total = 0
    for y in range(height):
        red, green, blue = out[0, y], out[1, y], out[2, y]
        of_row = _U(0)
        for x in range(width):
            of_row = _U(of_row + _gray(red[x], green[x], blue[x]))
        total += int(of_row)
    return int(total / (height * width) + 0.5)


@compiled
def _saturate(red, green, blue, factor):  # type: ignore[no-untyped-def]
    share = _F(factor)
    for i in range(red.size):
        luma = _F(_I(_gray(red[i], green[i], blue[i])))
        red[i] = _mix(_F(red[i]), luma, share)
        green[i] = _mix(_F(green[i]), luma, share)
        blue[i] = _mix(_F(blue[i]), luma, share)


@compiled
def _to_gray(red, green, blue):  # type: ignore[no-untyped-def]
    for i in range(red.size):
        luma = np.uint8(_gray(red[i], green[i], blue[i]))
        red[i], green[i], blue[i] = luma, luma, luma


@compiled
def _turn_hue(red, green, blue, factor):  # type: ignore[no-untyped-def]
    """Convert to Pillow's 8-bit HSV, add ``factor`` turns to the hue, and convert back.

    Without branches, so that it is vectorised. Pillow computes parts in double; in this form float32 gives the same
    levels for all colours and turns. Where Pillow adds two of its ratios, one of them is always 1.
    """
    turn = _F(int(factor * 255) & 255)  # as torchvision: truncated, then modulo 256
    for i in range(red.size):
        r, g, b = _F(red[i]), _F(green[i]), _F(blue[i])
        most, least = max(r, max(g, b)), min(r, min(g, b))
        chroma = most - least
        # ---- hue in sixths of a turn; x: position of the middle channel, 0 at the maximum and 1 at the minimum
        x = (most - (r + g + b - most - least)) / max(chroma, _F(1))
        if_red = _F(1) - x if b == least else x - _F(1)
        if_green = _F(1) + x if b == least else _F(3) - x
        if_blue = _F(3) + x if r == least else _F(5) - x
        turned = (if_red if r == most else (if_green if g == most else if_blue)) / _F(6)
        turned = turned + _F(1) if turned < _F(0) else turned
        hue = _levels(turned) if chroma > _F(0) else _F(0)
        saturation = _levels(chroma / max(most, _F(1))) / _F(255)
        # ---- rotation
        hue = hue + turn
        hue = hue - _F(256) if hue >= _F(256) else hue
        # ---- back to RGB: in sector k the channels have the levels most, middle and low
        k = _F(_I(hue * _F(6) / _F(255)))
        part = (hue * _F(6) - _F(255) * k) / _F(255)
        k = k if k < _F(6) else _F(0)
        falls = (k == _F(1)) or (k == _F(3)) or (k == _F(5))
        low = _F(_I(most * (_F(1) - saturation) + _F(0.5)))
        middle = _F(_I(most * (_F(1) - saturation * (part if falls else _F(1) - part)) + _F(0.5)))
        r = most if (k == _F(0) or k == _F(5)) else (middle if (k == _F(1) or k == _F(4)) else low)
        g = most if (k == _F(1) or k == _F(2)) else (middle if (k == _F(0) or k == _F(3)) else low)
        b = most if (k == _F(3) or k == _F(4)) else (middle if (k == _F(2) or k == _F(5)) else low)
        red[i], green[i], blue[i] = np.uint8(_I(r)), np.uint8(_I(g)), np.uint8(_I(b))


@compiled
def _levels(share):  # type: ignore[no-untyped-def]
    """Return floor(share * 255) of the exact product, which float32 may round up."""
    product = _F(_I(share * _F(255)))
    return product - _F(1) if share * _F(256) - product < share else product


@compiled
def _solarize(values):  # type: ignore[no-untyped-def]
    for i in range(values.size):
        values[i] = values[i] if values[i] < 128 else np.uint8(255 - values[i])


@compiled
def _blur(out, scratch, radius):  # type: ignore[no-untyped-def]
    """Apply three box blurs along the rows, then three along the columns, with replicated borders.

    The two outermost pixels of a box of fractional width have less weight. Weights are 24-bit fixed point.
    """
    _, height, width = out.shape
    reach = int(radius)
    whole = _U(_F(1 << 24) / (radius * _F(2) + _F(1)))
    edge = _U(((1 << 24) - (2 * reach + 1) * int(whole)) // 2)
    pad = reach + 1
    size = height * (width + 2 * pad)
    first, second = scratch[:size], scratch[size : 2 * size]
    first_rows = first.reshape(height, width + 2 * pad)
    second_rows = second.reshape(height, width + 2 * pad)
    above, below = first[: height * width].reshape(height, width), second[: height * width].reshape(height, width)
    for channel in range(3):
        plane = out[channel]
        _copy(plane, first_rows[:, pad : pad + width])
        # All rows are filtered as one line: results across the border of two rows end up in the padding.
        _pad(first_rows, pad)
        _box_along(first, second, reach, whole, edge)
        _pad(second_rows, pad)
        _box_along(second, first, reach, whole, edge)
        _pad(first_rows, pad)
        _box_along(first, second, reach, whole, edge)
        _copy(second_rows[:, pad : pad + width], plane)
        _box_across(plane, above, reach, whole, edge)
        _box_across(above, below, reach, whole, edge)
        _box_across(below, plane, reach, whole, edge)


@compiled
def _copy(values, out):  # type: ignore[no-untyped-def]
    height, width = values.shape
    for y in range(height):
        row, to = values[y], out[y]
        for x in range(width):
            to[x] = row[x]


@compiled
def _pad(rows, pad):  # type: ignore[no-untyped-def]
    height, size = rows.shape
    for y in range(height):
        for x in range(pad):
            rows[y, x], rows[y, size - 1 - x] = rows[y, pad], rows[y, size - 1 - pad]


@compiled
def _box_along(values, out, reach, whole, edge):  # type: ignore[no-untyped-def]
    pad = reach + 1
    count = values.size - 2 * pad
    if reach == 0:
        for x in range(count):
            out[x + 1] = _weigh(_U(values[x + 1]), _U(_U(values[x]) + _U(values[x + 2])), whole, edge)
    elif reach == 1:
        for x in range(count):
            inner = _U(_U(values[x + 1]) + _U(values[x + 2]) + _U(values[x + 3]))
            out[x + 2] = _weigh(inner, _U(_U(values[x]) + _U(values[x + 4])), whole, edge)
    else:  # a running sum
        inner = _U(0)
        for x in range(1, 2 * reach + 1):
            inner = _U(inner + _U(values[x]))
        for x in range(count):
            inner = _U(inner + _U(values[x + 2 * reach + 1]))
            out[x + pad] = _weigh(inner, _U(_U(values[x]) + _U(values[x + 2 * pad])), whole, edge)
            inner = _U(inner - _U(values[x + 1]))


@compiled
def _box_across(values, out, reach, whole, edge):  # type: ignore[no-untyped-def]
    height, width = values.shape
    inner = np.zeros(width, dtype=np.uint32)  # for wide boxes: running sums of the lines
    if reach > 1:
        for k in range(-reach, reach + 1):
            line = values[min(max(k, 0), height - 1)]
            for x in range(width):
                inner[x] = _U(inner[x] + _U(line[x]))
    for y in range(height):
        first, last, to = values[max(y - reach - 1, 0)], values[min(y + reach + 1, height - 1)], out[y]
        here = values[y]
        if reach == 0:
            for x in range(width):
                to[x] = _weigh(_U(here[x]), _U(_U(first[x]) + _U(last[x])), whole, edge)
        elif reach == 1:
            above, below = values[max(y - 1, 0)], values[min(y + 1, height - 1)]
            for x in range(width):
                three = _U(_U(above[x]) + _U(here[x]) + _U(below[x]))
                to[x] = _weigh(three, _U(_U(first[x]) + _U(last[x])), whole, edge)
        else:
            for x in range(width):
                to[x] = _weigh(inner[x], _U(_U(first[x]) + _U(last[x])), whole, edge)
            gone, come = values[max(y - reach, 0)], values[min(y + reach + 1, height - 1)]
            for x in range(width):
                inner[x] = _U(inner[x] + _U(come[x]) - _U(gone[x]))


@compiled
def _weigh(inner, outer, whole, edge):  # type: ignore[no-untyped-def]
    return np.uint8(_U(_U(inner * whole) + _U(outer * edge) + _U(1 << 23)) >> _U(24))
