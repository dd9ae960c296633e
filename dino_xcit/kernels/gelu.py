"""GELU in the backward pass of an MLP, in one kernel: the activation, its gradient, and the gradient of the bias.

The twin is :func:`dino_xcit.models.fused._gelu_backward`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from dino_xcit.kernels import launchable

ROWS, COLUMNS = 16, 256
"""Size of a tile."""
PROGRAMS = 128
"""Largest number of programs for each block of columns, which sum the gradient of the bias over their rows."""


@triton.jit
def gelu_kernel(
    hidden, grad, activated, grad_hidden, grad_bias, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """activated = GELU(hidden), grad_hidden = grad * GELU'(hidden), [T, M]; grad_bias [programs, M], to be summed."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        x = tl.load(hidden + at, mask, 0.0).to(tl.float32)
        share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)  # the normal distribution function
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        inner = tl.load(grad + at, mask, 0.0).to(tl.float32) * (share + x * density)
        tl.store(activated + at, (x * share).to(activated.dtype.element_ty), mask)
        tl.store(grad_hidden + at, inner.to(grad_hidden.dtype.element_ty), mask)
        total += tl.sum(inner, 0)
    tl.store(grad_bias + tl.program_id(0) * columns + column, total, column < columns)


def gelu_backward(hidden: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return GELU(hidden), the gradient of ``hidden``, and its sums over the rows.

    Args:
        hidden, grad: [T, M]; ``grad`` is the gradient of GELU(hidden).

    Returns:
        [T, M] and [T, M] in the dtype of ``hidden``, and [M] float32.
    """
    activated, grad_hidden, parts = _gelu_backward(hidden, grad)
    return activated, grad_hidden, parts.sum(dim=0)


@triton_op("dino_xcit::gelu_backward", mutates_args=())
def _gelu_backward(hidden: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden, grad, (rows, columns) = hidden.contiguous(), grad.contiguous(), hidden.shape
    programs = min(PROGRAMS, triton.cdiv(rows, ROWS))
    activated, grad_hidden = torch.empty_like(hidden), torch.empty_like(hidden)
    grad_bias = hidden.new_empty(programs, columns, dtype=torch.float32)
    launchable(gelu_kernel)[(programs, triton.cdiv(columns, COLUMNS))](
        hidden, grad, activated, grad_hidden, grad_bias, rows, columns, ROWS=ROWS, COLUMNS=COLUMNS
    )
    return activated, grad_hidden, grad_bias
