"""Activation checkpointing and torch.compile leave the training results unchanged."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_run import CPU, differing_bits, learnt, run, tensors_of, tiny_config
from torch import Tensor, nn

import run_pretrain
from dino_xcit import recompute
from dino_xcit.cli import parse
from dino_xcit.config import PretrainConfig
from dino_xcit.data.loader import Batch
from dino_xcit.errors import InputError
from dino_xcit.models import build_backbone
from dino_xcit.optim import Rates
from dino_xcit.recompute import Costs, fit_into_memory
from dino_xcit.train import TrainState, build_state
from supervised.finetune_config import FinetuneConfig
from supervised.method import load_initial_weights


@pytest.mark.parametrize(("precision", "accumulation"), [("fp32", 1), ("bf16", 2)])
def test_activation_checkpointing_leaves_training_bit_identical(precision: str, accumulation: int) -> None:
    """This includes the running statistics of BatchNorm: each block runs twice but must update them once."""
    config = tiny_config(precision=precision, accumulation_steps=accumulation)
    kept, _ = run(config, 2)
    again, _ = run(dataclasses.replace(config, activation_checkpointing="on"), 2)
    assert any("num_batches_tracked" in name for name in learnt(kept))
    assert differing_bits(learnt(kept), learnt(again)) == []


def bytes_kept(recompute: bool) -> int:
    """Return the bytes that autograd saves in a forward pass, without the parameters."""
    backbone = build_backbone("xcit_pico_4_p4", drop_path_rate=0.1)
    backbone.recomputed_stages = recompute * backbone.stages
    own = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        backbone(torch.randn(4, 3, 64, 64))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for place, size in storages.items() if place not in own)


def test_activation_checkpointing_at_least_halves_saved_memory() -> None:
    assert bytes_kept(recompute=True) < 0.5 * bytes_kept(recompute=False)


@pytest.mark.parametrize(("setting", "value"), [("activation_checkpointing", "auto"), ("kernels", "fused")])
def test_timm_architecture_is_refused_with_checkpointing_and_kernels(setting: str, value: object) -> None:
    with pytest.raises(InputError, match=setting):
        PretrainConfig(arch="timm:resnet18", **{setting: value})  # type: ignore[arg-type]


def test_supervised_run_refuses_auto() -> None:
    with pytest.raises(InputError, match="expected on or off"):
        load_initial_weights(FinetuneConfig(weights="none", arch="xcit_pico_4_p16", activation_checkpointing="auto"))


@pytest.mark.parametrize(("words", "value"), [("", "on"), (" true", "on"), (" auto", "auto"), ("=off", "off")])
def test_flag_needs_no_value(words: str, value: str) -> None:
    argv = f"--activation-checkpointing{words} --epochs 3".split()
    assert parse(PretrainConfig, argv, "test").activation_checkpointing == value
    assert parse(PretrainConfig, ["--no-activation-checkpointing"], "test").activation_checkpointing == "off"


def test_fewest_stages_that_fit_are_recomputed() -> None:
    costs = Costs(base=10, plain=8, stem=6, full=2)
    assert [costs.needed(10, stages, 4) for stages in range(6)] == [90, 70, 60, 50, 40, 30]
    assert [costs.fewest_stages(10, 4, total) for total in (100, 99, 78, 77, 33, 1)] == [0, 1, 1, 2, 5, 5]


def test_auto_measures_memory_and_changes_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in for the peaks: 10 MB, and for each image 3 MB less 1 for the stem and 0.4 for each block."""
    config = tiny_config(activation_checkpointing="auto", batch_size_per_gpu=16)
    state, untouched = build_state(config, CPU), build_state(config, CPU)
    student = state.method.student.backbone  # type: ignore[union-attr]
    images: list[int] = []
    forward_backward = state.method.forward_backward

    def recorded(batch: Batch, rates: Rates) -> object:
        images.append(len(batch.indices))
        return forward_backward(batch, rates)

    def peak(device: torch.device) -> int:
        stages = student.recomputed_stages
        each = 3_000_000 - (600_000 + 400_000 * stages if stages else 0)
        return 10_000_000 + images[-1] * each

    monkeypatch.setattr(state.method, "forward_backward", recorded)
    monkeypatch.setattr(recompute, "peak_memory", peak)
    moments = 2 * sum(p.nbytes for p in state.method.trained.parameters() if p.requires_grad)
    monkeypatch.setattr(recompute, "total_memory", lambda device: (10_000_000 + moments + 16 * 1_300_000) / 0.9)
    fit_into_memory(state, config, CPU)
    assert images == [2, 4] * 4
    assert student.recomputed_stages == 3  # 3 - 1 - 2 x 0.4 = 1.2 MB; with one block 1.6
    assert differing_bits(learnt(untouched), learnt(state)) == []
    assert all(parameter.grad is None for parameter in state.method.trained.parameters())


def test_auto_leaves_training_bit_identical(tmp_path: Path) -> None:
    settings = {"data_path": "sample:fashion-mnist", "max_steps": 2, "num_workers": 0}
    plain, fitted = (
        run_pretrain.train(
            tiny_config(activation_checkpointing=how, output_dir=str(tmp_path / how), **settings), CPU, ()
        )
        for how in ("off", "auto")
    )
    assert differing_bits(learnt(plain), learnt(fitted)) == []


def graphs(config: PretrainConfig, steps: int) -> tuple[TrainState, list[nn.Module]]:
    """Train with Dynamo and AOTAutograd but eager kernels, in seconds; return the state and the compiled graphs."""
    torch._dynamo.reset()
    made: list[nn.Module] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        made.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    state = build_state(config, CPU)
    for network in (state.method.student, state.method.teacher):
        network.backbone.use_kernels("compile", backend)  # type: ignore[operator]
    run(config, steps, state)
    return state, made


def test_compiled_run_matches_eager_run_and_compiles_once_per_shape() -> None:
    config = tiny_config(drop_path_rate=0.2)
    plain, _ = run(config, 2)
    state, made = graphs(config, 2)
    # Student on global and local crops, teacher on global crops; all blocks of a network share a graph.
    assert len(made) == 3
    found, expected = (tensors_of(one.method.state_dict()) for one in (state, plain))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    backbone = state.method.teacher.backbone.eval()
    with torch.no_grad():
        backbone(torch.randn(3, 3, 36, 28))
    assert len(made) == 3  # evaluation runs eagerly at any image size
    torch._dynamo.reset()


def test_kernels_setting_applies_to_student_and_teacher() -> None:
    method = build_state(tiny_config(kernels="compile"), CPU).method  # compilation starts with the first step
    assert (method.student.backbone.kernels, method.teacher.backbone.kernels) == ("compile", "compile")


@pytest.mark.slow
def test_compiled_bf16_run_with_checkpointing_matches_uncompiled_run() -> None:
    """Use the C++ compiler, which takes about a minute.

    The optimizer is SGD: the first update of AdamW is the sign of the gradient, which rounding flips near 0.
    """
    torch._dynamo.reset()
    config = tiny_config(precision="bf16", kernels="compile", activation_checkpointing="on", optimizer="sgd", lr=0.05)
    _, found = run(config, 2)
    _, expected = run(dataclasses.replace(config, kernels="eager"), 2)
    assert float(found[1].loss) < 0.8 * float(found[0].loss)
    for a, b in zip(found, expected, strict=True):
        assert bool(a.accepted)
        assert float(a.loss) == pytest.approx(float(b.loss), rel=0.02)
    torch._dynamo.reset()
