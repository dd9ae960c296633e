"""Layers with a custom backward pass, compared with their plain versions under autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino_xcit.models import fused
from dino_xcit.models.droppath import DropPathMask, add_residual, drop_path_masks, residual_scales
from dino_xcit.models.xca import XCA, direct_attention, plain_attention
from dino_xcit.models.xcit import LPI, ConvPatchEmbed, Mlp


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def shaken(module: nn.Module) -> nn.Module:
    """Copy a module in float64 and perturb every parameter, so that none is exactly 0 or 1."""
    module = copy.deepcopy(module).double()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.add_(0.3 * noise(*parameter.shape, seed=number))
    return module


def compare(
    ours: Callable[..., Tensor], module: nn.Module, *inputs: Tensor, plain: Callable[..., Tensor] | None = None
) -> None:
    """Compare outputs, gradients and buffers of ``ours`` and ``plain`` in float64.

    ``plain`` defaults to ``ours`` under ``fused.plain()``.
    """
    found, expected = [], []
    for function, into in ((ours, found), (plain or ours, expected)):
        own = copy.deepcopy(module)
        given = [x.clone().requires_grad_() for x in inputs]
        with fused.plain() if into is expected else nullcontext():
            out = function(own, *given)
        (out * noise(*out.shape, seed=9)).sum().backward()
        into += [out, *(x.grad for x in given), *(parameter.grad for parameter in own.parameters()), *own.buffers()]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("layer", "tokens", "inputs"),
    [
        (Mlp(6, 20), 5, ()),
        (LPI(6), 12, (((2, (3, 4)),),)),
        (XCA(18, 3), 1, ()),
        (XCA(18, 3), 5, ()),
        (XCA(18, 3), 40, ()),
    ],
)  # fewer and more tokens than the 6 channels of a head
def test_block_layers_match_autograd(layer: nn.Module, tokens: int, inputs: tuple[Any, ...], scaled: bool) -> None:
    dim = 18 if isinstance(layer, XCA) else 6

    def ours(both: Any, x: Tensor) -> Tensor:
        return fused.layer_scaled(both[1][0], both[0], x, *inputs) if scaled else both[0](x, *inputs)

    module = nn.ModuleList([shaken(layer), nn.ParameterList([noise(dim, seed=3)] if scaled else [])])
    compare(ours, module, noise(2, tokens, dim) + 0.3)


def test_patch_embedding_matches_autograd() -> None:
    compare(lambda m, x: m(x)[0], shaken(ConvPatchEmbed(8, 12)), noise(2, 3, 21, 16))


def test_plain_versions_use_no_custom_autograd_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the comparisons above would compare a backward pass with itself."""

    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(torch.autograd.Function, "apply", refuse)
    tokens = torch.randn(2, 300, 6)
    stem, images = ConvPatchEmbed(8, 12), torch.randn(2, 3, 16, 16)
    cases = [
        (Mlp(6, 8), (tokens,)),
        (LPI(6), (tokens, ((2, (15, 20)),))),
        (XCA(6, 2), (tokens,)),
        (XCA(6, 2), (tokens[:, :9],)),
    ]
    for layer, inputs in (*cases, (stem, (images,))):
        with fused.plain():
            layer(*inputs)
        with pytest.raises(AssertionError):
            layer(*inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 1e-7])
def test_xca_output_and_gradient_are_finite_for_near_zero_channels(dtype: torch.dtype, value: float) -> None:
    """The gradient of such a channel is large. In float16 it can be infinite, and the loss scaler rejects the step."""
    qkv = noise(1, 9, 24).to(dtype)
    qkv[:, :, [3, 12]] = value  # of q and of k
    qkv.requires_grad_()
    temperature = torch.ones(2, 1, 1, dtype=torch.promote_types(dtype, torch.float32))
    out = direct_attention(qkv, temperature)
    out.sum().backward()
    assert bool(out.isfinite().all())
    assert qkv.grad is not None
    assert not bool(qkv.grad.isnan().any())
    if dtype is torch.float16:
        qkv.grad[..., [3, 12]] = 0.0
    assert bool(qkv.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("spread", "size"), [(0.4, 1.0), (8.0, 1e-3)])
def test_low_precision_xca_is_as_accurate_as_plain_attention(dtype: torch.dtype, spread: float, size: float) -> None:
    """With large norms and small gradients, a gradient divided by both norms leaves the range of float16.

    The plain formula computes norms and softmax in float32, as under autocast.
    """

    def plain(x: Tensor, t: Tensor) -> Tensor:
        q, k, v = x.reshape(2, 196, 3, 4, -1).permute(2, 0, 3, 4, 1).unbind(0)
        q, k = (F.normalize(y.float(), dim=-1).to(dtype) for y in (q, k))
        attention = ((q @ k.transpose(-2, -1)).float() * t).softmax(dim=-1).to(dtype)
        return (attention @ v).permute(0, 3, 1, 2).reshape(2, 196, -1)

    qkv, temperature = (spread * noise(2, 196, 3 * 4 * 24)).to(dtype), 1 + noise(4, 1, 1, seed=1).abs()
    weights = size * noise(2, 196, 4 * 24, seed=2)

    def gradients(function: Callable[..., Tensor], given: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of q, k and v."""
        x = given.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x, t), x, weights.to(given.dtype))
        return gradient.double().unflatten(2, (3, -1)).unbind(2)

    exact = gradients(plain_attention, qkv.double(), temperature)
    ours, theirs = (gradients(function, qkv, temperature.float()) for function in (direct_attention, plain))
    for own, other, true in zip(ours, theirs, exact, strict=True):
        assert float((own - true).norm()) <= 1.5 * float((other - true).norm()) + 1e-12


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_small_layer_scale_is_accurate_in_low_precision(precision: torch.dtype) -> None:
    """In float16, 1e-5 times an initial weight keeps only two bits, so the output is scaled instead."""
    module, x, gamma = Mlp(32, 128), torch.randn(4, 32), torch.full((32,), 1e-5)
    with torch.autocast("cpu", precision):
        out = fused.layer_scaled(gamma, module, x)
    torch.testing.assert_close(out.float(), gamma * module(x), rtol=0, atol=2e-2 * 1e-5 * 0.5)


def test_drop_path_on_subset_equals_multiplication_by_zero() -> None:
    scales = residual_scales(torch.arange(40), 1, 0.4)
    subset, everybody = drop_path_masks(scales, subset=True)[0], drop_path_masks(scales, subset=False)[0]
    assert subset.rows is not None
    assert 0 < len(subset.rows) < 40
    compare(
        lambda m, x: add_residual(x, m, DropPathMask(subset.scale.double(), subset.rows)),
        shaken(nn.Linear(6, 6)),
        noise(40, 3, 6),
        plain=lambda m, x: add_residual(x, m, DropPathMask(everybody.scale.double(), None)),
    )


@pytest.mark.parametrize("module", [Mlp(8, 16), XCA(8, 2), nn.Linear(8, 8)])
def test_fully_dropped_branch_gives_parameters_zero_gradients(module: nn.Module) -> None:
    """DistributedDataParallel waits for a gradient of every parameter."""
    x = torch.randn(3, 5, 8, requires_grad=True)
    out = add_residual(x, module, DropPathMask(torch.zeros(3, 1, 1), torch.empty(0, dtype=torch.int64)))
    assert torch.equal(out, x)
    out.sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert bool((parameter.grad == 0).all())
