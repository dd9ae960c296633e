"""Two gloo processes at half the passes equal one process, at the same microbatch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rank_process import SCENARIOS, SCORES, train
from ranks import Server
from tiny_run import CPU, differing_bits, tiny_config
from torch import nn

from dino_xcit.methods.dino import sinkhorn_knopp
from dino_xcit.runtime import distributed
from dino_xcit.runtime.sync_batch_norm import SyncBatchNorm, synchronise_batch_norm
from dino_xcit.train import build_state


@pytest.fixture(scope="module")
def ranks(server: Server, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes saw."""
    out = tmp_path_factory.mktemp("ranks") / "rank"
    server.two_ranks("rank_process.py", out, timeout=180)
    return [torch.load(f"{out}-{rank}.pt", weights_only=False) for rank in range(2)]


def trainable(path: str) -> bool:
    """Parameters and centre: BatchNorm's running statistics are averaged over processes, not chained over passes."""
    return not path.endswith(("running_mean", "running_var", "num_batches_tracked"))


@pytest.mark.parametrize("scenario", ["sgd", "accumulating"])
def test_two_processes_learn_what_one_learns(ranks: list[dict[str, Any]], scenario: str) -> None:
    one, two = train(SCENARIOS[scenario], 0, 1), ranks[0][scenario]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    compared = 0
    for path, expected in one["learnt"].items():
        if trainable(path):
            torch.testing.assert_close(two["learnt"][path], expected, rtol=1e-5, atol=1e-6, msg=path)
            compared += 1
    assert compared > 400
    assert "/method/dino_loss/center" in one["learnt"]


def test_adamw_agrees_but_for_gradients_that_are_only_rounding(ranks: list[dict[str, Any]]) -> None:
    """AdamW turns the sign of a gradient of 1e-9 into a whole step: parameters agree, but for a few."""
    one, two = train(SCENARIOS["adamw"], 0, 1), ranks[0]["adamw"]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    both = ("/method/student", "/method/teacher")
    networks = [path for path in one["learnt"] if trainable(path) and path.startswith(both)]
    # the keys' bias of class attention has no gradient but rounding
    networks = [path for path in networks if not ("cls_attn_blocks" in path and path.endswith("qkv.bias"))]
    off = torch.cat([(one["learnt"][path] - two["learnt"][path]).abs().flatten() for path in networks])
    assert float((off > 2e-5).double().mean()) < 0.002


def test_late_sums_are_those_of_the_call_before_and_the_same_on_both(ranks: list[dict[str, Any]]) -> None:
    """What a GPU run acts on; the number of calls is the same on both, so both leave at the same one."""
    for rank in ranks:
        sums = [{topic: count for topic, count in call.items() if count} for call in rank["late sums"]]
        assert sums == [{}, {"stop": 1}, {}, {"unreadable": 5, "diverged": 1}, {"stop": 2}]


def test_each_process_sees_its_half_of_the_same_images(ranks: list[dict[str, Any]]) -> None:
    for scenario in ("sgd", "accumulating"):
        one = train(SCENARIOS[scenario], 0, 1)["indices"]
        halves = [ranks[rank][scenario]["indices"] for rank in range(2)]
        dealt = [[part for pair in zip(*step, strict=True) for part in pair] for step in zip(*halves, strict=True)]
        assert dealt == one


def test_all_processes_hold_the_same_bits(ranks: list[dict[str, Any]]) -> None:
    for scenario in SCENARIOS:
        assert differing_bits(ranks[0][scenario]["learnt"], ranks[1][scenario]["learnt"]) == []
        assert ranks[0][scenario]["losses"] == ranks[1][scenario]["losses"]
        assert ranks[0][scenario]["skipped"] == 0


@pytest.mark.parametrize("fault", ["image", "teacher"])
def test_a_number_that_is_not_finite_on_one_process_skips_the_step_on_both(
    ranks: list[dict[str, Any]], fault: str
) -> None:
    for rank in range(2):
        clean, bad, next_clean = ranks[rank][f"bad {fault}"]
        assert [step["accepted"] for step in (clean, bad, next_clean)] == [True, False, True]
        assert [step["skipped"] for step in (clean, bad, next_clean)] == [0, 1, 1]
        assert differing_bits(clean["learnt"], bad["learnt"]) == []
        assert differing_bits(bad["learnt"], next_clean["learnt"]) != []
    final = [ranks[rank][f"bad {fault}"][2]["learnt"] for rank in range(2)]
    assert differing_bits(*final) == []
    assert all(bool(torch.isfinite(value).all()) for value in final[0].values())


def test_processes_know_themselves_and_share_rows_sums_and_decisions(ranks: list[dict[str, Any]]) -> None:
    assert [seen["world"] for seen in ranks] == [(0, 2, True), (1, 2, False)]
    for seen in ranks:
        assert torch.equal(seen["gathered"], torch.tensor([0.0, 0, 1, 1, 1, 1, 1])[:, None].expand(7, 4))
        assert torch.equal(seen["gathered none"], torch.ones(2, 1))
        assert torch.equal(seen["summed"][0], torch.full((3,), 3.0))
        assert float(seen["summed"][1]) == 10.0
        assert seen["decided"] == ["no data", None]


def test_sinkhorn_knopp_spreads_the_rows_of_both_processes(ranks: list[dict[str, Any]]) -> None:
    together = torch.cat([seen["sinkhorn"] for seen in ranks])
    torch.testing.assert_close(together, sinkhorn_knopp(SCORES))
    assert not torch.allclose(together[:5], sinkhorn_knopp(SCORES[:5]), atol=0.01)


def test_one_process_needs_none_of_it() -> None:
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    rows = torch.randn(3, 2)
    assert torch.equal(distributed.gather_rows(rows), rows)
    distributed.all_reduce_sum([rows])
    distributed.barrier()
    assert distributed.broadcast_from_main("x") == "x"
    state = build_state(tiny_config(), CPU)
    assert state.method.ddp_student is state.method.student


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
