"""The photometric part of a batch of views: the same bits as its twin, :mod:`dino_xcit.augment.photometric`.

A program has a block of one view, and ends at once if the view has not drawn the operation. Contrast needs the mean of
the whole view, and a box blur its neighbours, so each operation is a launch. A fused multiply-add would round once
instead of twice, so the compiler must not form one.

Shapes: n views of one size, [n, 3, height, width] uint8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from dino_xcit.augment import parameters as column
from dino_xcit.augment.photometric import CONTRAST, HUE, SATURATION
from dino_xcit.kernels import launchable

BLOCK = 1024
"""Pixels of a program."""

_PLAN, _FACTOR = tl.constexpr(column.PLAN_COLUMNS), tl.constexpr(column.FACTOR)
_REACH, _WHOLE, _EDGE = tl.constexpr(column.REACH), tl.constexpr(column.WHOLE), tl.constexpr(column.EDGE)
_CONTRAST, _SATURATION, _HUE = tl.constexpr(CONTRAST), tl.constexpr(SATURATION), tl.constexpr(HUE)
_GRAY, _SOLARIZE = tl.constexpr(column.TO_GRAY), tl.constexpr(column.TO_SOLARIZE)


@triton.jit
def _truncated(value):
    return value.to(tl.int32).to(tl.float32)


@triton.jit
def _mixed(value, other, factor):
    return _truncated(tl.minimum(tl.maximum(other + factor * (value - other), 0.0), 255.0))


@triton.jit
def _luma(r, g, b):
    return (r.to(tl.int32) * 19595 + g.to(tl.int32) * 38470 + b.to(tl.int32) * 7471 + 0x8000) >> 16


@triton.jit
def _levels(share):
    product = _truncated(share * 255.0)
    return tl.where(share * 256.0 - product < share, product - 1.0, product)


@triton.jit
def _hue_turned(r, g, b, turn):
    most, least = tl.maximum(r, tl.maximum(g, b)), tl.minimum(r, tl.minimum(g, b))
    chroma = most - least
    x = tl.div_rn(most - (r + g + b - most - least), tl.maximum(chroma, 1.0))
    if_red = tl.where(b == least, 1.0 - x, x - 1.0)
    if_green = tl.where(b == least, 1.0 + x, 3.0 - x)
    if_blue = tl.where(r == least, 3.0 + x, 5.0 - x)
    turned = tl.div_rn(tl.where(r == most, if_red, tl.where(g == most, if_green, if_blue)), 6.0)
    hue = tl.where(chroma > 0.0, _levels(tl.where(turned < 0.0, turned + 1.0, turned)), 0.0) + turn
    hue = tl.where(hue >= 256.0, hue - 256.0, hue)
    saturation = tl.div_rn(_levels(tl.div_rn(chroma, tl.maximum(most, 1.0))), 255.0)
    k = _truncated(tl.div_rn(hue * 6.0, 255.0))
    part = tl.div_rn(hue * 6.0 - 255.0 * k, 255.0)
    k = tl.where(k < 6.0, k, 0.0)
    part = tl.where((k == 1.0) | (k == 3.0) | (k == 5.0), part, 1.0 - part)
    low = _truncated(most * (1.0 - saturation) + 0.5)
    middle = _truncated(most * (1.0 - saturation * part) + 0.5)
    r = tl.where((k == 0.0) | (k == 5.0), most, tl.where((k == 1.0) | (k == 4.0), middle, low))
    g = tl.where((k == 1.0) | (k == 2.0), most, tl.where((k == 0.0) | (k == 3.0), middle, low))
    b = tl.where((k == 3.0) | (k == 4.0), most, tl.where((k == 2.0) | (k == 5.0), middle, low))
    return r, g, b


@triton.jit(do_not_specialize=["place"])
def colour_kernel(views, plan, lumas, pixels, place, BLOCK: tl.constexpr):
    """Apply operation ``place`` of each view; add the luma of the result to ``lumas`` [n] if contrast is next."""
    row = plan + tl.program_id(0) * _PLAN
    code, next_code = tl.load(row + place).to(tl.int32), tl.load(row + place + 1).to(tl.int32)
    if (code >= 0) | (next_code == _CONTRAST):
        pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = pixel < pixels
        red = views + tl.program_id(0).to(tl.int64) * 3 * pixels + pixel
        r = tl.load(red, inside, 0).to(tl.float32)
        g = tl.load(red + pixels, inside, 0).to(tl.float32)
        b = tl.load(red + 2 * pixels, inside, 0).to(tl.float32)
        factor = tl.load(row + _FACTOR + place)
        if code == _HUE:
            r, g, b = _hue_turned(r, g, b, factor)
        elif code == _GRAY:
            r = _luma(r, g, b).to(tl.float32)
            g, b = r, r
        elif code == _SOLARIZE:
            r = tl.where(r < 128.0, r, 255.0 - r)
            g = tl.where(g < 128.0, g, 255.0 - g)
            b = tl.where(b < 128.0, b, 255.0 - b)
        elif code >= 0:
            other = tl.zeros((BLOCK,), tl.float32)
            if code == _CONTRAST:
                total = tl.load(lumas + tl.program_id(0))
                other += ((2 * total + pixels) // (2 * pixels)).to(tl.float32)
            elif code == _SATURATION:
                other += _luma(r, g, b).to(tl.float32)
            r, g, b = _mixed(r, other, factor), _mixed(g, other, factor), _mixed(b, other, factor)
        if code >= 0:
            tl.store(red, r.to(tl.uint8), inside)
            tl.store(red + pixels, g.to(tl.uint8), inside)
            tl.store(red + 2 * pixels, b.to(tl.uint8), inside)
        if next_code == _CONTRAST:
            tl.atomic_add(lumas + tl.program_id(0), tl.sum(tl.where(inside, _luma(r, g, b), 0), 0).to(tl.int64))


@triton.jit
def box_kernel(source, target, plan, values, length, stride, BLOCK: tl.constexpr):
    """Filter the views that are blurred by a box along the dimension of this length and stride; borders replicated."""
    row = plan + tl.program_id(0) * _PLAN
    reach = tl.load(row + _REACH).to(tl.int32)
    if reach >= 0:
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < values
        place = (at // stride) % length
        first = tl.program_id(0).to(tl.int64) * values + at - place * stride  # the start of the line
        inner = tl.zeros((BLOCK,), tl.uint32)
        for shift in range(-reach, reach + 1):
            near = tl.minimum(tl.maximum(place + shift, 0), length - 1)
            inner += tl.load(source + first + near * stride, inside, 0).to(tl.uint32)
        before, after = tl.maximum(place - reach - 1, 0), tl.minimum(place + reach + 1, length - 1)
        outer = tl.load(source + first + before * stride, inside, 0).to(tl.uint32)
        outer += tl.load(source + first + after * stride, inside, 0).to(tl.uint32)
        whole, edge = tl.load(row + _WHOLE).to(tl.uint32), tl.load(row + _EDGE).to(tl.uint32)
        mean = (inner * whole + outer * edge + (1 << 23)) >> 24
        tl.store(target + first + place * stride, mean.to(tl.uint8), inside)


@triton_op("dino_xcit::finish_views", mutates_args={"views"})
def finish_views(views: Tensor, plan: Tensor) -> None:
    """Apply jitter, grey, blur and solarisation in place, in this order.

    Args:
        views: [n, 3, height, width] uint8, contiguous.
        plan: [n, columns] float32, from :func:`dino_xcit.augment.parameters.device_plan`.
    """
    count, _, height, width = views.shape
    pixels, lumas = height * width, torch.zeros(count, dtype=torch.int64, device=views.device)

    def colour(place: int) -> None:
        grid = count, triton.cdiv(pixels, BLOCK)
        launchable(colour_kernel)[grid](views, plan, lumas, pixels, place, BLOCK=BLOCK, enable_fp_fusion=False)

    for place in range(6):
        colour(place)
    other = torch.empty_like(views)
    for number, (length, stride) in enumerate([(width, 1)] * 3 + [(height, width)] * 3):
        source, target = (views, other) if number % 2 == 0 else (other, views)
        grid = count, triton.cdiv(3 * pixels, BLOCK)
        launchable(box_kernel)[grid](source, target, plan, 3 * pixels, length, stride, BLOCK=BLOCK)
    colour(6)
