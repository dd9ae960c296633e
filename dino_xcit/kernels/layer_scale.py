"""LayerScale folded into the last weights of a layer and rounded, in one kernel each for forward and backward pass.

The twin is :func:`dino_xcit.models.fused.fold_layer_scale`. Without LayerScale the kernels only round.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from dino_xcit.kernels import launchable

COLUMNS = 1024
"""Maximum number of columns that a program loads at once. One program folds one row."""


@triton.jit
def fold_kernel(gamma, weight, bias, folded, folded_bias, columns, COLUMNS: tl.constexpr):
    """folded = gamma * weight [D, C], folded_bias = gamma * bias [D]."""
    row = tl.program_id(0)
    scale = tl.load(gamma + row) if gamma is not None else 1.0
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        at = row * columns + column
        values = scale * tl.load(weight + at, column < columns, 0.0)
        tl.store(folded + at, values.to(folded.dtype.element_ty), column < columns)
    tl.store(folded_bias + row, (scale * tl.load(bias + row)).to(folded_bias.dtype.element_ty))


@triton.jit
def fold_backward_kernel(
    gamma, weight, bias, grad_folded, grad_folded_bias, grad_gamma, grad_weight, grad_bias, columns,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of gamma [D], weight [D, C] and bias [D] from grad_folded [D, C] and grad_folded_bias [D]."""
    row = tl.program_id(0)
    scale = tl.load(gamma + row) if gamma is not None else 1.0
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        at = row * columns + column
        inner = tl.load(grad_folded + at, column < columns, 0.0).to(tl.float32)
        if gamma is not None:
            total += inner * tl.load(weight + at, column < columns, 0.0)
        tl.store(grad_weight + at, scale * inner, column < columns)
    inner_bias = tl.load(grad_folded_bias + row).to(tl.float32)
    if gamma is not None:
        tl.store(grad_gamma + row, tl.sum(total, 0) + inner_bias * tl.load(bias + row))
    tl.store(grad_bias + row, scale * inner_bias)


@triton_op("dino_xcit::fold", mutates_args=())
def fold(gamma: Tensor | None, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return gamma * weight and gamma * bias in ``dtype``.

    Args:
        gamma: [D] float32, LayerScale; None: 1.
        weight: [D, ...] float32.
        bias: [D] float32.
    """
    folded, folded_bias = torch.empty_like(weight, dtype=dtype), torch.empty_like(bias, dtype=dtype)
    columns = weight.numel() // len(weight)
    launchable(fold_kernel)[(len(weight),)](gamma, weight, bias, folded, folded_bias, columns, COLUMNS=_tile(columns))
    return folded, folded_bias


@triton_op("dino_xcit::fold_backward", mutates_args=())
def _fold_backward(
    gamma: Tensor | None, weight: Tensor, bias: Tensor, grad_weight: Tensor, grad_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    columns = weight.numel() // len(weight)
    grads = torch.empty_like(bias), torch.empty_like(weight), torch.empty_like(bias)
    launchable(fold_backward_kernel)[(len(weight),)](
        gamma, weight, bias, grad_weight.contiguous(), grad_bias, *grads, columns, COLUMNS=_tile(columns)
    )
    return grads


def _tile(columns: int) -> int:
    return min(COLUMNS, triton.next_power_of_2(columns))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3])


def fold_backward(
    gamma: Tensor | None, weight: Tensor, bias: Tensor, grad_weight: Tensor, grad_bias: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of gamma, weight and bias from those of the results of :func:`fold`."""
    grad_gamma, *others = _fold_backward(gamma, weight, bias, grad_weight, grad_bias)
    return None if gamma is None else grad_gamma, *others


def _backward(ctx: Any, grad_weight: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:
    gamma, weight, bias = ctx.saved_tensors
    return *fold_backward(gamma, weight, bias, grad_weight, grad_bias), None


fold.register_autograd(_backward, setup_context=_keep)
