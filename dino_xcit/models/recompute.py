"""Activation checkpointing: what a block computes is thrown away and computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from torch import nn
from torch.utils.checkpoint import checkpoint

Output = TypeVar("Output")


def recomputed(block: nn.Module, call: Callable[..., Output], *inputs: Any) -> Output:
    """``call(*inputs)``, a forward pass of ``block``, of which nothing but the inputs stays in memory.

    BatchNorm's running statistics change once, although the block runs twice. Nothing in a block draws from PyTorch's
    generators (stochastic depth comes with the inputs), so their state need not be kept.
    """
    out: Output = checkpoint(
        call,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), _running_statistics_left_alone(block)),
    )
    return out


@contextmanager
def _running_statistics_left_alone(block: nn.Module) -> Iterator[None]:
    """What changes in the meantime is a copy of the buffers: PyTorch checks that as many tensors are used again."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    originals = [dict(norm._buffers) for norm in norms]
    try:
        for norm, buffers in zip(norms, originals, strict=True):
            norm._buffers.update({name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()})
        yield
    finally:
        for norm, buffers in zip(norms, originals, strict=True):
            norm._buffers.update(buffers)
