"""From pixels to tokens (XCiT, arXiv 2106.09681, section 3.4). B batch, N = h w tokens, D features."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dino_xcit.models import batch_norm


class ConvNorm(nn.Sequential):
    """Bias-free 3x3 convolution of stride 2, then BatchNorm: halves the resolution, rounding up."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )


class ConvPatchEmbed(nn.Module):
    """Images to tokens by log2(patch) stride-2 convolutions, GELU between; widths double up to D."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        stages = int(math.log2(patch_size))
        widths = [3] + [dim >> (stages - 1 - stage) for stage in range(stages)]
        layers: list[nn.Module] = []
        for narrow, wide in pairwise(widths):
            layers += [ConvNorm(narrow, wide), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """[B, 3, height, width] -> [B, N, D] and (h, w)."""
        x = images.contiguous(memory_format=torch.channels_last)
        *stages, last = (layer for layer in self.proj if isinstance(layer, ConvNorm))
        for convolution, norm in stages:
            x = convolution(x)
            if batch_norm.can_be_recomputed(norm):
                x = _NormGelu.apply(x, norm, norm.weight, norm.bias)
            else:
                x = F.gelu(norm(x))
        x = last(x)
        return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])


class _NormGelu(torch.autograd.Function):
    """GELU(BatchNorm(x)), of which x alone stays in memory: the largest maps of the network are here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.BatchNorm2d, gain: Tensor, offset: Tensor) -> Tensor:
        ctx.eps = norm.eps
        ctx.save_for_backward(x, gain, offset)
        return F.gelu(batch_norm.normalise(norm, x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, offset = ctx.saved_tensors
        normed, mean, inverse_deviation = batch_norm.normalise_again(x, gain, offset, ctx.eps)
        grad_normed = torch.ops.aten.gelu_backward(grad, normed)
        del normed
        grad_x, grad_gain, grad_offset = batch_norm.backward(grad_normed, x, gain, mean, inverse_deviation, ctx.eps)
        return grad_x, None, grad_gain, grad_offset
