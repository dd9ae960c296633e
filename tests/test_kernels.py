"""Triton kernels, interpreted on the CPU, against their twins in PyTorch; compiled for GPUs without one."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dino_xcit.methods.dino import DINOLoss, entropy
from dino_xcit.models.fused import fold_layer_scale
from dino_xcit.models.xca import direct_attention
from dino_xcit.models.xcit import LPI, Mlp

pytest.importorskip("triton")

from dino_xcit.kernels.add_norm import add_norm
from dino_xcit.kernels.cross_entropy import cross_entropy, sharpened
from dino_xcit.kernels.layer_scale import fold
from dino_xcit.kernels.lpi import lpi
from dino_xcit.kernels.xca import attention

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import fake_cuda  # noqa: E402

ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3}
DTYPES = list(ROUNDING)  # the interpreter multiplies bfloat16 wrongly
SIZES = ((2, (6, 6)), (3, (5, 14)))
TOKENS = sum(images * h * w for images, (h, w) in SIZES)
NOTHING = nn.Module()
Compute = Callable[..., Sequence[Tensor]]


def results(compute: Compute, module: nn.Module, given: Sequence[Tensor], directions: Sequence[Tensor]) -> list[Tensor]:
    """Return outputs, the gradients of their inner product with ``directions``, and the buffers of the module."""
    module, leaves = copy.deepcopy(module), [one.clone().requires_grad_() for one in given]
    with torch.autocast("cpu", torch.float16, enabled=given[0].dtype is torch.float16):
        outputs = compute(module, *leaves)
    torch.autograd.backward(outputs, [one.to(out.dtype) for one, out in zip(directions, outputs, strict=True)])
    gradients = [one.grad for one in (*leaves, *module.parameters()) if one.grad is not None]
    return [one.detach().double() for one in (*outputs, *gradients, *module.buffers())]


def assert_as_exact(found: list[Tensor], twin: list[Tensor], exact: list[Tensor], rounding: float) -> None:
    """Check that each tensor is as near to float64's as the twin's, but for a factor of 2 and a rounding."""
    for one, other, true in zip(found, twin, exact, strict=True):
        error, allowed = (float((tensor - true).norm() / true.norm()) for tensor in (one, other))
        assert error <= 2 * allowed + rounding


def compare(
    kernel: Compute, twin: Compute, module: nn.Module, given: Sequence[Tensor], directions: Sequence[Tensor]
) -> None:
    exact = results(twin, copy.deepcopy(module).double(), [one.double() for one in given], directions)
    found, expected = (results(compute, module, given, directions) for compute in (kernel, twin))
    assert_as_exact(found, expected, exact, ROUNDING[given[0].dtype])


@pytest.fixture(autouse=True)
def _several_tiles_in_each_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small inputs would otherwise run each loop of the kernels once."""
    for module, name, value in (
        ("lpi", "PROGRAMS", 2), ("add_norm", "PROGRAMS", 2), ("gelu", "PROGRAMS", 1), ("gelu", "ROWS", 4),
        ("cross_entropy", "ROW_TILE", 256), ("cross_entropy", "TILE", 256), ("layer_scale", "COLUMNS", 128),
    ):  # fmt: skip
        monkeypatch.setattr(f"dino_xcit.kernels.{module}.{name}", value)


@pytest.mark.process
@pytest.mark.skipif(fake_cuda.compiler() is None, reason="no C++ compiler for the backward pass")
def test_kernels_compile_for_gpus_without_spills() -> None:
    """Those of a step of S12/16 in bfloat16, on A100, H100 and RTX 50."""
    words = [sys.executable, str(BENCHMARKS / "kernels.py"), "--batch", "4"]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1]) == {"kernels": 18, "spilled": {}}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width"), [(2, 48), (3, 32), (1, 64), (2, 16)])
def test_xca(heads: int, width: int, dtype: torch.dtype) -> None:
    images, tokens = [count for count, _ in SIZES], [h * w for _, (h, w) in SIZES]
    compare(
        lambda _, qkv, temperature: [attention(qkv, temperature, images, tokens)],
        lambda _, qkv, temperature: [direct_attention(qkv, temperature, SIZES)],
        NOTHING,
        [(torch.randn(TOKENS, 3 * heads * width) + 0.3).to(dtype), torch.rand(heads, 1, 1) + 0.5],
        [torch.randn(TOKENS, heads * width)],
    )


