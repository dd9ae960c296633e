"""One of two ranks with half a batch each; started by test_sync_batch_norm.py with the prefix of its output file."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from dino_xcit.runtime import distributed
from dino_xcit.runtime.sync_batch_norm import convert_sync_batch_norm

SHAPES = {"image": (6, 5, 4, 3), "channels last": (6, 5, 4, 3), "rows": (6, 5), "timm": (6, 5, 4, 3)}


def batch_of(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a batch whose channels differ in std; the second half has another mean."""
    shape = SHAPES[name]
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    x = x * torch.arange(1, 6).view(1, 5, *[1] * (len(shape) - 2)) + 3
    x[3:] += 2
    return x.to(memory_format=torch.channels_last) if name == "channels last" else x


def layer_of(name: str) -> nn.Module:
    """Return a layer with non-default weight and bias, the same on every rank."""
    kinds = {"rows": nn.BatchNorm1d, "timm": BatchNormAct2d}  # BatchNormAct2d applies ReLU in place
    layer = kinds.get(name, nn.BatchNorm2d)(5)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, 5))
        layer.bias.copy_(torch.linspace(-1, 1, 5))
    return nn.Sequential(layer).double()


def run(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Run forward and backward twice with a nonlinear loss; return outputs, gradients, buffers and eval outputs."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    for _ in range(2):
        y = layer(x)
        (y.sin() * torch.arange(1, 6).view(1, 5, *[1] * (x.dim() - 2))).sum().backward()
    assert x.grad is not None
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
    buffers = dict(layer.named_buffers())
    return {"y": y.detach(), "x.grad": x.grad, **gradients, **buffers, "eval": layer.eval()(x).detach()}


def main() -> None:
    """Run every shape in float64, and one with bfloat16 inputs."""
    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"))
    rank = distributed.rank()
    halves = {name: batch_of(name).chunk(2)[rank] for name in SHAPES}
    layers = {name: convert_sync_batch_norm(layer_of(name)) for name in SHAPES}
    found: dict[str, Any] = {name: run(layers[name], halves[name]) for name in SHAPES}
    low = convert_sync_batch_norm(layer_of("image"))
    found["bfloat16"] = run(low.float(), halves["image"].bfloat16())
    torch.save(found, f"{sys.argv[1]}-{rank}.pt")
    distributed.barrier()
    distributed.stop()


if __name__ == "__main__":
    warnings.simplefilter("error", FutureWarning)
    main()
