"""Two linear layers with GELU between. D features, M hidden features; T stands for any leading dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dino_xcit.models.precision import folds_layer_scale, product_dtype


class Mlp(nn.Module):
    """[T, D] -> [T, D] over the last dimension."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, layer_scale: Tensor | None = None) -> Tensor:
        """``layer_scale`` [D] multiplies the output, as a part of the second layer."""
        if layer_scale is not None and not folds_layer_scale(x):
            return layer_scale * self(x)
        fc1, fc2 = self.fc1, self.fc2
        x = x.to(product_dtype(x))
        out: Tensor = _Mlp.apply(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, layer_scale)
        return out


class _Mlp(torch.autograd.Function):
    """GELU is computed again in the backward pass: what stays in memory is x and the hidden layer before GELU."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
        layer_scale: Tensor | None,
    ) -> Tensor:
        low = x.dtype
        with torch.autocast(x.device.type, enabled=False):
            hidden = F.linear(x, weight1.to(low), bias1.to(low))
            weight, bias = _scaled(weight2, layer_scale), _scaled(bias2, layer_scale)
            out = F.linear(F.gelu(hidden), weight.to(low), bias.to(low))
        ctx.save_for_backward(x, hidden, weight1, weight2, bias2, layer_scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, weight1, weight2, bias2, layer_scale = ctx.saved_tensors
        low, full = x.dtype, weight1.dtype
        rows = grad.to(low).reshape(-1, grad.shape[-1])
        hidden = hidden.reshape(-1, hidden.shape[-1])
        grad_weight2 = (rows.T @ F.gelu(hidden)).to(full)
        grad_bias2 = rows.sum(dim=0).to(full)
        grad_hidden = torch.ops.aten.gelu_backward(rows @ _scaled(weight2, layer_scale).to(low), hidden)
        grad_scale = None
        if layer_scale is not None:
            grad_scale = (grad_weight2 * weight2).sum(dim=1) + grad_bias2 * bias2
            grad_weight2, grad_bias2 = _scaled(grad_weight2, layer_scale), _scaled(grad_bias2, layer_scale)
        return (
            (grad_hidden @ weight1.to(low)).view_as(x),
            (grad_hidden.T @ x.reshape(-1, x.shape[-1])).to(full),
            grad_hidden.sum(dim=0).to(full),
            grad_weight2,
            grad_bias2,
            grad_scale,
        )


def _scaled(weight: Tensor, layer_scale: Tensor | None) -> Tensor:
    """Each output feature's row of a weight [D, M], or entry of a bias [D], times its LayerScale."""
    if layer_scale is None:
        return weight
    return weight * (layer_scale[:, None] if weight.ndim == 2 else layer_scale)
