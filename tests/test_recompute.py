"""Activation checkpointing and torch.compile: less memory or other kernels, and the same training."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_run import CPU, run, tiny_config
from torch import Tensor, nn

from dino_xcit.config import PretrainConfig
from dino_xcit.errors import InputError
from dino_xcit.models import build_backbone
from dino_xcit.train import TrainState, build_state


def everything(state: TrainState) -> dict[str, Tensor]:
    networks = {"student": state.method.student, "teacher": state.method.teacher, "loss": state.method.loss}
    return {f"{name}.{key}": value for name, net in networks.items() for key, value in net.state_dict().items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_recomputing_leaves_every_bit_of_the_training_as_it_is(precision: str, accumulation: int) -> None:
    """BatchNorm's running statistics among them: each block runs twice, and they may change once."""
    config = tiny_config(precision=precision, accumulation_steps=accumulation)
    kept, _ = run(config, 3)
    again, _ = run(dataclasses.replace(config, activation_checkpointing=True), 3)
    expected = everything(kept)
    assert any("num_batches_tracked" in name for name in expected)
    for name, value in everything(again).items():
        assert torch.equal(value, expected[name]), name


def bytes_kept(recompute: bool) -> int:
    """What autograd keeps of a forward pass, parameters aside."""
    backbone = build_backbone("xcit_pico_4_p4", drop_path_rate=0.1)
    backbone.activation_checkpointing = recompute  # type: ignore[assignment]
    own = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = backbone(torch.randn(4, 3, 64, 64))
    total = sum(kept.values())
    assert out.cls_token.requires_grad
    return total


def test_recomputing_keeps_less() -> None:
    assert bytes_kept(recompute=True) < 0.5 * bytes_kept(recompute=False)


def test_nothing_is_recomputed_where_there_is_no_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("dino_xcit.models.xcit.recomputed", never)
    backbone = build_backbone("xcit_pico_4_p4")
    backbone.activation_checkpointing = True  # type: ignore[assignment]
    with torch.no_grad():
        backbone(torch.randn(1, 3, 28, 28))
    with pytest.raises(AssertionError):
        backbone(torch.randn(2, 3, 28, 28))


@pytest.mark.parametrize("setting", ["activation_checkpointing", "compile"])
def test_timm_networks_are_refused(setting: str) -> None:
    with pytest.raises(InputError, match=f"{setting} is for this project's XCiT, but arch is timm:resnet18"):
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
    plain, _ = run(config, 3)
    state, made = graphs(config, 3)
    # Student's global and local crops, teacher's global ones; the blocks of a network share them.
    assert len(made) == 3
    for name, value in everything(state).items():
        reference = everything(plain)[name]
        torch.testing.assert_close(value, reference, rtol=1e-3, atol=1e-4, msg=name)
    backbone = state.method.teacher.backbone.eval()
    with torch.no_grad():
        backbone(torch.randn(3, 3, 36, 28))
    assert len(made) == 3  # evaluation, of any size, runs as it is
    torch._dynamo.reset()


def test_compile_in_the_settings_compiles_both_networks() -> None:
    state = build_state(tiny_config(compile=True), CPU)  # nothing is compiled before the first step
    assert state.method.student.backbone.compiled
    assert state.method.teacher.backbone.compiled
    assert not build_state(tiny_config(), CPU).method.student.backbone.compiled


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
