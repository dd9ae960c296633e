"""Checkpoints of pretraining: bit-exact resume, content, other precisions, and missing parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import CPU, differing_bits, learnt, run, save, tensors_of, tiny_config

from dino_xcit import safe_load
from dino_xcit.checkpoint.state import Run, content_of, restore
from dino_xcit.config import PretrainConfig
from dino_xcit.errors import InputError
from dino_xcit.train import TrainState, build_state


def settings_in(folder: Path, **changes: Any) -> PretrainConfig:
    return tiny_config(output_dir=str(folder), drop_path_rate=0.3, **changes)


def restored(path: Path, config: PretrainConfig) -> TrainState:
    state = build_state(config, CPU)
    restore(state, safe_load.read(path), path)
    return state


@pytest.mark.parametrize(
    ("optimizer", "first", "last"),
    [("adamw", 5, 7), ("sgd", 1, 2), ("lars", 1, 2)],  # at step 6 an epoch ends and the last layer is unfrozen
)
def test_resumed_run_matches_uninterrupted_run_bit_for_bit(
    tmp_path: Path, optimizer: str, first: int, last: int
) -> None:
    config = settings_in(tmp_path, optimizer=optimizer)
    straight, _ = run(config, first)
    straight.skipped_steps += 3
    straight.skipped_in_a_row += 2
    path = save(straight, config)
    assert path == tmp_path / "checkpoint.pth"
    torch.manual_seed(77)  # a new process has another RNG state
    resumed = restored(path, config)
    assert differing_bits(learnt(straight), learnt(resumed)) == []
    assert resumed.optimizer.state_dict()["param_groups"] == straight.optimizer.state_dict()["param_groups"]
    assert (resumed.step, int(resumed.skipped_steps), int(resumed.skipped_in_a_row)) == (first, 3, 2)
    run(config, last, straight)
    torch.rand(10)
    run(config, last, resumed)
    assert differing_bits(learnt(straight), learnt(resumed)) == []


def test_checkpoint_has_dino_keys_and_backbone_pth_has_the_teacher(tmp_path: Path) -> None:
    config = settings_in(tmp_path, momentum_teacher=0.5)
    state, _ = run(config, 2)
    save(state, config)
    content = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert {"student", "teacher", "optimizer", "epoch", "args", "dino_loss"} <= content.keys()
    assert (content["epoch"], content["step"], content["eval_transform"]["crop"]) == (0, 2, 28)
    assert content["args"]["arch"] == "xcit_pico_4_p4"
    assert content["args"]["global_crops_scale"] == [0.4, 1.0]
    assert {"backbone.cls_token", "head.mlp.0.weight", "head.last_layer.weight_g"} <= content["teacher"].keys()
    assert content["dino_loss"]["center"].shape == (1, 48)

    backbone = tensors_of(torch.load(tmp_path / "backbone.pth", weights_only=True))
    method = state.method
    assert differing_bits(backbone, tensors_of(dict(method.teacher.backbone.state_dict()))) == []
    assert differing_bits(backbone, tensors_of(dict(method.student.backbone.state_dict()))) != []
    assert all(torch.equal(value, content["teacher"][f"backbone.{name[1:]}"]) for name, value in backbone.items())


def test_run_resumes_in_another_precision(tmp_path: Path) -> None:
    """A checkpoint of an fp32 run has no loss scale, so the fp16 run starts with the initial one."""
    config, half = settings_in(tmp_path), settings_in(tmp_path, precision="fp16")
    state, _ = run(config, 1)
    resumed = restored(save(state, config), half)
    assert resumed.step == 1
    run(half, 2, resumed)
    path = save(resumed, half)
    assert restored(path, config).step == 2
    assert restored(path, half).scaler.state_dict()["scale"] == resumed.scaler.get_scale()


@pytest.mark.parametrize("lost", ["student", "teacher", "optimizer", "dino_loss", "step"])
def test_checkpoint_without_a_part_is_refused_and_part_named(tmp_path: Path, lost: str) -> None:
    config = settings_in(tmp_path)
    state = build_state(config, CPU)
    content = content_of(state, Run(config, 6, transform=config.eval_transform()))
    del content[lost]
    with pytest.raises(InputError, match=f"does not fit this run: '{lost}'"):
        restore(state, content, tmp_path / "checkpoint.pth")
