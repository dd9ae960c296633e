"""Stochastic depth whose coins depend on (seed, step, sample) and on nothing else. B batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def hash_bits(keys: Tensor) -> Tensor:
    """Mix int64 ``keys`` of any shape into int64 values whose low 24 bits are uniform.

    Two rounds of multiply and xor-shift, the finaliser of MurmurHash3 (Appleby, public domain), on 32-bit values kept
    in int64 so that every device computes the same bits.
    """
    mask = 0xFFFFFFFF
    # The high word is spread first: keys are often (epoch << 32) + image, and a plain xor would give image 5 of epoch 0
    # the bits of image 4 of epoch 1.
    bits = (keys ^ ((keys >> 32) * 0x9E3779B1)) & mask
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & mask
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & mask
    return bits ^ (bits >> 16)


def residual_scales(keys: Tensor, branches: int, rate: float) -> Tensor:
    """What to multiply each residual branch of each sample with: 0 where it is dropped, 1 / (1 - rate) where kept.

    Args:
        keys: [B] int64, one a sample; equal keys give equal coins on any device, rank or batch position.
        branches: how many residual branches need a coin.
        rate: probability of dropping one, 0 <= rate < 1.

    Returns:
        [branches, B, 1, 1] float32.
    """
    branch = torch.arange(1, branches + 1, device=keys.device, dtype=torch.int64)
    mixed = hash_bits(hash_bits(keys)[None, :] + branch[:, None] * 0x9E3779B1)
    uniform = (mixed & 0xFFFFFF).to(torch.float32) / float(1 << 24)
    return ((uniform >= rate).to(torch.float32) / (1.0 - rate))[:, :, None, None]


class Coins(NamedTuple):
    """What stochastic depth does to one residual branch."""

    scale: Tensor
    """[B, 1, 1]: of :func:`residual_scales`."""
    rows: Tensor | None
    """The samples that keep the branch, where that can be known without waiting for the device; else None."""


def coins_of(scales: Tensor, subset: bool) -> list[Coins]:
    """One for each branch of ``scales`` [branches, B, 1, 1]; with ``subset``, kept rows are named where they are known
    on the host."""
    subset = subset and scales.device.type == "cpu"
    return [Coins(scale, scale.flatten().nonzero().flatten() if subset else None) for scale in scales]


def add_residual(
    x: Tensor, branch: Callable[[Tensor], Tensor], coins: Coins | None, independent: bool = True
) -> Tensor:
    """x + branch(x), dropped and scaled for each sample as ``coins`` say.

    Where the kept samples are known, and samples are independent of each other (not in BatchNorm), the branch is
    computed for them alone.
    """
    if coins is None:
        return x + branch(x)
    if coins.rows is None or not independent:
        return x + coins.scale * branch(x)
    kept = branch(x.index_select(0, coins.rows))
    return x.index_add(0, coins.rows, coins.scale[coins.rows] * kept)
