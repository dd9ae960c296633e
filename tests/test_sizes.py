"""One run over all crop sizes against one run per crop size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_run import CPU, schedules_of, steps, tiny_config

from dino_xcit.models import XCiT, build_backbone
from dino_xcit.models.droppath import _AddScaled
from dino_xcit.models.sizes import Sizes, join_sizes, split_sizes
from dino_xcit.models.xca import XCA
from dino_xcit.train import build_state

SIZES: Sizes = ((2, (3, 4)), (5, (2, 2)))


def test_split_sizes_inverts_join_sizes() -> None:
    parts = [torch.randn(images, h * w, 6) for images, (h, w) in SIZES]
    joined = join_sizes(parts)
    assert joined.shape == (2 * 12 + 5 * 4, 6)
    assert all(torch.equal(a, b) for a, b in zip(split_sizes(joined, SIZES), parts, strict=True))
    assert split_sizes(parts[0], SIZES[:1])[0] is parts[0]
    assert join_sizes(parts[:1]) is parts[0]


def gradients(packed: bool, path: Any, precision: Any, **settings: Any) -> dict[str, torch.Tensor]:
    """Return loss, gradients and BatchNorm statistics of one forward and backward pass."""
    config = tiny_config(precision=precision, **settings)
    method: Any = build_state(config, CPU).method
    method.student.pack_crops = packed
    for name, parameter in method.student.named_parameters():
        if "gamma" in name:
            parameter.data.fill_(0.5)
    for module in method.student.modules():
        if isinstance(module, XCA):
            module.path = path
    (batch,) = next(steps(config, 0, 1))
    loss, _ = method.forward_backward(batch, schedules_of(config).at(0))
    found = {name: parameter.grad for name, parameter in method.student.named_parameters()}
    return {"loss": loss, **{n: g for n, g in found.items() if g is not None}, **dict(method.student.named_buffers())}


@pytest.mark.parametrize("path", ["direct", "gram", "auto"])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_packed_crops_have_the_loss_and_gradients_of_separate_ones(path: str, rate: float) -> None:
    packed, separate = (gradients(one, path, "fp32", drop_path_rate=rate) for one in (True, False))
    assert packed.keys() == separate.keys()
    assert float(packed["loss"]) == pytest.approx(float(separate["loss"]), abs=1e-6)
    for name, expected in separate.items():
        error = (packed[name].double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-6)
        assert float(error) < 1e-5, name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_packed_crops_in_low_precision_differ_by_rounding_only(precision: str) -> None:
    packed, separate = (gradients(one, "direct", precision) for one in (True, False))
    assert float(packed["loss"]) == pytest.approx(float(separate["loss"]), rel=2e-3)
    for name, expected in separate.items():
        if expected.ndim > 1:
            assert float((packed[name] - expected).norm()) < 0.05 * float(expected.norm()) + 1e-6, name


@pytest.mark.parametrize("recompute", [False, True])
def test_packed_crops_with_activation_checkpointing(recompute: bool) -> None:
    network = build_backbone("xcit_pico_4_p4").train()
    assert isinstance(network, XCiT)
    network.recomputed_stages = recompute * network.stages
    crops = [torch.randn(2, 3, 16, 16), torch.randn(3, 3, 8, 8)]
    features = network.forward_crops(crops, [None, None])
    assert features.shape == (5, 64)
    features.square().sum().backward()
    own = [parameter.grad for name, parameter in network.named_parameters() if "blocks.0.norm1" in name]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in own)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_add_scaled_matches_its_formula(dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(0)
    x, branch = (torch.randn(6, 5, generator=generator).to(kind).requires_grad_() for kind in (wide, dtype))
    scale = torch.tensor([0.0, 1.25, 1.25, 0.0, 1.25, 1.25], dtype=wide)[:, None]
    direction = torch.randn(6, 5, generator=generator).to(wide)
    results = []
    for function in (_AddScaled.apply, lambda x, branch, scale: x + scale * branch):
        out = function(x, branch, scale)
        results.append((out.detach(), *torch.autograd.grad((out * direction).sum(), (x, branch))))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)
