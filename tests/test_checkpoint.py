"""Our own checkpoints: whole, exact, readable without executing anything, never half written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import CPU, differing_bits, learnt, run, save, schedules_of, steps, tensors_of, tiny_config

from dino_xcit import safe_load
from dino_xcit.checkpoint.state import Run, content_of, restore
from dino_xcit.errors import InputError
from dino_xcit.train import build_state, train_step


def settings_in(folder: Path, **changes: Any) -> Any:
    return tiny_config(output_dir=str(folder), drop_path_rate=0.3, **changes)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_a_round_trip_keeps_every_bit(tmp_path: Path, optimizer: str) -> None:
    config = settings_in(tmp_path, optimizer=optimizer)
    state, _ = run(config, 2)
    path = save(state, config)
    assert path == tmp_path / "checkpoint.pth"
    fresh = build_state(config, CPU)
    restore(fresh, safe_load.read(path), path)
    assert differing_bits(learnt(state), learnt(fresh)) == []
    assert fresh.step == 2
    assert fresh.optimizer.state_dict()["param_groups"] == state.optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("changes", [{}, {"optimizer": "sgd"}, {"optimizer": "lars"}, {"accumulation_steps": 2}])
def test_two_steps_and_two_resumed_steps_equal_four(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = settings_in(tmp_path, batch_size_per_gpu=8 // changes.get("accumulation_steps", 1), **changes)
    straight, _ = run(config, 4)
    first, _ = run(config, 2)
    path = save(first, config)
    torch.manual_seed(77)  # a new process has another history
    resumed = build_state(config, CPU)
    restore(resumed, safe_load.read(path), path)
    run(config, 4, resumed)
    assert differing_bits(learnt(straight), learnt(resumed)) == []


def test_resuming_across_epochs_and_the_thaw_of_the_last_layer_is_exact(tmp_path: Path) -> None:
    config = settings_in(tmp_path)
    straight, _ = run(config, 8)
    first, _ = run(config, 5)
    path = save(first, config)
    resumed = build_state(config, CPU)
    restore(resumed, safe_load.read(path), path)
    run(config, 8, resumed)
    assert differing_bits(learnt(straight), learnt(resumed)) == []


def test_rejected_steps_are_remembered(tmp_path: Path) -> None:
    config = settings_in(tmp_path)
    state = build_state(config, CPU)
    state.skipped_steps += 3
    state.skipped_in_a_row += 2
    path = save(state, config)
    fresh = build_state(config, CPU)
    restore(fresh, safe_load.read(path), path)
    assert (int(fresh.skipped_steps), int(fresh.skipped_in_a_row)) == (3, 2)


def test_the_file_reads_with_weights_only_and_has_dinos_keys(tmp_path: Path) -> None:
    config = settings_in(tmp_path)
    state, _ = run(config, 1)
    save(state, config)
    content = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert {"student", "teacher", "optimizer", "epoch", "args", "dino_loss"} <= content.keys()
    assert content["epoch"] == 0
    assert content["step"] == 1
    assert content["args"]["arch"] == "xcit_pico_4_p4"
    assert content["args"]["global_crops_scale"] == [0.4, 1.0]
    assert content["args"]["data_path"] == "sample:fashion-mnist"
    assert content["eval_transform"]["crop"] == 28
    assert {"backbone.cls_token", "head.mlp.0.weight", "head.last_layer.weight_g"} <= content["teacher"].keys()
    assert content["dino_loss"]["center"].shape == (1, 48)


def test_backbone_pth_is_the_teachers_backbone_under_official_names(tmp_path: Path) -> None:
    config = settings_in(tmp_path, momentum_teacher=0.5)
    state, _ = run(config, 2)
    save(state, config)
    backbone = torch.load(tmp_path / "backbone.pth", weights_only=True)
    assert differing_bits(tensors_of(backbone), tensors_of(dict(state.method.teacher.backbone.state_dict()))) == []
    assert differing_bits(tensors_of(backbone), tensors_of(dict(state.method.student.backbone.state_dict()))) != []
    content = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    for name, value in backbone.items():
        assert torch.equal(value, content["teacher"][f"backbone.{name}"])


def test_a_run_resumes_in_another_precision(tmp_path: Path) -> None:
    """A checkpoint of an fp32 run holds no loss scale; an fp16 run starts with its own."""
    config = settings_in(tmp_path)
    state, _ = run(config, 1)
    path = save(state, config)
    half = settings_in(tmp_path, precision="fp16")
    resumed = build_state(half, CPU)
    restore(resumed, safe_load.read(path), path)
    assert resumed.step == 1
    for batches in steps(half, 1, 2):
        train_step(resumed, batches, schedules_of(half), half)
    path = save(resumed, half)
    back = build_state(config, CPU)
    restore(back, safe_load.read(path), path)
    again = build_state(half, CPU)
    restore(again, safe_load.read(path), path)
    assert again.scaler.state_dict()["scale"] == resumed.scaler.get_scale()


@pytest.mark.parametrize("lost", ["student", "teacher", "optimizer", "dino_loss", "step"])
def test_a_checkpoint_that_lacks_a_part_is_refused_by_its_name(tmp_path: Path, lost: str) -> None:
    config = settings_in(tmp_path)
    state = build_state(config, CPU)
    content = content_of(state, Run(config, 6))
    del content[lost]
    with pytest.raises(InputError, match=f"does not fit this run: '{lost}'"):
        restore(state, content, tmp_path / "checkpoint.pth")


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    config = settings_in(tmp_path)
    content = content_of(build_state(config, CPU), Run(config, 6))
    other = build_state(settings_in(tmp_path, out_dim=50), CPU)
    with pytest.raises(InputError, match="does not fit this run"):
        restore(other, content, tmp_path / "checkpoint.pth")
    deeper = build_state(settings_in(tmp_path, arch="xcit_nano_12_p4"), CPU)
    with pytest.raises(InputError, match="does not fit this run"):
        restore(deeper, content, tmp_path / "checkpoint.pth")
