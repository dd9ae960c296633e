"""Cross-covariance attention: its two paths against the plain formula, float64, and finite differences."""

from __future__ import annotations

import copy
import itertools
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dino_xcit.models import fused
from dino_xcit.models.xca import XCA, Path, choose, direct_attention, gram_attention

PATHS: tuple[Path, ...] = ("direct", "gram")


def random_xca(dim: int, heads: int, deviation: float = 0.1, temperature: float = 1.0, seed: int = 0) -> XCA:
    """Float64, with biases and temperatures that hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    xca = XCA(dim, heads).double()
    with torch.no_grad():
        for parameter in xca.parameters():
            parameter.copy_(deviation * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        xca.temperature.add_(temperature)
    return xca


def projection(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens_like_a_networks(batch: int, tokens: int, dim: int, common: float, seed: int) -> Tensor:
    """LayerNorm's output for correlated features of which all tokens share a part ``common`` times the usual size."""
    scales = torch.logspace(0, -1.5, dim, dtype=torch.float64)
    basis = projection(dim, dim, seed=seed + 1) * scales[:, None]
    features = projection(batch, tokens, dim, seed=seed + 2) @ basis
    features = features + common * features.std() * projection(dim, seed=seed + 3)
    affine = projection(2, dim, seed=seed + 4)
    return F.layer_norm(features, (dim,)) * (1 + 0.2 * affine[0]) + 0.3 * affine[1]


