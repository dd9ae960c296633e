"""Two gloo ranks with half the accumulation steps match one process with the same microbatch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from rank_process import LABELS, SCENARIOS, SCORES, monitors, probe, train
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
    """Results of the two ranks of rank_process.py."""
    out = tmp_path_factory.mktemp("ranks") / "rank"
    server.two_ranks("rank_process.py", out, timeout=180)
    return [torch.load(f"{out}-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Results of a single process, by scenario."""
    return {name: train(config, 0, 1) for name, config in SCENARIOS.items()}


def trainable(path: str) -> bool:
    """Return False for BatchNorm's running statistics: they are averaged over ranks, but chained over passes."""
    return not path.endswith(("running_mean", "running_var", "num_batches_tracked"))


@pytest.mark.parametrize("scenario", ["sgd", "accumulating"])
def test_sgd_on_two_ranks_matches_one_process(ranks: Seen, alone: dict[str, Any], scenario: str) -> None:
    one, two = alone[scenario], ranks[0][scenario]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    compared = 0
    for path, expected in one["learnt"].items():
        if trainable(path):
            torch.testing.assert_close(two["learnt"][path], expected, rtol=1e-5, atol=1e-6, msg=path)
            compared += 1
    assert compared > 400
    assert "/method/dino_loss/center" in one["learnt"]


def test_adamw_on_two_ranks_matches_one_process_up_to_rounding(ranks: Seen, alone: dict[str, Any]) -> None:
    """AdamW turns the sign of a gradient of 1e-9 into a full step, so a few parameters may differ."""
    one, two = alone["adamw"], ranks[0]["adamw"]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    both = ("/method/student", "/method/teacher")
    networks = [path for path in one["learnt"] if trainable(path) and path.startswith(both)]
    # in class attention, the gradient of the key bias is only rounding error
    networks = [path for path in networks if not ("cls_attn_blocks" in path and path.endswith("qkv.bias"))]
    off = torch.cat([(one["learnt"][path] - two["learnt"][path]).abs().flatten() for path in networks])
    assert float((off > 2e-5).double().mean()) < 0.002


def test_late_stop_flags_return_sums_of_previous_call_on_both_ranks(ranks: Seen) -> None:
    """On a GPU, StopFlags return late sums. All ranks make the same number of calls and leave at the same step."""
    for rank in ranks:
        sums = [{topic: count for topic, count in call.items() if count} for call in rank["late sums"]]
        assert sums == [{}, {"stop": 1}, {}, {"unreadable": 5, "diverged": 1}, {"stop": 2}]


@pytest.mark.parametrize("scenario", ["sgd", "accumulating"])
def test_two_ranks_split_the_images_of_one_process(ranks: Seen, alone: dict[str, Any], scenario: str) -> None:
    halves = [ranks[rank][scenario]["indices"] for rank in range(2)]
    dealt = [[part for pair in zip(*step, strict=True) for part in pair] for step in zip(*halves, strict=True)]
    assert dealt == alone[scenario]["indices"]


def test_ranks_have_bitwise_equal_state_and_losses(ranks: Seen) -> None:
    for scenario in SCENARIOS:
        assert differing_bits(ranks[0][scenario]["learnt"], ranks[1][scenario]["learnt"]) == []
        assert ranks[0][scenario]["losses"] == ranks[1][scenario]["losses"]
        assert ranks[0][scenario]["skipped"] == 0


def test_distributed_gathers_sums_and_broadcasts_over_two_ranks(ranks: Seen) -> None:
    assert [seen["world"] for seen in ranks] == [(0, 2, True), (1, 2, False)]
    for seen in ranks:
        assert torch.equal(seen["gathered"], torch.tensor([0.0, 0, 1, 1, 1, 1, 1])[:, None].expand(7, 4))
        assert torch.equal(seen["gathered none"], torch.ones(2, 1))
        assert torch.equal(seen["summed"][0], torch.full((3,), 3.0))
        assert float(seen["summed"][1]) == 10.0
        assert seen["decided"] == ["no data", None]


def test_sinkhorn_knopp_normalises_over_rows_of_both_ranks(ranks: Seen) -> None:
    together = torch.cat([seen["sinkhorn"] for seen in ranks])
    torch.testing.assert_close(together, sinkhorn_knopp(SCORES))
    assert not torch.allclose(together[:5], sinkhorn_knopp(SCORES[:5]), atol=0.01)


def test_monitors_measure_rows_of_both_ranks(ranks: Seen) -> None:
    assert ranks[0]["monitors"] == pytest.approx(monitors(SCORES), rel=1e-5)
    assert ranks[1]["monitors"] == ranks[0]["monitors"]


def test_online_probe_of_two_ranks_equals_that_of_all_rows(ranks: Seen) -> None:
    alone = probe(SCORES, LABELS)
    assert ranks[0]["probe"]["probe_loss"] == pytest.approx(alone.pop("probe_loss"), rel=1e-5)
    for name, expected in alone.items():
        torch.testing.assert_close(ranks[0]["probe"][name], expected)
        assert torch.equal(ranks[0]["probe"][name], ranks[1]["probe"][name])


def test_synchronise_batch_norm_keeps_module_in_single_cpu_process() -> None:
    module = nn.Sequential(nn.BatchNorm2d(3))
    assert synchronise_batch_norm(module, CPU) is module
    assert not any(isinstance(part, SyncBatchNorm) for part in module.modules())


def test_choose_device_without_gpu_uses_cpu_and_refuses_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.choose_device("auto") == CPU
    assert distributed.choose_device("cpu") == CPU
    with pytest.raises(ValueError, match="--device cpu"):
        distributed.choose_device("cuda")


@pytest.mark.parametrize("built_for", ["13.0", None])
def test_gpu_that_pytorch_cannot_use_is_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], built_for: str | None
) -> None:
    """An old driver, or a build without CUDA: ``auto`` warns and takes the CPU, ``cuda`` refuses."""
    told = RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", Mock(side_effect=told))
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [self / "nvidia0"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cause = "too old .found version 11040." if built_for else "built without CUDA"
    with pytest.raises(InputError, match=cause):
        distributed.choose_device("cuda")
    assert distributed.choose_device("auto") == CPU
    assert re.search(cause, capsys.readouterr().out)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert distributed.choose_device("auto") == CPU
    assert capsys.readouterr().out == ""


def test_missing_deterministic_kernel_is_an_error_of_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    told = (
        "upsample_bicubic2d_aa_backward_out_cuda does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation, or ..."
    )
    with pytest.raises(SystemExit) as ended:
        distributed.run_command(Mock(side_effect=RuntimeError(told)))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "omit --deterministic" in said


# ---- more ranks than GPUs


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Environment of the third rank on a machine with two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    return monkeypatch


def test_missing_gpu_error_names_flags_of_torchrun_or_run_slurm(third: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="PyTorch finds 2; lower torchrun's --nproc-per-node to 2"):
        distributed.choose_device("auto")
    third.setenv("SUBMITIT_EXECUTOR", "slurm")
    with pytest.raises(InputError, match=r"run_slurm\.py --gpus-per-node 3 or more, or leave --tasks-per-node out"):
        distributed.choose_device("auto")
    third.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"or give run_slurm\.py --gpus-per-node"):
        distributed.choose_device("cuda")
