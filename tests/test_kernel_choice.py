"""``--kernels auto``: what is tried, chosen, remembered and left out; trials in processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import CPU, tiny_config

from dino_xcit import kernel_choice
from dino_xcit.config import PretrainConfig
from dino_xcit.errors import InputError
from dino_xcit.kernel_choice import Trial, choose, fastest, try_in_process
from dino_xcit.methods import Method, build_method
from dino_xcit.models.xcit import XCIT_SIZES, XCiTSize
from dino_xcit.train import set_numerics

CUDA = torch.device("cuda")
FASTER, SLOWER, WRONG = Trial(10.0, 5.0, 0.001), Trial(10.0, 11.0, 0.001), Trial(10.0, 5.0, 1.0)
Trials = Callable[..., list[str]]


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Trials:
    """Function that sets the results of the candidates on a GPU, and returns the list of those tried from then on."""
    monkeypatch.setenv("DINO_XCIT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")

    def of(**results: Trial) -> list[str]:
        tried = []

        def stand_in(config: PretrainConfig, kernels: str, device: torch.device, seconds: float) -> Trial:
            tried.append(kernels)
            return results[kernels]

        monkeypatch.setattr(kernel_choice, "try_in_process", stand_in)
        return tried

    return of


@pytest.mark.parametrize(
    ("trial", "chosen", "said"),
    [
        (FASTER, "fused", "fused: 5.0 ms, eager 10.0 ms, 2.00 times as fast; gradients differ by 0.1%"),
        (SLOWER, "eager", "0.91 times as fast"),
        (WRONG, "eager", "gradients differ by 100.0%, more than 1%: left out"),
        (Trial(10.0, 5.0, float("nan")), "eager", "left out"),
        (
            Trial(0.0, 0.0, 0.0, "it failed with: out of memory"),
            "eager",
            "fused: left out, it failed with: out of memory",
        ),
    ],
)
def test_fastest_that_agrees_is_chosen(
    trial: Trial, chosen: str, said: str, trials: Trials, capsys: pytest.CaptureFixture[str]
) -> None:
    trials(fused=trial)
    assert fastest(tiny_config(), CUDA) == chosen
    printed = capsys.readouterr()
    assert said in printed.out + printed.err


def test_results_are_kept_for_the_same_shapes(trials: Trials) -> None:
    tried = trials(fused=FASTER)
    for batch in (8, 8, 16):
        assert fastest(tiny_config(batch_size_per_gpu=batch), CUDA) == "fused"
    assert tried == ["fused", "fused"]


def test_failure_is_tried_again(trials: Trials) -> None:
    tried = trials(fused=Trial(0.0, 0.0, 0.0, "it failed"))
    assert [fastest(tiny_config(), CUDA) for _ in range(2)] == ["eager", "eager"]
    assert tried == ["fused", "fused"]


def test_compile_is_tried_once_its_cache_is_warm(trials: Trials) -> None:
    tried = trials(fused=FASTER, compile=Trial(10.0, 2.0, 0.001))
    assert fastest(tiny_config(), CUDA) == "fused"
    assert choose(tiny_config(kernels="compile"), CUDA, {}).kernels == "compile"
    assert fastest(tiny_config(), CUDA) == "compile"
    assert tried == ["fused", "compile"]


@pytest.mark.parametrize(
    ("settings", "device", "stored", "chosen"),
    [
        ({}, CUDA, {"kernels": "fused"}, "fused"),
        ({}, CPU, {"kernels": "fused"}, "eager"),
        ({}, CPU, {}, "eager"),
        ({"deterministic": True}, CUDA, {}, "eager"),
        ({"arch": "timm:resnet18"}, CUDA, {}, "eager"),
        ({"kernels": "eager"}, CUDA, {"kernels": "fused"}, "eager"),
    ],
)
def test_nothing_is_tried(
    settings: dict[str, Any], device: torch.device, stored: dict[str, Any], chosen: str, trials: Trials
) -> None:
    tried = trials()
    assert choose(tiny_config(**settings), device, stored).kernels == chosen
    assert tried == []


def test_fused_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = pytest.importorskip("triton").knobs
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(InputError, match="kernels fused needs a GPU, but the device is cpu: expected --kernels eager"):
        set_numerics(tiny_config(kernels="fused"), CPU)


# ---- trials


@pytest.mark.process
def test_trial_in_a_process() -> None:
    found = try_in_process(tiny_config(), "eager", CPU, 60.0)
    assert (found.failed, found.difference) == ("", 0.0)
    assert found.ms > 0.0


@pytest.mark.process
def test_trial_that_fails_says_why() -> None:
    found = try_in_process(tiny_config(arch="xcit_pico_4_p4"), "fused", torch.device("cuda:7"), 60.0)
    assert found.failed.startswith("it failed with: ")
    assert try_in_process(tiny_config(), "eager", CPU, 0.0).failed == "it took more than 0 s"


def build_packed(config: PretrainConfig, device: torch.device) -> Method:
    method = build_method(config, device)
    method.student.pack_crops = True
    return method


@pytest.mark.parametrize(
    ("settings", "difference"),
    [({"activation_checkpointing": "on", "drop_path_rate": 0.2}, 2e-5), ({"precision": "fp16"}, 0.01)],
)
def test_kernels_agree_with_eager(settings: dict[str, Any], difference: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole DINO step, with crops of two sizes in one call as on a GPU."""
    pytest.importorskip("triton")
    monkeypatch.setitem(XCIT_SIZES, "xcit_2", XCiTSize(32, 2, 2, 1.0))
    monkeypatch.setattr(kernel_choice, "build_method", build_packed)
    monkeypatch.setattr(kernel_choice, "PASSES", 1)
    config = tiny_config(arch="xcit_2_p16", global_crops_size=48, local_crops_size=32, batch_size_per_gpu=2, **settings)
    assert 0.0 < kernel_choice.trial(config, "fused", CPU).difference < difference
