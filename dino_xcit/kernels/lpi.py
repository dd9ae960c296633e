"""Local patch interaction: three kernels for the forward pass of each crop size, and three for the backward pass.

The twin is ``LPI.forward`` in :mod:`dino_xcit.models.xcit`: a depthwise 3x3 convolution, then
:func:`dino_xcit.models.fused.gelu_norm_conv`. A program has a block of channels and a run of consecutive tokens, whose
neighbours stay in the cache. Of the activations, only the input and the output of the first convolution are kept for
backward. Sums over tokens are float32, first of each program, then of all.

T tokens of images of grid (h, w), D channels, P programs that share the tokens; within a kernel N tokens and C channels
per tile. Tap k of a convolution is element (k // 3, k % 3) of its 3x3 weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.library import triton_op

from dino_xcit.kernels import launchable
from dino_xcit.models.sizes import Sizes
from dino_xcit.runtime.sync_batch_norm import SyncBatchNorm

TILE, CHANNELS, WARPS = 8, 64, 4
"""Tokens and channels per tile, and warps: 4 values per thread, so that the sums of 9 taps fit into registers."""
PROGRAMS = 1024
"""Largest number of programs of a kernel: P times the blocks of channels."""


# ---- Parts of kernels


@triton.jit
def _channels(dim, CHANNELS: tl.constexpr):
    """The channels of this program [C], and which of them exist."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    return channel, channel < dim


@triton.jit
def _tile(start, tokens, dim, channel, own, TILE: tl.constexpr):
    """The tokens from ``start`` [N], their offsets [N, C], and which of these exist."""
    token = start + tl.arange(0, TILE)
    return token, token.to(tl.int64)[:, None] * dim + channel[None, :], (token < tokens)[:, None] & own[None, :]


@triton.jit
def _row(source, channel, own):
    """Values of the channels [1, C] as float32."""
    return tl.load(source + channel, own, 0.0).to(tl.float32)[None, :]


@triton.jit
def _weights(weight, channel, own):
    """The rows [1, C] of the 9 taps from weights [D, 1, 3, 3]."""
    return [_row(weight + k, channel * 9, own) for k in (0, 1, 2, 3, 4, 5, 6, 7, 8)]


@triton.jit
def _neighbour(source, token, at, mask, height, width, dim, k: tl.constexpr):
    """Values under tap k [N, C] as float32, 0 outside the image, and which are inside."""
    down: tl.constexpr = k // 3 - 1
    right: tl.constexpr = k % 3 - 1
    row, column = token // width % height + down, token % width + right
    inside = mask & ((row >= 0) & (row < height) & (column >= 0) & (column < width))[:, None]
    return tl.load(source + at + (down * width + right) * dim, inside, 0.0).to(tl.float32), inside


@triton.jit
def _transposed(grad, token, at, mask, height, width, dim, weights):
    """Gradient of a convolution's input [N, C]; the gradient of the output that each of the 9 taps leads to."""
    grads = [_neighbour(grad, token, at, mask, height, width, dim, 8 - k)[0] for k in (0, 1, 2, 3, 4, 5, 6, 7, 8)]
    total = weights[0] * grads[0]
    for k in tl.static_range(1, 9):
        total += weights[k] * grads[k]
    return total, grads


@triton.jit
def _zeros(TILE: tl.constexpr, CHANNELS: tl.constexpr):
    """The sums for 9 taps, each [N, C]: the sum over N is left to the end of the loop."""
    return [tl.zeros((TILE, CHANNELS), tl.float32) for _ in (0, 1, 2, 3, 4, 5, 6, 7, 8)]


@triton.jit
def _add(sums, value, grads):
    return [sums[k] + value * grads[k] for k in (0, 1, 2, 3, 4, 5, 6, 7, 8)]


@triton.jit
def _store_sums(target, channel, own, dim, sums, bias):
    """Store the gradients of a convolution's weights [D, 9] and bias [D]."""
    for k in tl.static_range(9):
        tl.store(target + channel * 9 + k, tl.sum(sums[k], 0), own)
    tl.store(target + 9 * dim + channel, tl.sum(bias, 0), own)


