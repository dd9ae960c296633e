"""One of two ranks with half a batch each; started by test_sync_batch_norm.py.

batch_norm_process.py PREFIX_OF_OUTPUT_FILE [compiled]
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import warnings
from typing import Any

import batch_norm_kernels  # noqa: F401  # registers CPU kernels
import torch
import torch.distributed as dist
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as TorchSyncBatchNorm

from dino_xcit.models import build_backbone
from dino_xcit.models.xcit import LPI
from dino_xcit.runtime import distributed
from dino_xcit.runtime.sync_batch_norm import convert_sync_batch_norm

SIZES = (2, (3, 4)), (3, (2, 5))
"""Images for LPI on each rank, and their grids of tokens."""
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


class Reference(nn.BatchNorm2d):
    """The layer as ``torch.nn.SyncBatchNorm`` computes it on CUDA."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self.num_batches_tracked.add_(1)
        parameters = input, self.weight, self.bias, self.running_mean, self.running_var
        return TorchSyncBatchNorm.apply(*parameters, self.eps, self.momentum, dist.group.WORLD, dist.get_world_size())


def run_compiled() -> dict[str, Any]:
    """Return losses and gradients of a backbone, eager and compiled, and what Dynamo counted."""
    torch.manual_seed(distributed.rank())
    images = torch.randn(4, 3, 16, 16)
    torch.manual_seed(0)
    backbone = convert_sync_batch_norm(build_backbone("xcit_pico_4_p4")).train()
    start, results = copy.deepcopy(backbone.state_dict()), []
    for _ in range(2):
        backbone.zero_grad()
        loss = backbone(images).patch_tokens.square().mean()
        loss.backward()
        buffers = [buffer.clone() for buffer in backbone.buffers()]
        results.append([loss.detach(), backbone.get_parameter("blocks.0.local_mp.conv1.weight").grad, *buffers])
        backbone.load_state_dict(start)
        backbone.use_kernels("compile", "aot_eager")
    counters = torch._dynamo.utils.counters
    return {"results": results, "graphs": counters["stats"]["unique_graphs"], "breaks": len(counters["graph_break"])}


def run_lpi(ranks: list[int], kernels: bool = False) -> dict[str, Tensor]:
    """Run LPI forward and backward on the tokens of these ranks: for each size, those of one rank after another."""
    torch.manual_seed(0)
    lpi = LPI(32)
    nn.init.normal_(lpi.bn.weight)
    tokens = [[torch.randn(2, images * h * w, 32) for images, (h, w) in SIZES] for _ in range(2)]
    x, direction = torch.cat([tokens[rank][size] for size in range(2) for rank in ranks], dim=1)
    x.requires_grad_()
    sizes = [(images * len(ranks), grid) for images, grid in SIZES]
    if kernels:
        from dino_xcit.kernels.lpi import lpi as fused

        convert_sync_batch_norm(lpi)
        y = fused(x, sizes, lpi.conv1, lpi.bn, lpi.conv2.weight, lpi.conv2.bias)
    else:
        y = lpi(x, sizes)
    y.backward(direction)
    gradients = {name: parameter.grad for name, parameter in lpi.named_parameters() if parameter.grad is not None}
    return {"y": y.detach(), "x.grad": x.grad, **gradients, **dict(lpi.named_buffers())}  # type: ignore[dict-item]


def main() -> None:
    """Run every shape in float64, one with bfloat16 inputs, also by PyTorch's formulation, and the LPI kernels."""
    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"))
    rank = distributed.rank()
    halves = {name: batch_of(name).chunk(2)[rank] for name in SHAPES}
    layers = {name: convert_sync_batch_norm(layer_of(name)) for name in SHAPES}
    found: dict[str, Any] = {name: run(layers[name], halves[name]) for name in SHAPES}
    low = convert_sync_batch_norm(layer_of("image"))
    found["bfloat16"] = run(low.float(), halves["image"].bfloat16())
    reference = layer_of("image")
    reference[0].__class__ = Reference
    found["pytorch"] = run(reference.float(), halves["image"].bfloat16())
    if importlib.util.find_spec("triton"):
        found["lpi"] = run_lpi([rank], kernels=True)
    if sys.argv[2:] == ["compiled"]:
        found["compiled"] = run_compiled()
    torch.save(found, f"{sys.argv[1]}-{rank}.pt")
    distributed.barrier()
    distributed.stop()


if __name__ == "__main__":
    warnings.simplefilter("error", FutureWarning)
    main()
