"""Cross-covariance attention: both paths against the plain formula, float64, and finite differences."""

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
    """Return a float64 XCA with nonzero biases and distinct temperatures, so that errors in them show."""
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
    """Return LayerNorm's output for correlated features; all tokens share a component of ``common`` times their std."""
    scales = torch.logspace(0, -1.5, dim, dtype=torch.float64)
    basis = projection(dim, dim, seed=seed + 1) * scales[:, None]
    features = projection(batch, tokens, dim, seed=seed + 2) @ basis
    features = features + common * features.std() * projection(dim, seed=seed + 3)
    affine = projection(2, dim, seed=seed + 4)
    return F.layer_norm(features, (dim,)) * (1 + 0.2 * affine[0]) + 0.3 * affine[1]


def result_and_gradients(
    xca: XCA, x: Tensor, layer_scale: Tensor, direction: Tensor, autocast: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return by name the output and the gradients of its inner product with ``direction``."""
    inputs = {"x": x.detach().clone().requires_grad_(), "layer_scale": layer_scale.detach().clone().requires_grad_()}
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        out = xca(inputs["x"], layer_scale=inputs["layer_scale"])
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
def test_xca_paths_match_plain_attention_and_its_gradients(batch: int, tokens: int, dim: int, heads: int) -> None:
    xca, gamma = random_xca(dim, heads, deviation=0.3), projection(dim, seed=2)
    x, direction = tokens_like_a_networks(batch, tokens, dim, 1.0, seed=3), projection(batch, tokens, dim, seed=1)
    with fused.plain():
        plain = result_and_gradients(xca, x, gamma, direction)
    for path in PATHS:
        found = result_and_gradients(on_path(xca, path), x, gamma, direction)
        assert above(1e-12, found, plain) == {}, path


@pytest.mark.parametrize("path", PATHS)
def test_xca_gradients_match_finite_differences(path: Path) -> None:
    xca = on_path(random_xca(6, 2, deviation=0.5), path)
    names = [name for name, _ in xca.named_parameters()]

    def function(x: Tensor, layer_scale: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(xca, dict(zip(names, parameters, strict=True)), (x, (), layer_scale))

    inputs = (projection(2, 9, 6, seed=1) + 1.0, projection(6, seed=2), *(p.detach() for p in xca.parameters()))
    assert torch.autograd.gradcheck(function, tuple(tensor.clone().requires_grad_() for tensor in inputs))


def test_gram_path_matches_direct_path_within_1e5_in_float32() -> None:
    xca, gamma = random_xca(96, 4, temperature=5.0), projection(96, seed=2)
    x, direction = tokens_like_a_networks(2, 784, 96, 4.0, seed=3), projection(2, 784, 96, seed=1)
    direct, gram = (
        result_and_gradients(on_path(xca, path, torch.float32), x.float(), gamma.float(), direction) for path in PATHS
    )
    assert above(1e-5, gram, {name: tensor.double() for name, tensor in direct.items()}) == {}


@pytest.mark.parametrize(("dtype", "common"), [(torch.bfloat16, 4.0), (torch.float16, 0.5)])
def test_gram_path_error_is_at_most_direct_path_error_under_autocast(dtype: torch.dtype, common: float) -> None:
    """Compares medians over five networks and images of the errors of output and gradients against float64."""
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


def test_gram_path_is_accurate_with_large_common_token_component() -> None:
    """Without subtracting the mean, the Gram path would lose digits in float32 that the direct path keeps."""
    xca, gamma = random_xca(64, 4, temperature=5.0), torch.ones(64, dtype=torch.float64)
    x = projection(1, 600, 64, seed=1) + 300.0
    with torch.no_grad():
        xca.qkv.weight.sub_(xca.qkv.weight.mean(dim=1, keepdim=True))  # q, k and v ignore the common component
    exact = result_and_gradients(on_path(xca, "direct"), x, gamma, x)
    low = (result_and_gradients(on_path(xca, path, torch.float32), x.float(), gamma.float(), x) for path in PATHS)
    direct, gram = (errors(found, exact)["out"] for found in low)
    assert gram < 3 * direct < 1e-3


def test_gram_path_does_not_overflow_float16_over_16384_tokens() -> None:
    xca, gamma = random_xca(16, 2, deviation=0.5), torch.ones(16, dtype=torch.float64)
    x = 4 * projection(1, 16384, 16, seed=1) + 2.0  # the sum of a channel's squares is 5 times the largest float16
    direction = projection(1, 16384, 16, seed=2) + x
    exact = result_and_gradients(on_path(xca, "direct"), x, gamma, direction)
    low = result_and_gradients(on_path(xca, "gram", torch.float32), x.float(), gamma.float(), direction, torch.float16)
    assert above(5e-3, low, exact) == {}


class Seen(TorchDispatchMode):
    """Record the operators below autocast: the name and the dtypes of the computation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, set[torch.dtype]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, told = {arg.dtype for arg in args if isinstance(arg, Tensor)}, (kwargs or {}).get("dtype")
        if not func.is_view:
            self.calls.append((func.overloadpacket.__name__, {told} if told else given))
        return func(*args, **(kwargs or {}))


def test_xca_norms_and_softmax_are_float32_under_autocast() -> None:
    with Seen() as seen, torch.autocast("cpu", torch.bfloat16):
        XCA(64, 4)(torch.randn(2, 50, 64))
    sums = {"_softmax", "sum", "mean", "square", "pow", "sqrt"}
    found = [(name, dtypes) for name, dtypes in seen.calls if name in sums or "norm" in name]
    assert {"_softmax", "sum"} <= {name for name, _ in found}
    assert all(dtypes == {torch.float32} for _, dtypes in found), found


def test_gram_path_saves_one_token_tensor_for_backward() -> None:
    xca, kept = on_path(random_xca(24, 2), "gram"), []
    x = projection(2, 530, 24, seed=1).requires_grad_()
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        xca(x)
    assert len([tensor for tensor in kept if 530 in tensor.shape]) == 1


@pytest.mark.parametrize("path", PATHS)
def test_xca_empty_batch_gives_empty_output_and_zero_gradients(path: Path) -> None:
    """Drop path can drop all samples of a branch."""
    xca, x = on_path(random_xca(32, 4), path), torch.zeros(0, 50, 32, dtype=torch.float64)
    result = result_and_gradients(xca, x, projection(32, seed=2), x)
    assert result.pop("out").shape == result.pop("x").shape == (0, 50, 32)
    assert [name for name, gradient in result.items() if gradient.any()] == []


def test_gram_path_is_finite_for_channels_of_zeros() -> None:
    """The official code's normalize clamps norms to at least 1e-12, so a zero norm does not divide.

    tests/test_own_backward.py covers the direct path.
    """
    xca = random_xca(32, 4)
    with torch.no_grad():
        xca.qkv.weight[[0, 40]] = 0.0  # one channel of q and one of k
        xca.qkv.bias[[0, 40]] = 0.0
    x = projection(2, 50, 32, seed=1)
    result = result_and_gradients(on_path(xca, "gram", torch.float32), x.float(), torch.ones(32), x)
    assert [name for name, tensor in result.items() if not tensor.isfinite().all()] == []


@pytest.mark.slow
def test_gram_path_compiles_without_graph_break() -> None:
    xca = on_path(random_xca(32, 4), "gram", torch.float32)
    x, gamma = projection(2, 60, 32, seed=1).float(), torch.ones(32)
    expected = result_and_gradients(xca, x, gamma, x, torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(xca, fullgraph=True, backend="aot_eager")
    found = result_and_gradients(compiled, x, gamma, x, torch.bfloat16)  # type: ignore[arg-type]
    found = {name.removeprefix("_orig_mod."): tensor for name, tensor in found.items()}
    assert above(1e-3, found, {name: tensor.double() for name, tensor in expected.items()}) == {}


@pytest.mark.parametrize("tokens", [36, 196])
def test_small_crops_take_direct_path(tokens: int) -> None:
    xca, x = random_xca(384, 8).float(), projection(1, tokens, 384, seed=1).float()
    expected = xca.proj(direct_attention(xca.qkv(x), xca.temperature))
    assert torch.equal(xca(x), expected)
    cases = itertools.product((torch.float32, torch.bfloat16), ("cpu", "cuda", "mps"), (False, True))
    assert {choose(tokens, 384, *case) for case in cases} == {"direct"}


def test_many_tokens_take_gram_path() -> None:
    xca, x = random_xca(64, 4), projection(1, 1024, 64, seed=1)
    by_gram = gram_attention(x, xca.temperature, xca.qkv.weight, xca.qkv.bias, xca.proj.weight, xca.proj.bias)
    assert torch.equal(xca(x), by_gram)
    assert choose(1024, 64, torch.float32, "mps", True) == "direct"  # the Gram path is untested on MPS


def test_plain_layers_do_not_choose_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.export would record the choice, which depends on the number of tokens."""
    monkeypatch.setattr(XCA, "_choose", lambda *_: pytest.fail("chooses a path"))
    with fused.plain():
        assert XCA(16, 2)(torch.randn(1, 300, 16)).shape == (1, 300, 16)
