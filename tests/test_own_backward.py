"""The parts of the network that have a backward pass of their own, against autograd on the plain formula."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino_xcit.models.class_attention import ClassAttention
from dino_xcit.models.cross_covariance import cross_covariance_attention
from dino_xcit.models.droppath import Coins, add_residual, coins_of, residual_scales
from dino_xcit.models.head import Prototypes
from dino_xcit.models.lpi import LPI
from dino_xcit.models.mlp import Mlp
from dino_xcit.models.patch_embed import ConvPatchEmbed


def plain_attention(qkv: Tensor, temperature: Tensor) -> Tensor:
    """The paper's formula as the official code and timm write it."""
    batch, tokens, _ = qkv.shape
    q, k, v = qkv.reshape(batch, tokens, 3, len(temperature), -1).permute(2, 0, 3, 4, 1).unbind(0)
    attention = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * temperature
    return (attention.softmax(dim=-1) @ v).permute(0, 3, 1, 2).reshape(batch, tokens, -1)


def plain_class_attention(module: ClassAttention, cls_token: Tensor, patches: Tensor) -> Tensor:
    """With keys and values of every token."""
    x = torch.cat((cls_token, patches), dim=1)
    batch, tokens, dim = x.shape
    q, k, v = module.qkv(x).reshape(batch, tokens, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    attention = (q[:, :, :1] * module.scale @ k.transpose(-2, -1)).softmax(dim=-1)
    return module.proj((attention @ v).transpose(1, 2).reshape(batch, 1, dim))


def plain_prototypes(module: Prototypes, x: Tensor) -> Tensor:
    return F.linear(x, module.weight_g * F.normalize(module.weight_v, dim=1))


def plain_mlp(module: Mlp, x: Tensor) -> Tensor:
    return module.fc2(module.act(module.fc1(x)))


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def shaken(module: nn.Module) -> nn.Module:
    """Every parameter somewhere else than at its start, so that none is 0 or 1 by design."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.add_(0.3 * noise(*parameter.shape, seed=number).to(parameter.dtype))
    return module


def compare(ours: Callable[..., Tensor], plain: Callable[..., Tensor], module: nn.Module, *inputs: Tensor) -> None:
    """Value and every gradient, in float64."""
    found, expected = [], []
    for function, into in ((ours, found), (plain, expected)):
        own = copy.deepcopy(module)
        given = [x.clone().requires_grad_() for x in inputs]
        out = function(own, *given)
        (out * noise(*out.shape, seed=9)).sum().backward()
        into += [out, *(x.grad for x in given), *(parameter.grad for parameter in own.parameters())]
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tokens", [1, 5, 40])  # fewer and more than the 6 channels of a head
def test_cross_covariance_attention(tokens: int) -> None:
    temperature = nn.ParameterList([noise(3, 1, 1, seed=5).abs() + 0.5])
    qkv = noise(2, tokens, 54) + 0.3
    compare(
        lambda t, x: cross_covariance_attention(x, t[0]), lambda t, x: plain_attention(x, t[0]), temperature, qkv
    )  # fmt: skip


def test_cross_covariance_attention_by_numerical_differences() -> None:
    qkv, temperature = noise(2, 7, 24).requires_grad_(), (noise(2, 1, 1).abs() + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(cross_covariance_attention, (qkv, temperature))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 1e-7])
@pytest.mark.parametrize("tokens", [2, 9])
def test_a_channel_near_zero_has_a_finite_output_and_gradient(dtype: torch.dtype, value: float, tokens: int) -> None:
    """Its gradient is large; beyond float16's range it is infinite there, and the loss scaler rejects the step."""
    qkv = noise(1, tokens, 24).to(dtype)
    qkv[:, :, 3] = value  # of q
    qkv[:, :, 12] = value  # of k
    qkv.requires_grad_()
    temperature = torch.ones(2, 1, 1, dtype=torch.promote_types(dtype, torch.float32))
    out = cross_covariance_attention(qkv, temperature)
    out.sum().backward()
    assert bool(torch.isfinite(out).all())
    assert qkv.grad is not None
    others = [channel for channel in range(24) if channel not in (3, 12)]
    assert bool(torch.isfinite(qkv.grad[..., others]).all())
    assert bool(torch.isfinite(qkv.grad).all()) or dtype is torch.float16
    assert not bool(torch.isnan(qkv.grad).any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("spread", "size"), [(0.4, 1.0), (2.0, 1e-3), (8.0, 1e-3)])
def test_low_precision_attention_is_no_worse_than_the_plain_formula_in_it(
    dtype: torch.dtype, spread: float, size: float
) -> None:
    """Long channels and small gradients: a gradient divided by two lengths would leave float16's range. The plain
    formula has its lengths and softmax in float32, as under autocast."""

    def plain(x: Tensor, t: Tensor) -> Tensor:
        q, k, v = x.reshape(2, 196, 3, 4, -1).permute(2, 0, 3, 4, 1).unbind(0)
        q, k = F.normalize(q.float(), dim=-1).to(dtype), F.normalize(k.float(), dim=-1).to(dtype)
        attention = ((q @ k.transpose(-2, -1)).float() * t).softmax(dim=-1).to(dtype)
        return (attention @ v).permute(0, 3, 1, 2).reshape(2, 196, -1)

    qkv, temperature = (spread * noise(2, 196, 3 * 4 * 24)).to(dtype), 1 + noise(4, 1, 1, seed=1).abs()
    weights = size * noise(2, 196, 4 * 24, seed=2)

    def gradient(function: Callable[..., Tensor], given: Tensor, t: Tensor) -> Tensor:
        x = given.clone().requires_grad_()
        function(x, t).backward(weights.to(given.dtype))
        assert x.grad is not None
        return x.grad.double()

    exact = gradient(plain_attention, qkv.double(), temperature)
    ours = gradient(cross_covariance_attention, qkv, temperature.float())
    theirs = gradient(plain, qkv, temperature.float())
    for part in range(3):  # q, k, v
        own, other, true = (x.unflatten(2, (3, -1))[:, :, part] for x in (ours, theirs, exact))
        assert float((own - true).norm()) <= 1.5 * float((other - true).norm()) + 1e-12


@pytest.mark.parametrize("scaled", [False, True])
def test_mlp(scaled: bool) -> None:
    module = nn.ModuleList([shaken(Mlp(6, 20).double()), nn.ParameterList([noise(6, seed=3)])])

    def ours(both: nn.ModuleList, x: Tensor) -> Tensor:
        return both[0](x, both[1][0] if scaled else None)  # type: ignore[index]

    def plain(both: nn.ModuleList, x: Tensor) -> Tensor:
        out = plain_mlp(both[0], x)  # type: ignore[arg-type]
        return both[1][0] * out if scaled else out  # type: ignore[index]

    if scaled:
        compare(ours, plain, module, noise(2, 5, 6))
    else:
        compare(lambda m, x: m(x), plain_mlp, module[0], noise(2, 5, 6))  # type: ignore[arg-type]


def test_local_patch_interaction_with_layer_scale() -> None:
    module = nn.ModuleList([shaken(LPI(6).double()), nn.ParameterList([noise(6, seed=3)])])

    def plain(both: nn.ModuleList, x: Tensor) -> Tensor:
        lpi = both[0]
        image = x.transpose(1, 2).unflatten(2, (3, 4))
        image = lpi.conv2(lpi.bn(lpi.act(lpi.conv1(image))))  # type: ignore[union-attr,operator]
        return both[1][0] * image.flatten(2).transpose(1, 2)  # type: ignore[index]

    compare(lambda both, x: both[0](x, (3, 4), both[1][0]), plain, module, noise(2, 12, 6))
    trained, expected = copy.deepcopy(module), copy.deepcopy(module)
    trained[0](noise(2, 12, 6), (3, 4), None)
    plain(expected, noise(2, 12, 6))
    for (name, a), b in zip(trained.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_patch_embedding() -> None:
    """In training, against its layers one after another; running statistics too."""
    module = shaken(ConvPatchEmbed(8, 12).double())
    images = noise(2, 3, 21, 16)
    compare(
        lambda m, x: m(x)[0],
        lambda m, x: m.proj(x.contiguous(memory_format=torch.channels_last)).flatten(2).transpose(1, 2),
        module,
        images,
    )
    ours, plain = copy.deepcopy(module), copy.deepcopy(module)
    ours(images)
    plain.proj(images.contiguous(memory_format=torch.channels_last))  # type: ignore[operator]
    for (name, a), b in zip(ours.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert any(not torch.equal(a, b) for a, b in zip(ours.buffers(), module.buffers(), strict=True))


def test_class_attention() -> None:
    module = shaken(ClassAttention(12, 3).double())
    compare(lambda m, c, p: m(c, p), plain_class_attention, module, noise(2, 1, 12), noise(2, 7, 12, seed=1))  # type: ignore[arg-type]


def test_prototypes() -> None:
    compare(lambda m, x: m(x), plain_prototypes, shaken(Prototypes(8, 30, train_length=True).double()), noise(5, 8))  # type: ignore[arg-type]


def test_frozen_prototype_lengths_get_no_gradient() -> None:
    module = Prototypes(8, 30, train_length=False)
    module(torch.randn(5, 8)).sum().backward()
    assert module.weight_g.grad is None
    assert module.weight_v.grad is not None


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_layer_scale_of_deep_networks_survives_low_precision(precision: torch.dtype) -> None:
    """1e-5 times a weight has two bits left in float16; there it is applied to the output."""
    module, x, gamma = Mlp(32, 128), torch.randn(4, 32), torch.full((32,), 1e-5)
    with torch.autocast("cpu", precision):
        out = module(x, gamma)
    torch.testing.assert_close(out.float(), gamma * plain_mlp(module, x), rtol=0, atol=2e-2 * 1e-5 * 0.5)


def test_computing_kept_samples_alone_is_the_same_as_multiplying_the_others_by_zero() -> None:
    module = shaken(nn.Linear(6, 6).double())
    scales = residual_scales(torch.arange(40), 1, 0.4)
    subset, everybody = coins_of(scales, subset=True)[0], coins_of(scales, subset=False)[0]
    assert subset.rows is not None
    assert 0 < len(subset.rows) < 40
    compare(
        lambda m, x: add_residual(x, m, Coins(subset.scale.double(), subset.rows)),
        lambda m, x: add_residual(x, m, Coins(everybody.scale.double(), None)),
        module,
        noise(40, 3, 6),
    )


@pytest.mark.parametrize("make", [lambda: Mlp(8, 16), lambda: nn.Linear(8, 8)])
def test_a_branch_that_everybody_drops_still_gives_its_parameters_a_gradient(make: Callable[[], nn.Module]) -> None:
    """DistributedDataParallel waits for each of them."""
    module, x = make(), torch.randn(3, 5, 8, requires_grad=True)
    out = add_residual(x, module, Coins(torch.zeros(3, 1, 1), torch.empty(0, dtype=torch.int64)))
    assert torch.equal(out, x)
    out.sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert bool((parameter.grad == 0).all())


def test_cross_covariance_attention_of_no_sample() -> None:
    qkv, temperature = torch.empty(0, 5, 24, requires_grad=True), torch.ones(2, 1, 1, requires_grad=True)
    cross_covariance_attention(qkv, temperature).sum().backward()
    assert temperature.grad is not None
    assert bool((temperature.grad == 0).all())


def test_what_stays_in_memory_for_the_backward_pass() -> None:
    """Bytes that autograd keeps of one MLP and one attention core in bfloat16, a token: x and the layer before GELU;
    q, k, v and a d x d matrix a head."""
    tokens, dim, heads = 64, 48, 2
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    mlp = Mlp(dim, 4 * dim)
    x = torch.randn(1, tokens, dim, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = mlp(x)
    assert sum(kept.values()) == 2 * tokens * 5 * dim
    del out
    kept.clear()
    qkv = torch.randn(1, tokens, 3 * dim, dtype=torch.bfloat16, requires_grad=True)
    temperature = nn.Parameter(torch.ones(heads, 1, 1))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = cross_covariance_attention(qkv, temperature)
    width = dim // heads
    assert sum(kept.values()) <= 2 * tokens * 3 * dim + 4 * heads * (width * width + 2 * width)
    del out
