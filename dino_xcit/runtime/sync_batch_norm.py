"""BatchNorm over the batches of all ranks without host synchronisation. R ranks, C channels.

``torch.nn.SyncBatchNorm`` calls the same CUDA kernels, but waits for the device in each layer and forward pass to
support empty batches (pytorch#78549). Here all ranks have batches of the same size, so nothing waits. In training mode
the layer needs CUDA tensors.
"""

from __future__ import annotations

from functools import lru_cache
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
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        running = self.running_mean, self.running_var
        output: Tensor = _Normalise.apply(input, self.weight, self.bias, *running, self.momentum, self.eps)
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


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias over all ranks; updates the running statistics [C]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, momentum: float, eps: float
    ) -> Tensor:
        x = _dense(x)
        own = torch.stack(torch.batch_norm_stats(x, eps))  # [2, C]: mean and 1 / sqrt(var + eps)
        rows = own.new_empty(dist.get_world_size(), *own.shape)
        _all_gather(rows, own[None])
        counts_of = _counts.__wrapped__ if torch.compiler.is_compiling() else _counts  # Dynamo warns about lru_cache
        counts, as_integers = counts_of(len(rows), x.numel() // x.shape[1], mean.dtype, x.device)
        means, scales = rows.unbind(1)  # [R, C]
        statistics = torch.batch_norm_gather_stats_with_counts(x, means, scales, mean, var, momentum, eps, counts)
        ctx.save_for_backward(x, weight, *statistics, as_integers)
        return torch.batch_norm_elemt(x, weight, bias, *statistics, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """DDP averages the gradients of weight and bias, so only the sums for the gradient of x are over all ranks."""
        x, weight, mean, scale, counts = ctx.saved_tensors
        gradient = _dense(gradient)
        *sums, of_weight, of_bias = torch.batch_norm_backward_reduce(gradient, x, mean, scale, weight, True, True, True)
        everywhere = torch.stack(sums)  # [2, C]: sums of g and of g (x - mean), g the gradient of the output
        dist.all_reduce(everywhere)
        of_x = torch.ops.aten.batch_norm_backward_elemt(gradient, x, mean, scale, weight, *everywhere.unbind(), counts)
        return of_x, of_weight, of_bias, None, None, None, None


@lru_cache
def _counts(ranks: int, count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the values per channel on each rank [R], in ``dtype`` for the forward kernel and as int for the other."""
    counts = torch.full((ranks,), count, dtype=dtype, device=device)
    return counts, counts.int()


def _dense(x: Tensor) -> Tensor:
    """Return x in a layout that the kernels support."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