@triton.jit
def _gelu(c1):
    """GELU of a tile, rounded to its dtype, and the derivative, both as float32."""
    wide = c1.to(tl.float32)
    below = 0.5 * (1.0 + tl.erf(wide * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * wide * wide)
    return (wide * below).to(c1.dtype).to(tl.float32), below + wide * density


# ---- Kernels


@triton.jit
def lpi_conv1(
    x, weight, bias, c1, activated, partial, tokens, height, width, dim, run,
    TILE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """c1 = conv(x), activated = GELU(c1), both [T, D]; sums of activated - GELU(bias) and of its squares, partial
    [P, 2, D]: the variance of small differences from a large mean would cancel."""
    channel, own = _channels(dim, CHANNELS)
    weights, offset = _weights(weight, channel, own), _row(bias, channel, own)
    shift = _gelu(offset)[0]
    total = tl.zeros((TILE, CHANNELS), tl.float32)
    squares = tl.zeros((TILE, CHANNELS), tl.float32)
    first = tl.program_id(1) * run
    for start in range(first, tl.minimum(first + run, tokens), TILE):
        token, at, mask = _tile(start, tokens, dim, channel, own, TILE)
        out = tl.zeros((TILE, CHANNELS), tl.float32) + offset
        for k in tl.static_range(9):
            value, _ = _neighbour(x, token, at, mask, height, width, dim, k)
            out += weights[k] * value
        low = out.to(c1.dtype.element_ty)
        value, _ = _gelu(low)  # of the rounded c1, which the backward pass reads
        tl.store(c1 + at, low, mask)
        tl.store(activated + at, value.to(activated.dtype.element_ty), mask)
        value = tl.where(mask, value - shift, 0.0)
        total += value
        squares += value * value
    target = partial + tl.program_id(1) * 2 * dim + channel
    tl.store(target, tl.sum(total, 0), own)
    tl.store(target + dim, tl.sum(squares, 0), own)


@triton.jit
def lpi_statistics(
    partial, bias, mean, inverse_std, running_mean, running_var, batches, rows, dim, one_in, unbiased, momentum, eps,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """partial [P, 2, D] -> mean, inverse_std [D]. one_in: 1 / count; unbiased: count / (count - 1)."""
    channel, own = _channels(dim, CHANNELS)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    squares = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(0, rows, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        source, mask = partial + row * 2 * dim + channel[None, :], (row < rows) & own[None, :]
        total += tl.load(source, mask, 0.0)
        squares += tl.load(source + dim, mask, 0.0)
    shifted = tl.sum(total, 0) * one_in
    variance = tl.maximum(tl.sum(squares, 0) * one_in - shifted * shifted, 0.0)
    shift = _gelu(tl.load(bias + channel, own, 0.0))[0]
    average = shifted + shift
    tl.store(mean + channel, average, own)
    tl.store(inverse_std + channel, 1.0 / tl.sqrt(variance + eps), own)
    old_mean, old_var = tl.load(running_mean + channel, own), tl.load(running_var + channel, own)
    tl.store(running_mean + channel, old_mean + momentum * (average - old_mean), own)
    tl.store(running_var + channel, old_var + momentum * (variance * unbiased - old_var), own)
    if tl.program_id(0) == 0:
        tl.store(batches, tl.load(batches) + 1)


@triton.jit
def lpi_conv2(
    activated, mean, inverse_std, gain, offset, weight, bias, out, tokens, height, width, dim, run,
    TILE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out = conv(norm(activated)) [T, D]."""
    channel, own = _channels(dim, CHANNELS)
    weights, constant = _weights(weight, channel, own), _row(bias, channel, own)
    scale = _row(inverse_std, channel, own) * _row(gain, channel, own)
    shift = _row(offset, channel, own) - _row(mean, channel, own) * scale
    first = tl.program_id(1) * run
    for start in range(first, tl.minimum(first + run, tokens), TILE):
        token, at, mask = _tile(start, tokens, dim, channel, own, TILE)
        total = tl.zeros((TILE, CHANNELS), tl.float32) + constant
        for k in tl.static_range(9):
            value, inside = _neighbour(activated, token, at, mask, height, width, dim, k)
            total += weights[k] * tl.where(inside, value * scale + shift, 0.0)  # pads the norm's output
        tl.store(out + at, total.to(out.dtype.element_ty), mask)


@triton.jit
def lpi_backward_sums(
    grad, c1, mean, inverse_std, gain, offset, weight, partial, tokens, height, width, dim, run,
    TILE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """grad [T, D] -> gradients of conv2 (10 D), then of the norm's offset and gain (D each), partial [P, 12 D]."""
    channel, own = _channels(dim, CHANNELS)
    weights = _weights(weight, channel, own)
    average, inverse = _row(mean, channel, own), _row(inverse_std, channel, own)
    scale, shift = _row(gain, channel, own), _row(offset, channel, own)
    sums = _zeros(TILE, CHANNELS)
    sum_grad = tl.zeros((TILE, CHANNELS), tl.float32)
    sum_normed = tl.zeros((TILE, CHANNELS), tl.float32)
    sum_along = tl.zeros((TILE, CHANNELS), tl.float32)
    first = tl.program_id(1) * run
    for start in range(first, tl.minimum(first + run, tokens), TILE):
        token, at, mask = _tile(start, tokens, dim, channel, own, TILE)
        value, _ = _gelu(tl.load(c1 + at, mask, 0.0))
        unit = (value - average) * inverse
        grad_normed, grads = _transposed(grad, token, at, mask, height, width, dim, weights)
        sums = _add(sums, unit * scale + shift, grads)
        sum_grad += grads[4]
        sum_normed += grad_normed
        sum_along += grad_normed * unit
    target = partial + tl.program_id(1) * 12 * dim
    _store_sums(target, channel, own, dim, sums, sum_grad)
    tl.store(target + 10 * dim + channel, tl.sum(sum_normed, 0), own)
    tl.store(target + 11 * dim + channel, tl.sum(sum_along, 0), own)


@triton.jit
def lpi_backward_norm(
    grad, c1, mean, inverse_std, gain, weight, sums, grad_c1, one_in, tokens, height, width, dim, run,
    TILE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """grad [T, D], sums [2, D] of the norm's gradients over all ranks -> grad_c1 [T, D]. one_in: 1 / count."""
    channel, own = _channels(dim, CHANNELS)
    weights = _weights(weight, channel, own)
    average, inverse = _row(mean, channel, own), _row(inverse_std, channel, own)
    scale = _row(gain, channel, own) * inverse
    mean_normed, mean_along = _row(sums, channel, own) * one_in, _row(sums + dim, channel, own) * one_in
    first = tl.program_id(1) * run
    for start in range(first, tl.minimum(first + run, tokens), TILE):
        token, at, mask = _tile(start, tokens, dim, channel, own, TILE)
        value, derivative = _gelu(tl.load(c1 + at, mask, 0.0))
        unit = (value - average) * inverse
        grad_normed, _ = _transposed(grad, token, at, mask, height, width, dim, weights)
        result = (grad_normed - mean_normed - unit * mean_along) * scale * derivative
        tl.store(grad_c1 + at, result.to(grad_c1.dtype.element_ty), mask)


@triton.jit
def lpi_backward_conv1(
    grad_c1, x, weight, grad_x, partial, tokens, height, width, dim, run,
    TILE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """grad_c1 [T, D] -> grad_x [T, D]; the gradients of conv1, partial [P, 10 D]."""
    channel, own = _channels(dim, CHANNELS)
    weights = _weights(weight, channel, own)
    sums = _zeros(TILE, CHANNELS)
    sum_grad = tl.zeros((TILE, CHANNELS), tl.float32)
    first = tl.program_id(1) * run
    for start in range(first, tl.minimum(first + run, tokens), TILE):
        token, at, mask = _tile(start, tokens, dim, channel, own, TILE)
        value = tl.load(x + at, mask, 0.0).to(tl.float32)
        result, grads = _transposed(grad_c1, token, at, mask, height, width, dim, weights)
        tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask)
        sums = _add(sums, value, grads)
        sum_grad += grads[4]
    _store_sums(partial + tl.program_id(1) * 10 * dim, channel, own, dim, sums, sum_grad)


# ---- Operators


def _share(x: Tensor) -> tuple[int, int]:
    """Return P and the tokens of each program, for tokens x [T, D]."""
    tokens, dim = x.shape
    most = max(1, PROGRAMS // triton.cdiv(dim, CHANNELS))
    run = triton.cdiv(triton.cdiv(tokens, TILE), most) * TILE
    return triton.cdiv(tokens, run), run


def _launch(kernel: Any, x: Tensor, grid: tuple[int, int], *arguments: Any) -> None:
    (tokens, dim), (programs, run) = x.shape, _share(x)
    launchable(kernel)[(triton.cdiv(dim, CHANNELS), programs)](
        *arguments, tokens, *grid, dim, run, TILE=TILE, CHANNELS=CHANNELS, num_warps=WARPS
    )


def _partial(x: Tensor, rows: int) -> Tensor:
    return x.new_empty(_share(x)[0], rows * x.shape[1], dtype=torch.float32)


@triton_op("dino_xcit::lpi_conv1", mutates_args=())
def _conv1(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return c1, GELU(c1), and the sums [P, 2 D] of GELU(c1) - GELU(bias) and of its squares."""
    c1, activated, partial = torch.empty_like(x), torch.empty_like(x), _partial(x, 2)
    _launch(lpi_conv1, x, (height, width), x, weight, bias, c1, activated, partial)
    return c1, activated, partial


@triton_op("dino_xcit::lpi_norm_conv2", mutates_args=("running_mean", "running_var", "batches", "out"))
def _norm_conv2(
    activated: Tensor, partial: Tensor, bias1: Tensor, running_mean: Tensor, running_var: Tensor, batches: Tensor,
    gain: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, out: Tensor, height: int, width: int, count: int,
    momentum: float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Set ``out``, update the running statistics, and return mean and 1 / std of ``count`` values per channel."""
    dim, block = len(gain), 16
    mean, inverse_std = torch.empty_like(gain), torch.empty_like(gain)
    launchable(lpi_statistics)[(triton.cdiv(dim, block),)](
        partial, bias1, mean, inverse_std, running_mean, running_var, batches, len(partial), dim,
        1 / count, count / (count - 1), momentum, eps, ROWS=64, CHANNELS=block,
    )  # fmt: skip
    arguments = activated, mean, inverse_std, gain, offset, weight, bias, out
    _launch(lpi_conv2, out, (height, width), *arguments)
    return mean, inverse_std


@triton_op("dino_xcit::lpi_backward_sums", mutates_args=())
def _backward_sums(
    grad: Tensor, c1: Tensor, mean: Tensor, inverse_std: Tensor, gain: Tensor, offset: Tensor, weight: Tensor,
    height: int, width: int,
) -> Tensor:  # fmt: skip
    """Return the gradients [P, 12 D] of conv2 and of the norm's offset and gain."""
    partial = _partial(c1, 12)
    arguments = grad, c1, mean, inverse_std, gain, offset, weight, partial
    _launch(lpi_backward_sums, c1, (height, width), *arguments)
    return partial


@triton_op("dino_xcit::lpi_backward", mutates_args=("grad_x",))
def _backward(
    grad: Tensor, x: Tensor, c1: Tensor, mean: Tensor, inverse_std: Tensor, weight1: Tensor, gain: Tensor,
    weight2: Tensor, sums: Tensor, grad_x: Tensor, height: int, width: int, count: int,
) -> Tensor:  # fmt: skip
    """Set ``grad_x``; return the gradients of conv1 [P, 10 D]. ``sums`` [2 D]: the norm's gradients over all ranks."""
    grad_c1, partial = torch.empty_like(x), _partial(x, 10)
    arguments = grad, c1, mean, inverse_std, gain, weight2, sums, grad_c1, 1 / count
    _launch(lpi_backward_norm, x, (height, width), *arguments)
    _launch(lpi_backward_conv1, x, (height, width), grad_c1, x, weight1, grad_x, partial)
    return partial


class _Lpi(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sizes: Sizes, norm: Any, weight1: Tensor, bias1: Tensor, gain: Tensor, offset: Tensor,
        weight2: Tensor, bias2: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.ranks = dist.get_world_size() if isinstance(norm, SyncBatchNorm) and dist.is_initialized() else 1
        ctx.sizes, out, kept = sizes, torch.empty_like(x), []
        running = norm.running_mean, norm.running_var, norm.num_batches_tracked
        for grid, part, target in _by_size(sizes, x, out):
            if ctx.ranks * len(part) == 1:
                raise ValueError("expected more than 1 value per channel when training, as BatchNorm does")
            c1, activated, partial = _conv1(part, weight1, bias1, *grid)
            if ctx.ranks > 1:
                partial = partial.sum(dim=0, keepdim=True)
                dist.all_reduce(partial)
            parameters, last = (gain, offset, weight2, bias2), (ctx.ranks * len(part), norm.momentum, norm.eps)
            kept += [c1, *_norm_conv2(activated, partial, bias1, *running, *parameters, target, *grid, *last)]
        ctx.save_for_backward(x, weight1, gain, offset, weight2, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """As in SyncBatchNorm, only the sums for the gradient of c1 are over all ranks."""
        x, weight1, gain, offset, weight2, *kept = ctx.saved_tensors
        grad_x, dim, of_conv1, of_others = torch.empty_like(x), len(gain), [], []
        by_size = _by_size(ctx.sizes, x, grad.contiguous(), grad_x)
        for (grid, part, grad_part, target), saved in zip(by_size, zip(*[iter(kept)] * 3, strict=True), strict=True):
            sums = _backward_sums(grad_part, *saved, gain, offset, weight2, *grid).sum(dim=0)
            everywhere = sums[10 * dim :]
            if ctx.ranks > 1:
                everywhere = everywhere.clone()
                dist.all_reduce(everywhere)
            last = weight1, gain, weight2, everywhere, target, *grid, ctx.ranks * len(part)
            of_conv1.append(_backward(grad_part, part, *saved, *last).sum(dim=0))
            of_others.append(sums)
        of_conv2, of_offset, of_gain = sum(of_others[1:], of_others[0]).split([10 * dim, dim, dim])
        first = _weight_and_bias(sum(of_conv1[1:], of_conv1[0]), weight1)
        second = _weight_and_bias(of_conv2.to(weight2.dtype), weight2)
        return grad_x, None, None, *first, of_gain, of_offset, *second


def _weight_and_bias(sums: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return sums[: weight.numel()].view_as(weight), sums[weight.numel() :]


def _by_size(sizes: Sizes, *tensors: Tensor) -> Iterator[Any]:
    """Yield the grid and the rows of each of ``tensors`` [T, D] for each crop size."""
    counts = [images * height * width for images, (height, width) in sizes]
    return zip([grid for _, grid in sizes], *(one.split(counts) for one in tensors), strict=True)


def lpi(x: Tensor, sizes: Sizes, conv1: nn.Conv2d, norm: nn.Module, weight2: Tensor, bias2: Tensor) -> Tensor:
    """Compute conv2(norm(GELU(conv1(x)))) in training mode, and update the running statistics of ``norm``.

    Args:
        x: [T, D] bfloat16, float16 or float32, the tokens of crops of ``sizes``.
        sizes: crop sizes; each has its own statistics.
        conv1: depthwise 3x3 convolution with float32 parameters.
        norm: BatchNorm with float32 parameters and running statistics with a momentum; its statistics are over all
            ranks if it is a :class:`dino_xcit.runtime.sync_batch_norm.SyncBatchNorm`.
        weight2, bias2: [D, 1, 3, 3] and [D] of one floating dtype, of the second convolution.

    Returns:
        [T, D] in the dtype of ``x``.
    """
    parameters = conv1.weight, conv1.bias, norm.weight, norm.bias, weight2, bias2
    out: Tensor = _Lpi.apply(x.contiguous(), sizes, norm, *parameters)
    return out
