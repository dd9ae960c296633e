"""Layers of XCiT with custom backward passes that save memory.

Autograd keeps the output of every operator; these passes keep less and recompute the rest. Within :func:`plain`, and
where a custom pass does not apply, each function runs the same formula in ordinary PyTorch.

B batch, D features, M hidden features, C channels; T stands for any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

aten = torch.ops.aten
_plain = False


@contextmanager
def plain() -> Iterator[None]:
    """Compute all layers in ordinary PyTorch, for tracers and as a reference in tests."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def is_plain() -> bool:
    """Whether :func:`plain` is on."""
    return _plain


# ---- Precision and LayerScale


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer multiplies ``x``: autocast's if enabled, except for float64."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def layer_scaled(gamma: Tensor, layer: Callable[..., Tensor], x: Tensor, *inputs: Any) -> Tensor:
    """LayerScale: ``gamma`` [D] * ``layer(x, *inputs)``, with gamma folded into the last weights of the layer.

    In float16 gamma multiplies the output instead: the folded initial weights (0.02 * 1e-5) would have two bits left.
    """
    if _plain or product_dtype(x) is torch.float16:
        return gamma * layer(x, *inputs)
    return layer(x, *inputs, layer_scale=gamma)


def fold_layer_scale(
    layer_scale: Tensor | None, weight: Tensor, bias: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Multiply weight [D, ...] and bias [D] of a layer by ``layer_scale`` [D] (None: 1), then round to ``dtype``."""
    if layer_scale is None:
        return weight.to(dtype or weight.dtype), bias.to(dtype or bias.dtype)
    if _plain or dtype in (None, weight.dtype):
        return _scale_rows(layer_scale, weight), layer_scale * bias
    return _FoldLayerScale.apply(layer_scale, weight, bias, dtype)


def _scale_rows(scale: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Multiply the rows of weight [D, ...] by ``scale`` [D]; one kernel also for another ``dtype`` of the result."""
    scale = scale.view(-1, *[1] * (weight.ndim - 1))
    return torch.mul(scale, weight, out=torch.empty_like(weight, dtype=dtype)) if dtype else scale * weight


class _FoldLayerScale(torch.autograd.Function):
    """Folds LayerScale and rounds in one kernel each for weight and bias, instead of a product and a cast each."""

    @staticmethod
    def forward(ctx: Any, gamma: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(gamma, weight, bias)
        return _fold(gamma, weight, bias, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weight: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:
        gamma, weight, bias = ctx.saved_tensors
        return *_fold_backward(gamma, weight, bias, grad_weight, grad_bias), None


def _fold(gamma: Tensor | None, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if gamma is None:
        return weight.to(dtype), bias.to(dtype)
    return _scale_rows(gamma, weight, dtype), _scale_rows(gamma, bias, dtype)


def _fold_backward(
    gamma: Tensor | None, weight: Tensor, bias: Tensor, grad_weight: Tensor, grad_bias: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradients of gamma, weight and bias from those of the results of :func:`_fold`."""
    if gamma is None:
        return None, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)
    grad_gamma = (grad_weight * weight).flatten(1).sum(dim=1) + grad_bias * bias
    return grad_gamma, _scale_rows(gamma, grad_weight), gamma * grad_bias


# ---- MLP


def mlp(x: Tensor, fc1: nn.Linear, fc2: nn.Linear, layer_scale: Tensor | None = None, triton: bool = False) -> Tensor:
    """Compute ``fc2(GELU(fc1(x)))``, [T, D] -> [T, D]; for backward it keeps x, the hidden layer
    before GELU, and both weights in the dtype of the products.

    ``triton``: use the kernels of :mod:`dino_xcit.kernels.layer_scale` and :mod:`dino_xcit.kernels.gelu`.
    """
    if _plain:
        return F.linear(F.gelu(fc1(x)), *fold_layer_scale(layer_scale, fc2.weight, fc2.bias))
    return _Mlp.apply(x.to(product_dtype(x)), fc1.weight, fc1.bias, fc2.weight, fc2.bias, layer_scale, triton)


def _mlp_operators(triton: bool) -> tuple[Any, Any, Any]:
    if not triton:
        return _fold, _fold_backward, _gelu_backward
    from dino_xcit.kernels import gelu, layer_scale  # triton is missing on some systems

    return layer_scale.fold, layer_scale.fold_backward, gelu.gelu_backward


def _gelu_backward(hidden: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return GELU(hidden) and the gradients of ``hidden`` [T, M] and of its bias [M]."""
    grad_hidden = aten.gelu_backward(grad, hidden)
    return F.gelu(hidden), grad_hidden, grad_hidden.sum(dim=0)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, gamma: Tensor | None,
        triton: bool,
    ) -> Tensor:  # fmt: skip
        low = x.dtype
        fold, *ctx.operators = _mlp_operators(triton)
        with torch.autocast(x.device.type, enabled=False):
            low1, low2 = fold(None, weight1, bias1, low), fold(gamma, weight2, bias2, low)
            hidden = F.linear(x, *low1)
            out = F.linear(F.gelu(hidden), *low2)
        ctx.save_for_backward(x, hidden, low1[0], low2[0], weight2, bias2, gamma)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, low_weight1, low_weight2, weight2, bias2, gamma = ctx.saved_tensors
        full, (fold_backward, gelu_backward) = weight2.dtype, ctx.operators
        rows = grad.to(x.dtype).reshape(-1, grad.shape[-1])
        hidden = hidden.reshape(-1, hidden.shape[-1])
        activated, grad_hidden, grad_bias1 = gelu_backward(hidden, rows @ low_weight2)
        grads2 = product(rows.T, activated), rows.sum(dim=0)
        del activated  # free it before the next allocations
        grad_gamma, grad_weight2, grad_bias2 = fold_backward(gamma, weight2, bias2, *grads2)
        grad_x = (grad_hidden @ low_weight1).view_as(x)
        grad_weight1 = product(grad_hidden.T, x.reshape(-1, x.shape[-1])).to(full)
        return grad_x, grad_weight1, grad_bias1.to(full), grad_weight2, grad_bias2, grad_gamma, None


def product(a: Tensor, b: Tensor) -> Tensor:
    """Compute a @ b; on a GPU float32 for low precision, without rounding the sums."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


# ---- Stem and LPI: of BatchNorm, GELU and the second convolution, only the input is kept for backward


def norm_gelu(x: Tensor, norm: nn.Module) -> Tensor:
    """Compute ``GELU(norm(x))`` of [B, C, h, w]."""
    if not _can_be_recomputed(norm):
        return F.gelu(norm(x))
    return _NormGelu.apply(x, norm, norm.weight, norm.bias)


def gelu_norm_conv(x: Tensor, norm: nn.Module, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute a depthwise 3x3 convolution of ``norm(GELU(x))``, [B, C, h, w] -> [B, C, h, w]."""
    if not _can_be_recomputed(norm):
        return F.conv2d(norm(F.gelu(x)), weight, bias, padding=1, groups=x.shape[1])
    low = product_dtype(x)
    return _GeluNormConv.apply(x, norm, norm.weight, norm.bias, weight.to(low), bias.to(low))


def _can_be_recomputed(norm: nn.Module) -> bool:
    """Whether ``norm`` is PyTorch's BatchNorm in training mode, with autograd, without torch.compile (which decides on
    recomputation itself)."""
    return (
        not _plain
        and type(norm) is nn.BatchNorm2d
        and norm.training
        and norm.track_running_stats
        and norm.momentum is not None
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def _normalise(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Compute ``norm(x)`` and update its running statistics."""
    norm.num_batches_tracked += 1  # type: ignore[operator,assignment]
    settings = norm.running_mean, norm.running_var, True, norm.momentum, norm.eps
    return torch.native_batch_norm(x, norm.weight, norm.bias, *settings)[0]  # type: ignore[arg-type]


def _normalise_again(x: Tensor, gain: Tensor, offset: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Recompute ``norm(x)`` bit for bit without running statistics; also return mean and 1 / std of the batch."""
    return torch.native_batch_norm(x, gain, offset, None, None, True, 0.0, eps)


def _norm_backward(
    grad: Tensor, x: Tensor, gain: Tensor, mean: Tensor, inverse_std: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, gain and offset."""
    return aten.native_batch_norm_backward(grad, x, gain, None, None, mean, inverse_std, True, eps, [True] * 3)


class _NormGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.BatchNorm2d, gain: Tensor, offset: Tensor) -> Tensor:
        ctx.eps = norm.eps
        ctx.save_for_backward(x, gain, offset)
        return F.gelu(_normalise(norm, x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, offset = ctx.saved_tensors
        normed, mean, inverse_std = _normalise_again(x, gain, offset, ctx.eps)
        grad_normed = aten.gelu_backward(grad, normed)
        del normed  # free it before the next allocation of its size
        grad_x, grad_gain, grad_offset = _norm_backward(grad_normed, x, gain, mean, inverse_std, ctx.eps)
        return grad_x, None, grad_gain, grad_offset


class _GeluNormConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: nn.BatchNorm2d, gain: Tensor, offset: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        ctx.eps = norm.eps
        ctx.save_for_backward(x, gain, offset, weight)
        return F.conv2d(_normalise(norm, F.gelu(x)), weight, bias, padding=1, groups=x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, offset, weight = ctx.saved_tensors
        activated = F.gelu(x)
        normed, mean, inverse_std = _normalise_again(activated, gain, offset, ctx.eps)
        channels = len(weight)
        grad_normed, grad_weight, grad_bias = aten.convolution_backward(
            grad, normed, weight, [channels], [1, 1], [1, 1], [1, 1], False, [0, 0], channels, [True, True, True]
        )
        grad_gelu, grad_gain, grad_offset = _norm_backward(grad_normed, activated, gain, mean, inverse_std, ctx.eps)
        grad_x = aten.gelu_backward(grad_gelu, x)
        return grad_x, None, grad_gain, grad_offset, grad_weight, grad_bias
