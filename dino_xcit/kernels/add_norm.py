"""Residual addition and the LayerNorm that follows, in one kernel each for forward and backward pass.

The twin is ``x = add_residual(x, branch, scale)`` followed by ``norm(x)``. The residual stream stays in float32; the
branch and the normalised rows have the low precision of the products around them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from dino_xcit.kernels import launchable

ROWS = 4
"""Rows that a program has at once."""
PROGRAMS = 1024
"""Largest number of programs of the backward pass, which sum the gradients of weight and bias over their rows."""


@triton.jit
def add_norm_forward(
    x, branch, scale, weight, bias, total, normed, mean, inverse_std, rows, eps,
    DIM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """total = x + scale * branch, normed = LayerNorm(total), both [T, D]; mean and inverse_std [T]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)
    inside = row < rows
    mask = inside[:, None] & (column < DIM)[None, :]
    at = row.to(tl.int64)[:, None] * DIM + column[None, :]
    added = tl.load(branch + at, mask, 0.0).to(tl.float32) * tl.load(scale + row, inside, 0.0)[:, None]
    values = tl.load(x + at, mask, 0.0) + added
    tl.store(total + at, values, mask)
    average = tl.sum(values, 1) / DIM
    centred = tl.where(mask, values - average[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / DIM + eps)
    gain, offset = tl.load(weight + column, column < DIM, 0.0), tl.load(bias + column, column < DIM, 0.0)
    result = centred * inverse[:, None] * gain[None, :] + offset[None, :]
    tl.store(normed + at, result.to(normed.dtype.element_ty), mask)
    tl.store(mean + row, average, inside)
    tl.store(inverse_std + row, inverse, inside)


@triton.jit
def add_norm_backward(
    grad_total, grad_normed, total, mean, inverse_std, weight, scale, grad_x, grad_branch, grad_norm, rows,
    DIM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """grad_x, grad_branch [T, D]; grad_norm [programs, 2, D]: of weight and bias, to be summed."""
    column = tl.arange(0, PADDED)
    gain = tl.load(weight + column, column < DIM, 0.0)
    sum_weight = tl.zeros((PADDED,), tl.float32)
    sum_bias = tl.zeros((PADDED,), tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < rows
        mask = inside[:, None] & (column < DIM)[None, :]
        at = row.to(tl.int64)[:, None] * DIM + column[None, :]
        inverse = tl.load(inverse_std + row, inside, 0.0)[:, None]
        centred = tl.load(total + at, mask, 0.0) - tl.load(mean + row, inside, 0.0)[:, None]
        unit = tl.where(mask, centred * inverse, 0.0)
        grad = tl.load(grad_normed + at, mask, 0.0).to(tl.float32)
        sum_weight += tl.sum(grad * unit, 0)
        sum_bias += tl.sum(grad, 0)
        grad = grad * gain[None, :]
        along = tl.sum(grad * unit, 1)[:, None] / DIM
        inner = (grad - tl.sum(grad, 1)[:, None] / DIM - unit * along) * inverse
        both = tl.load(grad_total + at, mask, 0.0) + inner
        tl.store(grad_x + at, both, mask)
        of_branch = both * tl.load(scale + row, inside, 0.0)[:, None]
        tl.store(grad_branch + at, of_branch.to(grad_branch.dtype.element_ty), mask)
    partial = grad_norm + tl.program_id(0) * 2 * DIM + column
    tl.store(partial, sum_weight, column < DIM)
    tl.store(partial + DIM, sum_bias, column < DIM)


@triton_op("dino_xcit::add_norm", mutates_args=())
def _add_norm(
    x: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, branch, (rows, dim) = x.contiguous(), branch.contiguous(), x.shape
    total, normed = torch.empty_like(x), torch.empty_like(branch, dtype=dtype)
    mean, inverse_std = x.new_empty(rows), x.new_empty(rows)
    launchable(add_norm_forward)[(triton.cdiv(rows, ROWS),)](
        x, branch, scale, weight, bias, total, normed, mean, inverse_std, rows, eps,
        DIM=dim, PADDED=triton.next_power_of_2(dim), ROWS=ROWS,
    )  # fmt: skip
    return total, normed, mean, inverse_std


@triton_op("dino_xcit::add_norm_backward", mutates_args=())
def _add_norm_backward(
    grad_total: Tensor, grad_normed: Tensor, total: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor,
    scale: Tensor, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, dim = total.shape
    programs = min(PROGRAMS, triton.cdiv(rows, ROWS))
    grad_x, grad_branch = torch.empty_like(total), torch.empty_like(grad_normed, dtype=dtype)
    grad_norm = total.new_empty(programs, 2, dim)
    launchable(add_norm_backward)[(programs,)](
        grad_total, grad_normed, total, mean, inverse_std, weight, scale, grad_x, grad_branch, grad_norm, rows,
        DIM=dim, PADDED=triton.next_power_of_2(dim), ROWS=ROWS,
    )  # fmt: skip
    return grad_x, grad_branch, grad_norm


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, branch, scale, weight, *_ = inputs
    total, _, mean, inverse_std = output
    ctx.set_materialize_grads(False)  # mean and inverse_std have none
    ctx.dtype = branch.dtype
    ctx.save_for_backward(total, mean, inverse_std, weight, scale)


def _backward(ctx: Any, grad_total: Tensor, grad_normed: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grad_x, grad_branch, grad_norm = _add_norm_backward(
        grad_total.contiguous(), grad_normed.contiguous(), *ctx.saved_tensors, ctx.dtype
    )
    return grad_x, grad_branch, None, *grad_norm.sum(dim=0).unbind(), None, None


_add_norm.register_autograd(_backward, setup_context=_keep)


def add_norm(
    x: Tensor, branch: Tensor, scale: Tensor, norm: torch.nn.LayerNorm, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Add a residual branch to the stream, and normalise.

    Args:
        x: [T, D] float32, the residual stream.
        branch: [T, D], any floating dtype.
        scale: [T] float32, stochastic depth's factor of each row of the branch.
        norm: LayerNorm over D.
        dtype: dtype of the second result.

    Returns:
        x + scale * branch, [T, D] float32, and its norm, [T, D].
    """
    return _add_norm(x, branch, scale, norm.weight, norm.bias, norm.eps, dtype)[:2]
