"""The photometric part of a batch of views, on a device: the same bits as dino_xcit/augment/photometric.py.

Each operation runs on the views that drew it. The host has the parameters, so nothing waits for the device.
Bit equality has two conditions. Each floating-point operation is a separate kernel, as a fused multiply-add rounds once
instead of twice: do not use torch.compile here. Divisors are tensors on the device, as CUDA replaces a division by a
Python number with a multiplication by its reciprocal.

The largest temporaries are those of the blur, eight bytes per value: 77 MB for 64 blurred views of 224 pixels.

Shapes: n views of one size, [n, 3, size, size] uint8; m of them are selected by an operation.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_xcit.augment import parameters as column
from dino_xcit.augment.photometric import BRIGHTNESS, CONTRAST, HUE, SATURATION, box_radius

_HALF = 1 << 23  # of the blur's 24-bit fixed point
_WHICH_LEVEL = np.array([[0, 1, 2, 2, 1, 0], [1, 0, 0, 1, 2, 2], [2, 2, 1, 0, 0, 1]])
"""Level (0: most, 1: middle, 2: low) of red, green and blue in each sixth of the colour circle."""


def finish_views(views: Tensor, rows: Tensor) -> Tensor:
    """Apply jitter, grey, blur and solarisation, in this order.

    Args:
        views: [n, 3, size, size] uint8 on any device, overwritten.
        rows: [n, columns] float64 on the host, parameters of the views, see :mod:`dino_xcit.augment.parameters`.

    Returns:
        [n, 3, size, size] uint8 on the same device.
    """
    drawn = rows.numpy()
    codes, factors = drawn[:, column.JITTER][:, 0::2], drawn[:, column.JITTER][:, 1::2]
    for place in range(4):
        for code, adjust in ((BRIGHTNESS, _brightness), (CONTRAST, _contrast), (SATURATION, _saturation)):
            chosen = np.flatnonzero(codes[:, place] == code)
            _apply(views, chosen, adjust, factors[chosen, place].astype(np.float32))
        chosen = np.flatnonzero(codes[:, place] == HUE)
        turns = (factors[chosen, place] * 255).astype(np.int64) & 255
        _apply(views, chosen, _turn_hue, turns.astype(np.float32))
    _apply(views, np.flatnonzero(drawn[:, column.GRAY]), _gray)
    boxes = np.array([box_radius(sigma) if sigma >= 0 else -1 for sigma in drawn[:, column.SIGMA]], dtype=np.float32)
    for reach in range(int(boxes.max(initial=-1)) + 1):
        chosen = np.flatnonzero((boxes >= reach) & (boxes < reach + 1))
        whole = (np.float32(1 << 24) / (boxes[chosen] * np.float32(2) + np.float32(1))).astype(np.int64)
        edge = ((1 << 24) - (2 * reach + 1) * whole) // 2
        _apply(views, chosen, _blur(reach), whole, edge)
    _apply(views, np.flatnonzero(drawn[:, column.SOLARIZE]), _solarize)
    return views


def _apply(
    views: Tensor, chosen: NDArray[np.int64], operation: Callable[..., Tensor], *numbers: NDArray[np.generic]
) -> None:
    """Apply ``operation`` to the chosen views in place, with parameters [m, 1, 1, 1]."""
    if len(chosen) == 0:
        return
    indices = _send(chosen, views.device)
    sent = [_send(values, views.device).view(-1, 1, 1, 1) for values in numbers]
    views.index_copy_(0, indices, operation(views.index_select(0, indices), *sent))


def _send(values: NDArray[np.generic], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _number(value: float, like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.full((), value, dtype=dtype, device=like.device)


def _mix(views: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    mixed = views.to(torch.float32).sub_(other).mul_(factor).add_(other)
    return mixed.clamp_(0, 255).to(torch.uint8)  # truncates


def _luma(views: Tensor) -> Tensor:
    """[m, 1, size, size] int32."""
    red, green, blue = views.to(torch.int32).split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _brightness(views: Tensor, factor: Tensor) -> Tensor:
    return _mix(views, 0.0, factor)


def _contrast(views: Tensor, factor: Tensor) -> Tensor:
    total = _luma(views).sum(dim=(1, 2, 3), keepdim=True, dtype=torch.int64)
    mean = (total.to(torch.float64) / _number(views[0, 0].numel(), total, torch.float64) + 0.5).floor()
    return _mix(views, mean.to(torch.float32), factor)


def _saturation(views: Tensor, factor: Tensor) -> Tensor:
    return _mix(views, _luma(views).to(torch.float32), factor)


def _gray(views: Tensor) -> Tensor:
    return _luma(views).to(torch.uint8).expand_as(views)


def _solarize(views: Tensor) -> Tensor:
    return torch.where(views < 128, views, 255 - views)


def _turn_hue(views: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue with the same steps as ``photometric._turn_hue``."""
    six, most_levels = _number(6, views, torch.float32), _number(255, views, torch.float32)
    r, g, b = views.to(torch.float32).split(1, dim=1)
    most, least = torch.maximum(r, torch.maximum(g, b)), torch.minimum(r, torch.minimum(g, b))
    chroma = most - least
    x = (most - (r + g + b - most - least)) / chroma.clamp(min=1)
    if_red = torch.where(b == least, 1 - x, x - 1)
    if_green = torch.where(b == least, 1 + x, 3 - x)
    if_blue = torch.where(r == least, 3 + x, 5 - x)
    turned = torch.where(r == most, if_red, torch.where(g == most, if_green, if_blue)) / six
    turned = torch.where(turned < 0, turned + 1, turned)
    hue = torch.where(chroma > 0, _levels(turned), 0)
    saturation = _levels(chroma / most.clamp(min=1)) / most_levels
    hue = hue + turn
    hue = torch.where(hue >= 256, hue - 256, hue)
    sixths = hue * 6
    sector = (sixths / most_levels).trunc()
    part = (sixths - 255 * sector) / most_levels
    sector = torch.where(sector < 6, sector, 0).to(torch.int64)
    part = torch.where(sector % 2 == 1, part, 1 - part)
    low = (most * (1 - saturation) + 0.5).trunc()
    middle = (most * (1 - saturation * part) + 0.5).trunc()
    levels = torch.cat([most, middle, low], dim=1)
    order = _send(_WHICH_LEVEL, views.device)
    return levels.gather(1, order[:, sector[:, 0]].transpose(0, 1)).to(torch.uint8)


def _levels(share: Tensor) -> Tensor:
    product = (share * 255).trunc()
    return torch.where(share * 256 - product < share, product - 1, product)


def _blur(reach: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def blur(views: Tensor, whole: Tensor, edge: Tensor) -> Tensor:
        values = views.to(torch.int64)
        for dim in (3, 2):
            for _ in range(3):
                values = _box(values, dim, reach, whole, edge)
        return values.to(torch.uint8)

    return blur


def _box(values: Tensor, dim: int, reach: int, whole: Tensor, edge: Tensor) -> Tensor:
    """Box blur of 2 * reach + 1 pixels and a fraction of the next two, with replicated borders. int64."""
    size = values.shape[dim]
    places = torch.arange(-reach - 1, size + reach + 1, device=values.device).clamp_(0, size - 1)
    padded = values.index_select(dim, places)
    inner = padded.narrow(dim, 1, size)
    for shift in range(2, 2 * reach + 2):
        inner = inner + padded.narrow(dim, shift, size)
    outer = padded.narrow(dim, 0, size) + padded.narrow(dim, 2 * reach + 2, size)
    return (inner * whole + outer * edge + _HALF) >> 24
