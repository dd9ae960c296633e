"""XCiT in low precision, under autocast, and with values that could divide by zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dino_xcit.models import build_backbone
from dino_xcit.models.xca import XCA


def error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_backbone_in_low_precision_throughout_still_runs(dtype: torch.dtype) -> None:
    model = build_backbone("xcit_pico_4_p8").eval()
    images = torch.randn(2, 3, 40, 24)
    with torch.no_grad():
        expected = model(images).cls_token
        found = model.to(dtype)(images.to(dtype)).cls_token
    assert found.dtype is dtype
    assert float((found.float() - expected).norm() / expected.norm()) < 0.1


class SeenTypes(TorchDispatchMode):
    """The element types that operators really compute in, below autocast: their inputs', or the one they are told."""

    def __init__(self) -> None:
        super().__init__()
        self.types: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {arg.dtype for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()}
        if kwargs and isinstance(kwargs.get("dtype"), torch.dtype):
            given = {kwargs["dtype"]}
        self.types.setdefault(func.overloadpacket.__name__, set()).update(given)
        return func(*args, **(kwargs or {}))


def test_under_autocast_xca_takes_its_norms_and_softmax_in_float32() -> None:
    xca = XCA(64, 4)
    with SeenTypes() as seen, torch.autocast("cpu", torch.bfloat16):
        xca(torch.randn(2, 50, 64))
    assert seen.types["_softmax"] == {torch.float32}
    norms = {name for name in seen.types if "norm" in name or name in ("sum", "mean", "square", "pow", "sqrt")}
    assert norms
    for name in norms:
        assert seen.types[name] == {torch.float32}, name


def test_under_autocast_xca_stays_near_float64_over_many_tokens() -> None:
    """8-bit sums over 3000 tokens would be off by far more than the rounding of the inputs."""
    xca = XCA(64, 4)
    with torch.no_grad():
        xca.qkv.weight.mul_(10)
        xca.temperature.fill_(5.0)
    x = torch.randn(1, 3000, 64) + 1.0
    with torch.no_grad():
        exact = XCA(64, 4).double()
        exact.load_state_dict({key: value.double() for key, value in xca.state_dict().items()})
        reference = exact(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            low = xca(x)
        assert error(xca(x).double(), reference) < 1e-5
    assert error(low.double(), reference) < 0.02
