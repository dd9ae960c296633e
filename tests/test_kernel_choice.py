"""``--kernels auto``: what is tried, chosen, remembered and left out; trials in processes of their own."""

from __future__ import annotations

import dataclasses
import json
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

    def of(**results: Trial | str) -> list[str]:
        tried = []

        def stand_in(config: PretrainConfig, kernels: str, device: torch.device, seconds: float) -> Trial | str:
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
        (WRONG, "eager", "gradients differ by 100.0%, more than 10%: left out"),
        (Trial(10.0, 5.0, float("nan")), "eager", "left out"),
        (
            "it failed with: out of memory",
            "eager",
            "fused: left out, it failed with: out of memory",
        ),
    ],
)
def test_fastest_that_agrees_is_chosen(
    trial: Trial | str, chosen: str, said: str, trials: Trials, capsys: pytest.CaptureFixture[str]
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
    tried = trials(fused="it failed")
    assert [fastest(tiny_config(), CUDA) for _ in range(2)] == ["eager", "eager"]
    assert tried == ["fused", "fused"]


def test_compile_is_tried_once_its_cache_is_warm(trials: Trials) -> None:
    tried = trials(fused=FASTER, compile=Trial(10.0, 2.0, 0.001))
    assert fastest(tiny_config(), CUDA) == "fused"
    assert choose(tiny_config(kernels="compile"), CUDA, {}).kernels == "compile"
    assert fastest(tiny_config(), CUDA) == "compile"
    assert tried == ["fused", "compile"]


def test_compile_that_fails_is_not_tried_again(trials: Trials) -> None:
    tried = trials(fused=FASTER, compile="it took more than 60 s")
    choose(tiny_config(kernels="compile"), CUDA, {})
    assert [fastest(tiny_config(), CUDA) for _ in range(2)] == ["fused", "fused"]
    assert tried == ["fused", "compile"]


@pytest.mark.parametrize("entry", [True, None, {}, [1.0, 2.0], [1.0, 2.0, "0.1"]])
def test_foreign_entry_is_measured_again(entry: object, trials: Trials, tmp_path: Path) -> None:
    tried = trials(fused=FASTER)
    fastest(tiny_config(), CUDA)
    file = tmp_path / "kernels.json"
    file.write_text(json.dumps(dict.fromkeys(json.loads(file.read_text()), entry)))
    assert fastest(tiny_config(), CUDA) == "fused"
    assert tried == ["fused", "fused"]


def test_ranks_do_not_wait_longer_than_the_hang_timeout(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    trials()
    given = []
    monkeypatch.setattr(kernel_choice, "try_in_process", lambda *words: given.append(words[-1]) or "late")
    fastest(tiny_config(hang_timeout=10.0), CUDA)
    assert 9.0 < given[0] <= 10.0


@pytest.mark.parametrize(
    ("settings", "device", "stored", "chosen"),
    [
        ({}, CUDA, {"kernels": "compile"}, "compile"),
        ({}, CPU, {"kernels": "fused"}, "auto"),
        ({}, CPU, {}, "auto"),
        ({"deterministic": True}, CUDA, {}, "auto"),
        ({"arch": "timm:resnet18"}, CUDA, {}, "auto"),
        ({"kernels": "eager"}, CUDA, {"kernels": "fused"}, "eager"),
    ],
)
def test_nothing_is_tried(
    settings: dict[str, Any], device: torch.device, stored: dict[str, Any], chosen: str, trials: Trials
) -> None:
    tried = trials()
    config = choose(tiny_config(**settings), device, stored)
    assert (config.kernels, tried) == (chosen, [])


def test_auto_without_a_choice_is_eager() -> None:
    method = build_method(tiny_config(), CPU)
    assert (method.kernels, method.student.backbone.kernels) == ("eager", "eager")  # type: ignore[attr-defined]


def test_fused_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = pytest.importorskip("triton").knobs
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(InputError, match="kernels fused needs a GPU, but the device is cpu: expected --kernels eager"):
        set_numerics(tiny_config(kernels="fused"), CPU)


# ---- trials


@pytest.mark.process
def test_trial_in_a_process() -> None:
    found = try_in_process(tiny_config(), "eager", CPU, 60.0)
    assert isinstance(found, Trial), found
    assert found.difference == 0.0
    assert found.ms > 0.0


@pytest.mark.process
def test_trial_that_fails_says_why() -> None:
    found = try_in_process(tiny_config(), "nonsense", CPU, 60.0)  # type: ignore[arg-type]
    assert found == "it failed with: ValueError: kernels is 'nonsense', expected eager, compile or fused"
    assert try_in_process(tiny_config(), "eager", CPU, 0.0) == "it took more than 0 s"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> PretrainConfig:
    """Settings of a network with LayerScale 1e-5, which runs once for crops of two sizes, as on a GPU."""
    pytest.importorskip("triton")

    def build_packed(config: PretrainConfig, device: torch.device) -> Method:
        method = build_method(config, device)
        method.student.pack_crops = True
        return method

    monkeypatch.setitem(XCIT_SIZES, "xcit_2", XCiTSize(32, 2, 2, 1e-5))
    monkeypatch.setattr(kernel_choice, "build_method", build_packed)
    monkeypatch.setattr(kernel_choice, "PASSES", 1)
    return tiny_config(arch="xcit_2_p16", global_crops_size=48, local_crops_size=32, batch_size_per_gpu=2)


@pytest.mark.parametrize(
    ("settings", "difference"),
    [({"activation_checkpointing": "on", "drop_path_rate": 0.2}, 2e-5), ({"precision": "fp16"}, 0.02)],
)
def test_kernels_agree_with_eager(settings: dict[str, Any], difference: float, small: PretrainConfig) -> None:
    found = kernel_choice.trial(dataclasses.replace(small, **settings), "fused", CPU)
    assert 0.0 < found.difference < difference


@pytest.mark.parametrize(("name", "factor"), [("lpi", 0.0), ("attention", -1.0)])
def test_wrong_kernel_is_found(
    name: str, factor: float, small: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dino_xcit.kernels import block

    right = getattr(block, name)
    monkeypatch.setattr(block, name, lambda *inputs: factor * right(*inputs))
    assert kernel_choice.trial(small, "fused", CPU).difference > 1.0
