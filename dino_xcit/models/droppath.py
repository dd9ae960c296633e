"""Stochastic depth as a function of a key per sample, without generator state. B batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def hash_bits(keys: Tensor) -> Tensor:
    """Mix int64 ``keys`` of any shape into int64 values whose low 24 bits are uniform.

    The finaliser of MurmurHash3 (Appleby, public domain) on 32-bit values in int64, so that all devices compute the
    same bits.
    """
    word = 0xFFFFFFFF
    # Mix the high word first: keys are often (epoch << 32) + image, and a plain xor would give image 5 of epoch 0 the
    # bits of image 4 of epoch 1.
    bits = (keys ^ ((keys >> 32) * 0x9E3779B1)) & word
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & word
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & word
    return bits ^ (bits >> 16)


def residual_scales(keys: Tensor, branches: int, rate: float) -> Tensor:
    """Return the scale of each residual branch of each sample: 0 if dropped, 1 / (1 - rate) if kept.

    Args:
        keys: [B] int64, one per sample; equal keys give equal scales on any device, rank or batch position.
        branches: number of residual branches.
        rate: drop probability, 0 <= rate < 1.

    Returns:
        [branches, B, 1, 1] float32.
    """
    branch = torch.arange(1, branches + 1, device=keys.device, dtype=torch.int64)
    mixed = hash_bits(hash_bits(keys)[None, :] + branch[:, None] * 0x9E3779B1)
    uniform = (mixed & 0xFFFFFF).to(torch.float32) / float(1 << 24)
    return ((uniform >= rate).to(torch.float32) / (1.0 - rate))[:, :, None, None]


class DropPathMask(NamedTuple):
    """Stochastic depth of one residual branch."""

    scale: Tensor
    """[B, 1, 1], from :func:`residual_scales`; [T, 1] for the tokens of several crop sizes."""
    rows: Tensor | None
    """Indices of the samples that keep the branch, on the CPU; None on devices where reading them would synchronise."""


def drop_path_masks(scales: Tensor, subset: bool) -> list[DropPathMask]:
    """Return one mask per branch of ``scales`` [branches, B, 1, 1]; ``subset`` sets ``rows`` on the CPU."""
    subset = subset and scales.device.type == "cpu"
    return [DropPathMask(scale, scale.flatten().nonzero().flatten() if subset else None) for scale in scales]


def add_residual(
    x: Tensor, branch: Callable[[Tensor], Tensor], mask: DropPathMask | None, independent: bool = True
) -> Tensor:
    """Compute x + branch(x) with stochastic depth.

    If ``mask.rows`` is set and samples are independent in the branch (no BatchNorm), it runs on kept samples only.
    """
    if mask is None:
        return x + branch(x)
    if mask.rows is None or not independent:
        return add_scaled(x, branch(x), mask.scale) if x.is_cuda else x + mask.scale * branch(x)
    kept = branch(x.index_select(0, mask.rows))
    return x.index_add(0, mask.rows, mask.scale[mask.rows] * kept)


def add_scaled(x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
    """Compute x + scale * branch in the dtype of x, with few passes over memory."""
    added: Tensor = _AddScaled.apply(x, branch, scale)
    return added


class _AddScaled(torch.autograd.Function):
    """x + scale * branch without intermediate tensors in the precision of x, to save memory traffic on GPUs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.dtype = branch.dtype
        with torch.autocast(x.device.type, enabled=False):  # autocast would copy the branch to the dtype of x
            return torch.addcmul(x, branch, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (scale,) = ctx.saved_tensors
        return grad, torch.mul(grad, scale, out=torch.empty_like(grad, dtype=ctx.dtype)), None
