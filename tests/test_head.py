"""The projection head: initialisation, parameter names, and normalised features."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny_run import CPU, run, tiny_config
from torch import Tensor, nn

from dino_xcit.models.head import DINOHead
from dino_xcit.train import build_state


def published_layout(in_dim: int, hidden: int, bottleneck: int, out_dim: int, use_bn: bool) -> nn.Module:
    """Build the head of the paper's appendix, with PyTorch's own weight normalisation."""
    layers: list[nn.Module] = []
    for width in (in_dim, hidden):
        norm = [nn.BatchNorm1d(hidden)] if use_bn else []
        layers += [nn.Linear(width, hidden), *norm, nn.GELU()]
    layers.append(nn.Linear(hidden, bottleneck))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        last = nn.utils.weight_norm(nn.Linear(bottleneck, out_dim, bias=False))
    return nn.ModuleDict({"mlp": nn.Sequential(*layers), "last_layer": last})


@pytest.mark.parametrize("use_bn", [False, True])
@pytest.mark.parametrize("norm_last_layer", [False, True])
def test_head_equals_weight_norm_in_values_and_gradients(use_bn: bool, norm_last_layer: bool) -> None:
    ours = DINOHead(24, 40, use_bn, norm_last_layer, hidden_dim=32, bottleneck_dim=12).double()
    theirs = published_layout(24, 32, 12, 40, use_bn).double()
    with torch.no_grad():
        ours.last_layer.weight_g.copy_(torch.rand(40, 1) + 0.5)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(10, 24, dtype=torch.float64)
    weights = torch.randn(10, 40, dtype=torch.float64)
    values = ours(x)
    expected = theirs["last_layer"](nn.functional.normalize(theirs["mlp"](x), dim=-1, p=2))  # type: ignore[index]
    torch.testing.assert_close(values, expected)
    (values * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if name == "last_layer.weight_g" and norm_last_layer:
            assert a.grad is None
        else:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


@torch.no_grad()
def test_mlp_starts_normal_with_std_002_and_prototypes_like_linear() -> None:
    head = DINOHead(384, 2000)
    for index in (0, 2, 4):
        layer = head.mlp[index]
        assert isinstance(layer, nn.Linear)
        assert float(layer.weight.std()) == pytest.approx(0.02, rel=0.01)
        # a normal distribution has 68.3% within one std
        assert float((layer.weight.abs() < 0.02).double().mean()) == pytest.approx(0.683, abs=0.004)
        assert bool((layer.bias == 0).all())
    direction = head.last_layer.weight_v
    bound = 1 / 256**0.5  # uniform on (-1/sqrt(fan-in), 1/sqrt(fan-in))
    assert float(direction.abs().max()) <= bound
    assert float(direction.std()) == pytest.approx(bound / 3**0.5, rel=0.01)


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_prototype_norms_start_at_one_and_norm_last_layer_freezes_them(norm_last_layer: bool) -> None:
    config = tiny_config(norm_last_layer=norm_last_layer, freeze_last_layer=0)
    state = build_state(config, CPU)
    layer = state.method.student.head.last_layer
    assert bool((layer.weight_g == 1).all())
    run(config, 2, state)
    assert bool((layer.weight_g == 1).all()) is norm_last_layer
    assert (layer.weight_g.grad is None) is norm_last_layer


def test_normalised_features_are_float32_under_autocast() -> None:
    head, x = DINOHead(64, 50, hidden_dim=128, bottleneck_dim=256), torch.randn(20, 64)
    seen: list[Tensor] = []
    head.last_layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = head(x)
    assert seen[0].dtype is torch.float32
    assert float((seen[0].norm(dim=1) - 1).abs().max()) < 1e-5  # in bfloat16 the error is up to 0.004
    assert float((low - head(x)).detach().abs().max()) < 0.01
