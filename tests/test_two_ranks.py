"""Two gloo processes at half the passes equal one process, at the same microbatch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rank_process import SCENARIOS, SCORES, train
from ranks import Server
from tiny_run import CPU, differing_bits
from torch import nn

from dino_xcit.errors import InputError
from dino_xcit.methods.dino import sinkhorn_knopp
from dino_xcit.runtime import distributed
from dino_xcit.runtime.sync_batch_norm import SyncBatchNorm, synchronise_batch_norm

Seen = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What each of two processes saw."""
    out = tmp_path_factory.mktemp("ranks") / "rank"
    server.two_ranks("rank_process.py", out, timeout=180)
    return [torch.load(f"{out}-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one process saw, scenario by scenario."""
    return {name: train(config, 0, 1) for name, config in SCENARIOS.items()}


def trainable(path: str) -> bool:
    """Parameters and centre: BatchNorm's running statistics are averaged over processes, not chained over passes."""
    return not path.endswith(("running_mean", "running_var", "num_batches_tracked"))


@pytest.mark.parametrize("scenario", ["sgd", "accumulating"])
def test_two_processes_learn_what_one_learns(ranks: Seen, alone: dict[str, Any], scenario: str) -> None:
    one, two = alone[scenario], ranks[0][scenario]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    compared = 0
    for path, expected in one["learnt"].items():
        if trainable(path):
            torch.testing.assert_close(two["learnt"][path], expected, rtol=1e-5, atol=1e-6, msg=path)
            compared += 1
    assert compared > 400
    assert "/method/dino_loss/center" in one["learnt"]


def test_adamw_agrees_but_for_gradients_that_are_only_rounding(ranks: Seen, alone: dict[str, Any]) -> None:
    """AdamW turns the sign of a gradient of 1e-9 into a whole step: parameters agree, but for a few."""
    one, two = alone["adamw"], ranks[0]["adamw"]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    both = ("/method/student", "/method/teacher")
    networks = [path for path in one["learnt"] if trainable(path) and path.startswith(both)]
    # the keys' bias of class attention has no gradient but rounding
    networks = [path for path in networks if not ("cls_attn_blocks" in path and path.endswith("qkv.bias"))]
    off = torch.cat([(one["learnt"][path] - two["learnt"][path]).abs().flatten() for path in networks])
    assert float((off > 2e-5).double().mean()) < 0.002


def test_late_sums_are_those_of_the_call_before_and_the_same_on_both(ranks: Seen) -> None:
    """What a GPU run acts on; the number of calls is the same on both, so both leave at the same one."""
    for rank in ranks:
        sums = [{topic: count for topic, count in call.items() if count} for call in rank["late sums"]]
        assert sums == [{}, {"stop": 1}, {}, {"unreadable": 5, "diverged": 1}, {"stop": 2}]


@pytest.mark.parametrize("scenario", ["sgd", "accumulating"])
def test_each_process_sees_its_half_of_the_same_images(ranks: Seen, alone: dict[str, Any], scenario: str) -> None:
    halves = [ranks[rank][scenario]["indices"] for rank in range(2)]
    dealt = [[part for pair in zip(*step, strict=True) for part in pair] for step in zip(*halves, strict=True)]
    assert dealt == alone[scenario]["indices"]


def test_all_processes_hold_the_same_bits(ranks: Seen) -> None:
    for scenario in SCENARIOS:
        assert differing_bits(ranks[0][scenario]["learnt"], ranks[1][scenario]["learnt"]) == []
        assert ranks[0][scenario]["losses"] == ranks[1][scenario]["losses"]
        assert ranks[0][scenario]["skipped"] == 0


def test_processes_know_themselves_and_share_rows_sums_and_decisions(ranks: Seen) -> None:
    assert [seen["world"] for seen in ranks] == [(0, 2, True), (1, 2, False)]
    for seen in ranks:
        assert torch.equal(seen["gathered"], torch.tensor([0.0, 0, 1, 1, 1, 1, 1])[:, None].expand(7, 4))
        assert torch.equal(seen["gathered none"], torch.ones(2, 1))
        assert torch.equal(seen["summed"][0], torch.full((3,), 3.0))
        assert float(seen["summed"][1]) == 10.0
        assert seen["decided"] == ["no data", None]


def test_sinkhorn_knopp_spreads_the_rows_of_both_processes(ranks: Seen) -> None:
    together = torch.cat([seen["sinkhorn"] for seen in ranks])
    torch.testing.assert_close(together, sinkhorn_knopp(SCORES))
    assert not torch.allclose(together[:5], sinkhorn_knopp(SCORES[:5]), atol=0.01)


def test_batchnorm_is_synchronised_only_where_that_can_run() -> None:
    module = nn.Sequential(nn.BatchNorm2d(3))
    assert synchronise_batch_norm(module, CPU) is module
    assert not any(isinstance(part, SyncBatchNorm) for part in module.modules())


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.choose_device("auto") == CPU
    assert distributed.choose_device("cpu") == CPU
    with pytest.raises(ValueError, match="--device cpu"):
        distributed.choose_device("cuda")


# ---- a process without a GPU of its own


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The third process of a machine with two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    return monkeypatch


def test_the_flags_of_torchrun_or_of_the_launcher_are_named(third: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="PyTorch finds 2; lower torchrun's --nproc-per-node to 2"):
        distributed.choose_device("auto")
    third.setenv("SUBMITIT_EXECUTOR", "slurm")
    with pytest.raises(InputError, match=r"run_slurm\.py --gpus-per-node 3 or more, or leave --tasks-per-node out"):
        distributed.choose_device("auto")
    third.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"or give run_slurm\.py --gpus-per-node"):
        distributed.choose_device("cuda")