def test_xca_of_a_channel_that_is_zero() -> None:
    qkv = torch.randn(36, 96)
    qkv[:, 3] = 0.0
    given, directions = [qkv, torch.ones(2, 1, 1)], [torch.randn(36, 32)]
    found = results(lambda _, x, t: [attention(x, t, [1], [36])], NOTHING, given, directions)
    assert all(bool(one.isfinite().all()) for one in found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [48, 64])
def test_add_norm(dim: int, dtype: torch.dtype) -> None:
    scale, norm = (torch.rand(37) > 0.2).float() / 0.8, nn.LayerNorm(dim, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)

    def twin(module: nn.Module, x: Tensor, branch: Tensor) -> Sequence[Tensor]:
        total = x + scale[:, None].to(x.dtype) * branch
        return total, module(total).to(branch.dtype)

    compare(
        lambda module, x, branch: add_norm(x, branch, scale, module, branch.dtype),
        twin,
        norm,
        [torch.randn(37, dim), torch.randn(37, dim).to(dtype)],
        [torch.randn(37, dim), torch.randn(37, dim)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", [nn.Linear(300, 7), nn.Conv2d(7, 7, 3, groups=7)])
@pytest.mark.parametrize("scaled", [True, False])
def test_fold_layer_scale(scaled: bool, layer: nn.Linear | nn.Conv2d, dtype: torch.dtype) -> None:
    module = nn.Module()
    module.layer, module.gamma = layer, nn.Parameter(torch.randn(7)) if scaled else None
    compare(
        lambda own, x: fold(own.gamma, own.layer.weight, own.layer.bias, x.dtype),
        lambda own, x: fold_layer_scale(own.gamma, own.layer.weight, own.layer.bias, x.dtype),
        module,
        [torch.zeros(1, dtype=dtype)],
        [torch.randn_like(layer.weight), torch.randn(7)],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [True, False])
def test_mlp(scaled: bool, dtype: torch.dtype) -> None:
    compare(
        lambda module, x, gamma: [module(x, gamma if scaled else None, triton=True)],
        lambda module, x, gamma: [module(x, gamma if scaled else None)],
        Mlp(24, 300),
        [torch.randn(37, 24).to(dtype), torch.randn(24)],
        [torch.randn(37, 24)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [((2, (3, 4)), (3, (2, 5))), ((8, (1, 3)),)])
def test_lpi(
    sizes: tuple[tuple[int, tuple[int, int]], ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, tokens = LPI(48), sum(images * h * w for images, (h, w) in sizes)
    nn.init.normal_(module.bn.weight)
    nn.init.normal_(module.bn.bias)
    if sizes[0][0] == 8:
        monkeypatch.setattr("dino_xcit.kernels.lpi.PROGRAMS", 1024)
        nn.init.constant_(module.conv1.bias, 10.0)  # a mean much larger than the deviation

    def twin(module: nn.Module, x: Tensor) -> Sequence[Tensor]:
        given = x.unflatten(0, (sizes[0][0], -1)) if len(sizes) == 1 else x
        return [module(given, sizes).reshape(tokens, 48)]

    compare(
        lambda own, x: [lpi(x, sizes, own.conv1, own.bn, own.conv2.weight, own.conv2.bias)],
        twin,
        module,
        [torch.randn(tokens, 48).to(dtype)],
        [torch.randn(tokens, 48)],
    )


@pytest.mark.parametrize("views", [2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(views: int, dtype: torch.dtype) -> None:
    loss, targets = DINOLoss(1100), torch.randn(6, 1100).mul(3).softmax(dim=-1)
    compare(
        lambda _, student: [cross_entropy(student, targets, 2, 0.1)],
        lambda _, student: [loss.cross_entropy(student, targets.to(torch.promote_types(student.dtype, torch.float32)))],
        NOTHING,
        [torch.randn(views * 3, 1100).mul(3).to(dtype)],
        [torch.tensor(1.7)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_sharpened_targets(dtype: torch.dtype) -> None:
    loss, teacher = DINOLoss(1100), torch.randn(6, 1100).div(9).to(dtype)
    loss.center.copy_(torch.randn(1, 1100).div(9))
    targets, of_rows = sharpened(teacher, loss.center, 0.04)
    twin, exact = loss.teacher_probabilities(teacher, 0.04), loss.double().teacher_probabilities(teacher.double(), 0.04)
    assert_as_exact(
        [targets.double(), of_rows.mean().double()], [twin.double(), entropy(twin).double()], [exact, entropy(exact)],
        ROUNDING[torch.float32],
    )  # fmt: skip
