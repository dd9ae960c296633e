"""BatchNorm in training inside autograd functions of our own, which compute it again instead of keeping its output.

x is [B, C, h, w]; the functions underneath are PyTorch's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def can_be_recomputed(norm: nn.Module) -> bool:
    """Whether ``norm`` is PyTorch's own, in training, under autograd, and not under torch.compile, which chooses by
    itself what it keeps."""
    return (
        type(norm) is nn.BatchNorm2d
        and norm.training
        and norm.track_running_stats
        and norm.momentum is not None
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def normalise(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """``norm(x)``, running statistics included."""
    assert norm.momentum is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked += 1
    return torch.native_batch_norm(
        x, norm.weight, norm.bias, norm.running_mean, norm.running_var, True, norm.momentum, norm.eps
    )[0]


def normalise_again(x: Tensor, gain: Tensor, offset: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same bits, without running statistics; also what :func:`backward` needs."""
    return torch.native_batch_norm(x, gain, offset, None, None, True, 0.0, eps)


def backward(
    grad: Tensor, x: Tensor, gain: Tensor, mean: Tensor, inverse_deviation: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gain and offset."""
    out: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        grad, x, gain, None, None, mean, inverse_deviation, True, eps, [True, True, True]
    )
    return out
