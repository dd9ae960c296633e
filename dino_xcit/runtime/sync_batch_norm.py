"""BatchNorm over the batches of all ranks without host synchronisation. R ranks, C channels.

``torch.nn.SyncBatchNorm`` computes the same on CUDA. To support empty batches, it synchronises with the device in each
layer and forward pass (pytorch#78549). Here all ranks have batches of the same size, so no synchronisation is needed.
It also runs on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import counted

# PyTorch 2.14 renamed it, and the old name warns.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class SyncBatchNorm(_BatchNorm):
    """BatchNorm of [B, C, ...] whose training mean and variance are over the inputs of all ranks.

    Every rank must call it with an input of the same shape. One collective in the forward pass, one in the backward.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input has {input.dim()} dimensions, expected at least 2: [B, C, ...]")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        output, mean, variance = _Normalise.apply(input, self.weight, self.bias, self.eps)
        assert self.momentum is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        count = _count(input)
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((variance * (count / (count - 1))).to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked += 1
        return output


class SyncBatchNormAct(SyncBatchNorm):
    """Synchronised version of timm's BatchNormAct2d: normalisation, then drop layer and activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.act(self.drop(super().forward(input)))
        return output


def convert_sync_batch_norm(module: nn.Module) -> nn.Module:
    """Convert the BatchNorm layers of a module to :class:`SyncBatchNorm` in place; tensors, names and hooks are kept.

    timm's BatchNormAct2d keeps its activation, which ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` drops. Other
    subclasses of BatchNorm and layers without running statistics are not converted.
    """
    from timm.layers.norm_act import BatchNormAct2d  # slow to import

    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    for part in module.modules():
        if isinstance(part, _BatchNorm) and part.affine and part.track_running_stats and part.momentum is not None:
            if type(part) in plain:
                part.__class__ = SyncBatchNorm
            elif type(part) is BatchNormAct2d:
                part.__class__ = SyncBatchNormAct  # type: ignore[assignment]
    return module


def synchronise_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Convert the module to :class:`SyncBatchNorm` on several GPUs; return it unchanged otherwise.

    On the CPU it is unchanged, so that the result does not depend on the number of ranks at a fixed microbatch.
    """
    if device.type != "cuda" or not dist.is_initialized() or dist.get_world_size() == 1:
        return module
    module = convert_sync_batch_norm(module)
    parts = module.named_modules()
    if left := [name for name, part in parts if isinstance(part, _BatchNorm) and not isinstance(part, SyncBatchNorm)]:
        some = ", ".join(left[:3]) + " ..." * (len(left) > 3)
        log.warn_once(  # student and teacher have the same layers
            f"{counted(len(left), 'BatchNorm layer')} of this network ({some}) cannot be synchronised: they use the "
            "statistics of each GPU's own batch"
        )
    return module


def _count(x: Tensor) -> int:
    """Return the number of values per channel over all ranks."""
    return x.numel() // x.shape[1] * dist.get_world_size()


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias over all ranks; also returns mean and variance [C]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        # PyTorch's kernels accumulate low precision in float32 and take any memory layout without a copy.
        unchanged = torch.zeros_like(weight), torch.ones_like(weight)  # select the accumulation dtype on the CPU
        own_mean, own_variance = torch.batch_norm_update_stats(x, *unchanged, 0.0)
        rows = own_mean.new_empty(dist.get_world_size(), 2, len(own_mean))
        _all_gather(rows, torch.stack([own_mean, own_variance])[None])
        means, variances = rows.unbind(1)  # [R, C]
        mean = means.mean(dim=0)
        variance = variances.mean(dim=0) + (means - mean).square().mean(dim=0)
        output = torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return output, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of x: g - sum(g) / n - y sum(g y) / n, with y the normalised x, n the number of values per channel,
        g the output gradient times weight / sqrt(var + eps), and sums over all ranks."""
        x, weight, mean, variance = ctx.saved_tensors
        scale = (variance + ctx.eps).rsqrt()
        # Treat mean and variance as constants. Passed twice: CUDA's channels-last kernels read the second pair.
        of_x, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, variance, mean, scale, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([of_bias, of_weight]).to(mean.dtype)
        dist.all_reduce(sums)
        of_bias_everywhere, of_weight_everywhere = sums / _count(x)
        slope = -weight * scale.square() * of_weight_everywhere
        offset = -weight * scale * of_bias_everywhere - slope * mean
        shape = [1, -1] + [1] * (x.dim() - 2)
        return of_x.addcmul_(x, slope.view(shape)).add_(offset.view(shape)), of_weight, of_bias, None
