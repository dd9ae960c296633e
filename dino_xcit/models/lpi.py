"""Local patch interaction: two depthwise 3x3 convolutions let neighbouring tokens talk (XCiT, arXiv 2106.09681,
section 3.3). B batch, N = h w tokens, D features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dino_xcit.models import batch_norm
from dino_xcit.models.precision import folds_layer_scale, product_dtype


class LPI(nn.Module):
    """[B, N, D] -> [B, N, D]: convolution, GELU, BatchNorm, convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.act = nn.GELU()
        self.bn = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)

    def forward(self, x: Tensor, grid: tuple[int, int], layer_scale: Tensor | None = None) -> Tensor:
        """``layer_scale`` [D] multiplies the output, as a part of the last convolution."""
        if layer_scale is not None and not folds_layer_scale(x):
            return layer_scale * self(x, grid)
        weight: Tensor = self.conv2.weight
        bias: Tensor = self.conv2.bias  # type: ignore[assignment]
        if layer_scale is not None:
            weight, bias = layer_scale[:, None, None, None] * weight, layer_scale * bias
        image = x.transpose(1, 2).unflatten(2, grid)  # a view: [B, N, D] is [B, D, h, w] in channels-last order
        image = self.conv1(image)
        if batch_norm.can_be_recomputed(self.bn):
            low = product_dtype(x)
            image = _GeluNormConv.apply(image, self.bn, self.bn.weight, self.bn.bias, weight.to(low), bias.to(low))
        else:
            image = F.conv2d(self.bn(self.act(image)), weight, bias, padding=1, groups=image.shape[1])
        return image.flatten(2).transpose(1, 2)


class _GeluNormConv(torch.autograd.Function):
    """conv(BatchNorm(GELU(x))), of which x alone stays in memory: all but the convolution is computed again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: nn.BatchNorm2d, gain: Tensor, offset: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        ctx.eps = norm.eps
        ctx.save_for_backward(x, gain, offset, weight)
        return F.conv2d(batch_norm.normalise(norm, F.gelu(x)), weight, bias, padding=1, groups=x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, offset, weight = ctx.saved_tensors
        activated = F.gelu(x)
        normed, mean, inverse_deviation = batch_norm.normalise_again(activated, gain, offset, ctx.eps)
        channels = len(weight)
        grad_normed, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, normed, weight, [channels], [1, 1], [1, 1], [1, 1], False, [0, 0], channels, [True, True, True]
        )
        grad_activated, grad_gain, grad_offset = batch_norm.backward(
            grad_normed, activated, gain, mean, inverse_deviation, ctx.eps
        )
        grad_x = torch.ops.aten.gelu_backward(grad_activated, x)
        return grad_x, None, grad_gain, grad_offset, grad_weight, grad_bias
