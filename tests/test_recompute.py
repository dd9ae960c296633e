"""Activation checkpointing and torch.compile: less memory or other kernels, and the same training."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_run import CPU, differing_bits, learnt, run, tensors_of, tiny_config
from torch import Tensor, nn

from dino_xcit.config import PretrainConfig
from dino_xcit.errors import InputError
from dino_xcit.models import build_backbone
from dino_xcit.train import TrainState, build_state


@pytest.mark.parametrize(("precision", "accumulation"), [("fp32", 1), ("bf16", 2)])
def test_recomputing_leaves_every_bit_of_the_training_as_it_is(precision: str, accumulation: int) -> None:
    """BatchNorm's running statistics among them: each block runs twice, and they may change once."""
    config = tiny_config(precision=precision, accumulation_steps=accumulation)
    kept, _ = run(config, 2)
    again, _ = run(dataclasses.replace(config, activation_checkpointing=True), 2)
    assert any("num_batches_tracked" in name for name in learnt(kept))
    assert differing_bits(learnt(kept), learnt(again)) == []


def bytes_kept(recompute: bool) -> int:
    """What autograd keeps of a forward pass, parameters aside."""
    backbone = build_backbone("xcit_pico_4_p4", drop_path_rate=0.1)
    backbone.activation_checkpointing = recompute  # type: ignore[assignment]
    own = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        backbone(torch.randn(4, 3, 64, 64))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for place, size in storages.items() if place not in own)


def test_recomputing_keeps_less() -> None:
    assert bytes_kept(recompute=True) < 0.5 * bytes_kept(recompute=False)


@pytest.mark.parametrize("setting", ["activation_checkpointing", "compile"])
def test_timm_networks_are_refused(setting: str) -> None:
    with pytest.raises(InputError, match=setting):
        PretrainConfig(arch="timm:resnet18", **{setting: True})  # type: ignore[arg-type]


def graphs(config: PretrainConfig, steps: int) -> tuple[TrainState, list[nn.Module]]:
    """Train with Dynamo and autograd's tracing but PyTorch's own kernels: no compiler, seconds instead of a minute."""
    torch._dynamo.reset()
    made: list[nn.Module] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        made.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    state = build_state(config, CPU)
    for network in (state.method.student, state.method.teacher):
        network.backbone.compile_blocks(backend=backend)  # type: ignore[operator]
    run(config, steps, state)
    return state, made


def test_a_compiled_run_trains_alike_and_compiles_once_a_shape() -> None:
    config = tiny_config(drop_path_rate=0.2)
    plain, _ = run(config, 2)
    state, made = graphs(config, 2)
    # Student's global and local crops, teacher's global ones; the blocks of a network share them.
    assert len(made) == 3
    found, expected = (tensors_of(one.method.state_dict()) for one in (state, plain))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    backbone = state.method.teacher.backbone.eval()
    with torch.no_grad():
        backbone(torch.randn(3, 3, 36, 28))
    assert len(made) == 3  # evaluation, of any size, runs as it is
    torch._dynamo.reset()


def test_compile_in_the_settings_compiles_both_networks() -> None:
    method = build_state(tiny_config(compile=True), CPU).method  # nothing is compiled before the first step
    assert method.student.backbone.compiled
    assert method.teacher.backbone.compiled


@pytest.mark.slow
def test_a_step_in_bf16_with_compiled_kernels_and_recomputation() -> None:
    """The whole way through the C++ compiler: about a minute.

    SGD, because AdamW's first update is the gradient's sign, which rounding turns where the gradient is near 0.
    """
    torch._dynamo.reset()
    config = tiny_config(precision="bf16", compile=True, activation_checkpointing=True, optimizer="sgd", lr=0.05)
    _, found = run(config, 2)
    _, expected = run(dataclasses.replace(config, compile=False), 2)
    assert float(found[1].loss) < 0.8 * float(found[0].loss)
    for a, b in zip(found, expected, strict=True):
        assert bool(a.accepted)
        assert float(a.loss) == pytest.approx(float(b.loss), rel=0.02)
    torch._dynamo.reset()