def result_and_gradients(
    xca: XCA, x: Tensor, layer_scale: Tensor, direction: Tensor, autocast: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The output, and the gradients of its product with ``direction``, by name."""
    inputs = {"x": x.detach().clone().requires_grad_(), "layer_scale": layer_scale.detach().clone().requires_grad_()}
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        out = xca(inputs["x"], inputs["layer_scale"])
    wanted = inputs | dict(xca.named_parameters())
    gradients = torch.autograd.grad(out, list(wanted.values()), direction.to(out.dtype))
    return {"out": out.detach()} | dict(zip(wanted, gradients, strict=True))


def on_path(xca: XCA, path: Path, dtype: torch.dtype = torch.float64) -> XCA:
    xca = copy.deepcopy(xca).to(dtype)
    xca.path = path
    return xca


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((found[name].double() - exact[name]).norm() / exact[name].norm()) for name in exact}


def above(limit: float, found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {name: error for name, error in errors(found, exact).items() if not error <= limit}


@pytest.mark.parametrize(("batch", "tokens", "dim", "heads"), [(2, 50, 32, 4), (1, 7, 24, 2)])
def test_both_paths_compute_the_plain_formula_and_its_gradients(batch: int, tokens: int, dim: int, heads: int) -> None:
    xca, gamma = random_xca(dim, heads, deviation=0.3), projection(dim, seed=2)
    x, direction = tokens_like_a_networks(batch, tokens, dim, 1.0, seed=3), projection(batch, tokens, dim, seed=1)
    with fused.plain():
        plain = result_and_gradients(xca, x, gamma, direction)
    for path in PATHS:
        found = result_and_gradients(on_path(xca, path), x, gamma, direction)
        assert above(1e-12, found, plain) == {}, path


@pytest.mark.parametrize("path", PATHS)
def test_the_gradients_are_those_of_finite_differences(path: Path) -> None:
    xca = on_path(random_xca(6, 2, deviation=0.5), path)
    names = [name for name, _ in xca.named_parameters()]

    def function(x: Tensor, layer_scale: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(xca, dict(zip(names, parameters, strict=True)), (x, layer_scale))

    inputs = (projection(2, 9, 6, seed=1) + 1.0, projection(6, seed=2), *(p.detach() for p in xca.parameters()))
    assert torch.autograd.gradcheck(function, tuple(tensor.clone().requires_grad_() for tensor in inputs))


def test_in_float32_the_gram_path_is_within_1e5_of_the_direct_one() -> None:
    xca, gamma = random_xca(96, 4, temperature=5.0), projection(96, seed=2)
    x, direction = tokens_like_a_networks(2, 784, 96, 4.0, seed=3), projection(2, 784, 96, seed=1)
    direct, gram = (
        result_and_gradients(on_path(xca, path, torch.float32), x.float(), gamma.float(), direction) for path in PATHS
    )
    assert above(1e-5, gram, {name: tensor.double() for name, tensor in direct.items()}) == {}


@pytest.mark.parametrize(("dtype", "common"), [(torch.bfloat16, 4.0), (torch.float16, 0.5)])
def test_under_autocast_the_gram_path_is_no_worse_than_the_direct_one(dtype: torch.dtype, common: float) -> None:
    """Of output and each gradient, against float64, the median over five networks and images."""
    found: dict[str, dict[str, list[float]]] = {path: {} for path in PATHS}
    for seed in range(5):
        xca, gamma = random_xca(64, 4, temperature=3.0, seed=seed), 1 + 0.1 * projection(64, seed=seed)
        x, direction = tokens_like_a_networks(2, 400, 64, common, 10 * seed), projection(2, 400, 64, seed=seed + 7)
        exact = result_and_gradients(on_path(xca, "direct"), x, gamma, direction)
        for path in PATHS:
            low = on_path(xca, path, torch.float32)
            wrong = errors(result_and_gradients(low, x.float(), gamma.float(), direction, dtype), exact)
            for name, error in wrong.items():
                found[path].setdefault(name, []).append(error)
    worse = {name for name in found["gram"] if median(found["gram"][name]) > median(found["direct"][name])}
    assert worse == set()


def test_a_large_part_that_all_tokens_share_does_not_drown_the_rest() -> None:
    """Without taking the mean out first, float32 would lose here what the direct path keeps."""
    xca, gamma = random_xca(64, 4, temperature=5.0), torch.ones(64, dtype=torch.float64)
    x = projection(1, 600, 64, seed=1) + 300.0
    with torch.no_grad():
        xca.qkv.weight.sub_(xca.qkv.weight.mean(dim=1, keepdim=True))  # q, k and v do not see the common part
    exact = result_and_gradients(on_path(xca, "direct"), x, gamma, x)
    low = (result_and_gradients(on_path(xca, path, torch.float32), x.float(), gamma.float(), x) for path in PATHS)
    direct, gram = (errors(found, exact)["out"] for found in low)
    assert gram < 3 * direct < 1e-3


def test_sums_over_16384_tokens_stay_within_float16s_range() -> None:
    xca, gamma = random_xca(16, 2, deviation=0.5), torch.ones(16, dtype=torch.float64)
    x = 4 * projection(1, 16384, 16, seed=1) + 2.0  # a channel's squares sum to 5 times the greatest float16
    direction = projection(1, 16384, 16, seed=2) + x
    exact = result_and_gradients(on_path(xca, "direct"), x, gamma, direction)
    low = result_and_gradients(on_path(xca, "gram", torch.float32), x.float(), gamma.float(), direction, torch.float16)
    assert above(5e-3, low, exact) == {}


class Seen(TorchDispatchMode):
    """The operators below autocast: name, and the dtypes that they compute in."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, set[torch.dtype]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, told = {arg.dtype for arg in args if isinstance(arg, Tensor)}, (kwargs or {}).get("dtype")
        if not func.is_view:
            self.calls.append((func.overloadpacket.__name__, {told} if told else given))
        return func(*args, **(kwargs or {}))


def test_under_autocast_norms_and_softmax_are_float32() -> None:
    with Seen() as seen, torch.autocast("cpu", torch.bfloat16):
        XCA(64, 4)(torch.randn(2, 50, 64))
    sums = {"_softmax", "sum", "mean", "square", "pow", "sqrt"}
    dtypes = {name: dtypes for name, dtypes in seen.calls if name in sums or "norm" in name}
    assert {"_softmax", "sum"} <= dtypes.keys()
    assert all(found == {torch.float32} for found in dtypes.values())


def test_of_the_tokens_only_one_tensor_is_kept_for_the_backward_pass() -> None:
    xca, kept = on_path(random_xca(24, 2), "gram"), []
    x = projection(2, 530, 24, seed=1).requires_grad_()
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        xca(x)
    assert len([tensor for tensor in kept if 530 in tensor.shape]) == 1


@pytest.mark.parametrize("path", PATHS)
def test_an_empty_batch_has_an_empty_result_and_gradients_of_zero(path: Path) -> None:
    """Drop-path can drop a branch for everybody."""
    xca, x = on_path(random_xca(32, 4), path), torch.zeros(0, 50, 32, dtype=torch.float64)
    result = result_and_gradients(xca, x, projection(32, seed=2), x)
    assert result.pop("out").shape == result.pop("x").shape == (0, 50, 32)
    assert [name for name, gradient in result.items() if gradient.any()] == []


def test_a_channel_of_zeros_gives_finite_values_and_gradients() -> None:
    """A length of zero must not divide: the official code's normalize has a floor of 1e-12.

    test_own_backward.py has the direct path's.
    """
    xca = random_xca(32, 4)
    with torch.no_grad():
        xca.qkv.weight[[0, 40]] = 0.0  # one of q and one of k
        xca.qkv.bias[[0, 40]] = 0.0
    x = projection(2, 50, 32, seed=1)
    result = result_and_gradients(on_path(xca, "gram", torch.float32), x.float(), torch.ones(32), x)
    assert [name for name, tensor in result.items() if not tensor.isfinite().all()] == []


@pytest.mark.slow
def test_the_gram_path_compiles_as_a_whole_forward_and_backward() -> None:
    xca = on_path(random_xca(32, 4), "gram", torch.float32)
    x, gamma = projection(2, 60, 32, seed=1).float(), torch.ones(32)
    expected = result_and_gradients(xca, x, gamma, x, torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(xca, fullgraph=True, backend="aot_eager")
    found = result_and_gradients(compiled, x, gamma, x, torch.bfloat16)  # type: ignore[arg-type]
    found = {name.removeprefix("_orig_mod."): tensor for name, tensor in found.items()}
    assert above(1e-3, found, {name: tensor.double() for name, tensor in expected.items()}) == {}


@pytest.mark.parametrize("tokens", [36, 196])
def test_small_crops_take_the_direct_path_with_its_bits(tokens: int) -> None:
    xca, x = random_xca(384, 8).float(), projection(1, tokens, 384, seed=1).float()
    expected = xca.proj(direct_attention(xca.qkv(x), xca.temperature))
    assert torch.equal(xca(x), expected)
    cases = itertools.product((torch.float32, torch.bfloat16), ("cpu", "cuda", "mps"), (False, True))
    assert {choose(tokens, 384, *case) for case in cases} == {"direct"}


def test_many_tokens_take_the_gram_path() -> None:
    xca, x = random_xca(64, 4), projection(1, 1024, 64, seed=1)
    by_gram = gram_attention(x, xca.temperature, xca.qkv.weight, xca.qkv.bias, xca.proj.weight, xca.proj.bias)
    assert torch.equal(xca(x), by_gram)
    assert choose(1024, 64, torch.float32, "mps", True) == "direct"  # where nobody has tried it
