"""Parameter groups, optimizers and clipping, against plain formulas."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_run import differing_bits, tensors_of
from torch import Tensor, nn

from dino_xcit.errors import InputError
from dino_xcit.models import DINOHead, MultiCropWrapper, build_backbone
from dino_xcit.optim import LARS, OPTIMIZERS, build_optimizer, clip_gradients, parameter_groups, set_rates


def network(norm_last_layer: bool = False) -> MultiCropWrapper:
    head = DINOHead(64, 20, use_bn=True, norm_last_layer=norm_last_layer, hidden_dim=8, bottleneck_dim=8)
    return MultiCropWrapper(build_backbone("xcit_pico_4_p4"), head)


def grouped_names(module: nn.Module) -> tuple[set[str], set[str]]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    decayed, exempt = parameter_groups(module)
    assert (decayed["decays"], exempt["decays"], exempt["weight_decay"]) == (True, False, 0)
    return {names[id(p)] for p in decayed["params"]}, {names[id(p)] for p in exempt["params"]}


def test_only_biases_and_vectors_are_exempt_from_weight_decay() -> None:
    decayed, exempt = grouped_names(network())
    tokens = {f"backbone.{name}" for name in ("cls_token", "blocks.0.attn.temperature", "blocks.0.attn.qkv.weight")}
    assert {*tokens, "head.last_layer.weight_g", "head.last_layer.weight_v"} <= decayed
    norms = {f"backbone.blocks.0.{name}" for name in ("gamma1", "norm1.weight", "local_mp.bn.weight")}
    assert {*norms, "backbone.patch_embed.proj.0.1.weight", "head.mlp.0.bias"} <= exempt
    shapes = {name: parameter.ndim for name, parameter in network().named_parameters()}
    assert exempt == {name for name, ndim in shapes.items() if ndim == 1 or name.endswith(".bias")}
    assert decayed | exempt == set(shapes)


def test_frozen_prototype_norm_is_in_no_parameter_group() -> None:
    decayed, exempt = grouped_names(network(norm_last_layer=True))
    assert "head.last_layer.weight_g" not in decayed | exempt


def layer() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4))


def train(module: nn.Module, optimizer: torch.optim.Optimizer, count: int, **rates: float) -> None:
    generator = torch.Generator().manual_seed(9)
    for _ in range(count):
        set_rates(optimizer, **rates)
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def formula(name: str, count: int, lr: float, weight_decay: float) -> list[Tensor]:
    """Compute ``count`` steps in float64 from the definition of the optimizer, with the gradients of :func:`train`."""
    generator = torch.Generator().manual_seed(9)
    parameters = [p.detach().double() for p in layer().parameters()]
    states: list[dict[str, Tensor]] = [{} for _ in parameters]
    for step in range(1, count + 1):
        for index, w in enumerate(parameters):
            gradient = torch.randn(w.shape, generator=generator).double()
            decay = weight_decay if w.ndim > 1 else 0.0
            state = states[index]
            if name == "adamw":  # Loshchilov and Hutter, algorithm 2
                m = 0.9 * state.get("m", torch.zeros_like(w)) + 0.1 * gradient
                v = 0.999 * state.get("v", torch.zeros_like(w)) + 0.001 * gradient**2
                states[index] = {"m": m, "v": v}
                update = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
                parameters[index] = w - lr * decay * w - lr * update
                continue
            update = gradient + decay * w
            if name == "lars" and w.ndim > 1:  # You et al., equation 6: trust ratio eta |w| / |g + decay w|
                update = update * (0.001 * w.norm() / update.norm())
            m = 0.9 * state.get("m", torch.zeros_like(w)) + update
            states[index] = {"m": m}
            parameters[index] = w - lr * m
    return parameters


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_matches_its_formula_over_five_steps(name: str) -> None:
    module = layer()
    train(module, build_optimizer(name, parameter_groups(module)), 5, lr=0.02, weight_decay=0.3)
    start = list(layer().parameters())
    for got, want, first in zip(module.parameters(), formula(name, 5, 0.02, 0.3), start, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-7)
        assert not torch.equal(got, first)


def test_lars_takes_plain_step_if_a_norm_is_zero() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = LARS([{"params": [weight]}], lr=0.5, weight_decay=0.0)
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.full((2, 2), -0.5))
    weight.grad = torch.zeros(2, 2)
    optimizer.step()
    assert bool(torch.isfinite(weight).all())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return tensors_of(copy.deepcopy(optimizer.state_dict()["state"]))


def poisoned_step(module: nn.Module, optimizer: Any, poison: float) -> None:
    """Take a step with ``found_inf`` set, which the optimizer must reject, and clear it afterwards."""
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, poison)
    optimizer.grad_scale, optimizer.found_inf = None, torch.ones(())
    optimizer.step()
    optimizer.found_inf = torch.zeros(())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_found_inf_leaves_parameters_and_state_unchanged(name: str) -> None:
    module = layer()
    optimizer = build_optimizer(name, parameter_groups(module))
    train(module, optimizer, 3, lr=0.02, weight_decay=0.3)
    before, state = tensors_of(dict(module.state_dict())), optimizer_tensors(optimizer)
    assert state
    for poison in (float("nan"), 1.0):
        poisoned_step(module, optimizer, poison)
        assert differing_bits(before, tensors_of(dict(module.state_dict()))) == []
        assert differing_bits(state, optimizer_tensors(optimizer)) == []
    optimizer.step()
    assert differing_bits(before, tensors_of(dict(module.state_dict()))) != []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rejected_first_step_does_not_affect_later_steps(name: str) -> None:
    straight, stumbled = layer(), layer()
    optimizers = [build_optimizer(name, parameter_groups(module)) for module in (straight, stumbled)]
    set_rates(optimizers[1], lr=0.02, weight_decay=0.3)
    poisoned_step(stumbled, optimizers[1], float("nan"))
    for module, optimizer in zip((straight, stumbled), optimizers, strict=True):
        train(module, optimizer, 2, lr=0.02, weight_decay=0.3)
    assert differing_bits(tensors_of(dict(straight.state_dict())), tensors_of(dict(stumbled.state_dict()))) == []


GRADIENTS = [torch.full((3, 3), 2.0), torch.full((4,), 0.1), torch.tensor([[30.0, 40.0]]), torch.zeros(5)]


def clipped(limit: float, mode: str) -> list[Tensor]:
    gradients = [gradient.clone() for gradient in GRADIENTS]
    clip_gradients(gradients, torch.stack(torch._foreach_norm(gradients)), limit, mode)
    return gradients


@pytest.mark.parametrize("limit", [0.05, 3.0])
def test_per_parameter_clipping_matches_reference_formula(limit: float) -> None:
    for got, gradient in zip(clipped(limit, "per-parameter"), GRADIENTS, strict=True):
        norm = float(gradient.double().norm())
        factor = limit / (norm + 1e-6)
        expected = gradient.double() * min(factor, 1)
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
        assert float(got.norm()) <= limit * (1 + 1e-6)


@pytest.mark.parametrize("limit", [0.05, 1000.0])
def test_global_clipping_matches_pytorch(limit: float) -> None:
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in GRADIENTS]
    for parameter, gradient in zip(parameters, GRADIENTS, strict=True):
        parameter.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_(parameters, limit)
    for got, parameter in zip(clipped(limit, "global"), parameters, strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", ["per-parameter", "global"])
def test_zero_limit_disables_clipping(mode: str) -> None:
    assert all(torch.equal(got, gradient) for got, gradient in zip(clipped(0.0, mode), GRADIENTS, strict=True))


def test_unknown_clip_mode_and_optimizer_are_refused() -> None:
    with pytest.raises(InputError, match="clip_mode"):
        clipped(1.0, "value")
    with pytest.raises(InputError, match="adamw, sgd, lars"):
        build_optimizer("adam", parameter_groups(layer()))
