"""SyncBatchNorm on two ranks against BatchNorm in one process with both batches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from batch_norm_process import SHAPES, SIZES, batch_of, layer_of, run, run_lpi
from ranks import Server
from torch import nn

from dino_xcit.models import build_backbone
from dino_xcit.runtime.sync_batch_norm import SyncBatchNorm, convert_sync_batch_norm, synchronise_batch_norm


@pytest.fixture(scope="module")
def halves(server: Server, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of the two ranks of batch_norm_process.py."""
    out = tmp_path_factory.mktemp("halves") / "rank"
    server.two_ranks("batch_norm_process.py", out, timeout=120)
    return [torch.load(f"{out}-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", SHAPES)
def test_two_ranks_match_single_process_on_whole_batch(halves: list[dict[str, Any]], name: str) -> None:
    """Outputs, all gradients, running statistics and outputs in eval mode agree in float64."""
    whole = run(layer_of(name), batch_of(name))
    for key in ("y", "x.grad", "eval"):
        torch.testing.assert_close(torch.cat([half[name][key] for half in halves]), whole[key])
    for key in ("0.weight", "0.bias"):  # parameter gradients add up over the ranks
        torch.testing.assert_close(sum(half[name][key] for half in halves), whole[key])
    for half in halves:
        for key in ("0.running_mean", "0.running_var", "0.num_batches_tracked"):
            torch.testing.assert_close(half[name][key], whole[key])
    # Control: without synchronisation the outputs differ.
    alone = run(layer_of(name), batch_of(name).chunk(2)[0])
    assert not torch.allclose(alone["y"], whole["y"][:3], atol=0.1)


def test_channels_last_layout_is_preserved(halves: list[dict[str, Any]]) -> None:
    for key in ("y", "x.grad"):
        assert halves[0]["channels last"][key].is_contiguous(memory_format=torch.channels_last)


def test_bfloat16_inputs_accumulate_in_float32(halves: list[dict[str, Any]]) -> None:
    whole = run(layer_of("image"), batch_of("image").bfloat16().double())
    for half, rows in zip(halves, (slice(0, 3), slice(3, 6)), strict=True):
        assert half["bfloat16"]["y"].dtype == half["bfloat16"]["x.grad"].dtype == torch.bfloat16
        variance = half["bfloat16"]["0.running_var"]
        assert variance.dtype == torch.float32
        torch.testing.assert_close(variance.double(), whole["0.running_var"], rtol=1e-5, atol=0)
        torch.testing.assert_close(half["bfloat16"]["y"].double(), whole["y"][rows], rtol=0.02, atol=0.02)


def test_bfloat16_results_equal_those_of_torch_sync_batch_norm(halves: list[dict[str, Any]]) -> None:
    """The same kernels get the same arguments: outputs, gradients and running statistics agree bit for bit."""
    for half in halves:
        assert half["bfloat16"].keys() == half["pytorch"].keys()
        for key, expected in half["pytorch"].items():
            torch.testing.assert_close(half["bfloat16"][key], expected, rtol=0, atol=0)


def test_lpi_kernels_on_two_ranks_match_single_process(halves: list[dict[str, Any]]) -> None:
    pytest.importorskip("triton")
    whole, first = run_lpi([0, 1]), SIZES[0][0] * math.prod(SIZES[0][1])
    for key in ("y", "x.grad"):
        both = [half["lpi"][key] for half in halves]
        joined = torch.cat([one[:first] for one in both] + [one[first:] for one in both])
        torch.testing.assert_close(joined, whole[key], rtol=1e-4, atol=1e-5)
    for key in whole.keys() - {"y", "x.grad"}:
        ours = [half["lpi"][key] for half in halves]
        found = ours[0] if key.startswith("bn.running") or key == "bn.num_batches_tracked" else ours[0] + ours[1]
        torch.testing.assert_close(found, whole[key], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_blocks_share_one_graph_and_match_eager_blocks(server: Server, tmp_path: Path) -> None:
    server.two_ranks("batch_norm_process.py", tmp_path / "rank", "compiled", timeout=120)
    for rank in range(2):
        found = torch.load(f"{tmp_path}/rank-{rank}.pt", weights_only=True)["compiled"]
        assert (found["graphs"], found["breaks"]) == (1, 0)
        torch.testing.assert_close(*found["results"])


def test_convert_keeps_state_dict_and_converts_every_batch_norm() -> None:
    backbone = build_backbone("xcit_pico_4_p4")
    before = backbone.state_dict(keep_vars=True)
    norms = sum(isinstance(part, nn.BatchNorm2d) for part in backbone.modules())
    shared = convert_sync_batch_norm(backbone)
    after = shared.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert sum(isinstance(part, SyncBatchNorm) for part in shared.modules()) == norms > 0
    assert not any(isinstance(part, nn.BatchNorm2d) for part in shared.modules())


class WithActivation(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).relu()


def test_convert_leaves_subclasses_and_non_affine_layers_unchanged() -> None:
    module = nn.Sequential(WithActivation(3), nn.BatchNorm2d(3, affine=False))
    assert [type(part) for part in convert_sync_batch_norm(module)] == [WithActivation, nn.BatchNorm2d]


def test_synchronise_batch_norm_converts_on_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    module = synchronise_batch_norm(nn.Sequential(nn.BatchNorm2d(3)), torch.device("cuda"))
    assert [type(part) for part in module.children()] == [SyncBatchNorm]
