"""CPU stand-ins for the CUDA kernels of synchronised BatchNorm."""

from __future__ import annotations

import torch
from torch import Tensor

# The library object keeps the kernels registered as long as the process lives.
LIBRARY = torch.library.Library("aten", "IMPL", "CPU")


def _over_channels(x: Tensor) -> list[int]:
    return [dimension for dimension in range(x.dim()) if dimension != 1]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))


def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(_wide(x), _over_channels(x), correction=0)
    return mean, (variance + eps).rsqrt()


def batch_norm_gather_stats_with_counts(
    x: Tensor, mean: Tensor, scale: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert counts.dtype == running_mean.dtype, "the CUDA kernel reads both as one dtype"
    share = (counts / counts.sum())[:, None].to(mean.dtype)
    total = (share * mean).sum(0)
    variance = (share * (scale.pow(-2) - eps + (mean - total).square())).sum(0)
    count = counts.sum()
    running_mean.lerp_(total.to(running_mean.dtype), momentum)
    running_var.lerp_((variance * count / (count - 1)).to(running_var.dtype), momentum)
    return total, (variance + eps).rsqrt()


def batch_norm_elemt(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor, eps: float) -> Tensor:
    found = (_wide(x) - _per_channel(mean, x)) * _per_channel(scale * weight, x) + _per_channel(bias, x)
    return found.to(x.dtype)


def batch_norm_backward_reduce(
    gradient: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, *_: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide, centered = _wide(gradient), _wide(x) - _per_channel(mean, x)
    total, product = wide.sum(_over_channels(x)), (wide * centered).sum(_over_channels(x))
    return total, product, (product * scale).to(weight.dtype), total.to(weight.dtype)


def batch_norm_backward_elemt(
    gradient: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, total: Tensor, product: Tensor,
    counts: Tensor,
) -> Tensor:  # fmt: skip
    assert counts.dtype == torch.int32
    count = counts.sum()
    centered = _wide(x) - _per_channel(mean, x)
    found = _wide(gradient) - _per_channel(total / count, x) - centered * _per_channel(product / count * scale**2, x)
    return (found * _per_channel(scale * weight, x)).to(x.dtype)


for kernel in (
    batch_norm_stats,
    batch_norm_gather_stats_with_counts,
    batch_norm_elemt,
    batch_norm_backward_reduce,
    batch_norm_backward_elemt,
):
    LIBRARY.impl(kernel.__name__, kernel)
