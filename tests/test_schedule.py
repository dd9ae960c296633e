"""Schedules against NumPy arrays with the step numbering of the reference."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_run import tiny_config

from dino_xcit.config import PretrainConfig
from dino_xcit.optim import CosineSchedule, LinearByEpoch, Schedules


def cosine_oracle(base: float, final: float, total: int, warmup: int, start: float) -> NDArray[np.float64]:
    """Return linspace including both ends, then half a cosine over the remaining steps."""
    left = np.arange(total - warmup)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * left / len(left)))
    return np.concatenate((np.linspace(start, base, warmup), cosine))


@pytest.mark.parametrize(
    ("base", "final", "total", "warmup", "start"),
    [(5e-4, 1e-6, 1000, 100, 0.0), (0.04, 0.4, 777, 0, 0.0), (1.0, 0.0, 10, 1, 0.0), (1.0, 0.0, 10, 2, 0.5),
     (1.0, 0.1, 1, 0, 0.0)],
)  # fmt: skip
def test_cosine_with_warmup_equals_numpy(base: float, final: float, total: int, warmup: int, start: float) -> None:
    schedule = CosineSchedule(base, final, total, warmup, start)
    values = [schedule.at(step) for step in range(total)]
    np.testing.assert_allclose(values, cosine_oracle(base, final, total, warmup, start), rtol=1e-12, atol=1e-15)


def test_cosine_values_at_start_end_of_warmup_and_end_of_run() -> None:
    schedule = CosineSchedule(1.0, 0.0, 100, 10, 0.0)
    assert [schedule.at(step) for step in (0, 9, 10)] == [0.0, 1.0, 1.0]
    assert schedule.at(100) == schedule.at(10**9) == 0.0


@pytest.mark.parametrize(("start", "end", "ramp"), [(0.04, 0.07, 30), (0.04, 0.04, 0), (0.04, 0.07, 1)])
def test_linear_by_epoch_equals_numpy(start: float, end: float, ramp: int) -> None:
    expected = np.concatenate((np.linspace(start, end, ramp), np.full(50 - ramp, end)))
    schedule = LinearByEpoch(start, end, ramp)
    np.testing.assert_allclose([schedule.at(epoch) for epoch in range(50)], expected, rtol=1e-12)


def test_schedules_of_run_match_reference() -> None:
    """The base learning rate is scaled by batch / 256, the final one is not. Only the temperature changes per epoch."""
    config = PretrainConfig(epochs=100, warmup_epochs=10, warmup_teacher_temp_epochs=30, teacher_temp=0.07)
    schedules = Schedules.of(config, steps_per_epoch=20, global_batch=1024)
    assert schedules.warning == ""
    for schedule, expected in (
        (schedules.lr, cosine_oracle(5e-4 * 1024 / 256, 1e-6, 2000, 200, 0.0)),
        (schedules.weight_decay, cosine_oracle(0.04, 0.4, 2000, 0, 0.0)),
        (schedules.momentum, cosine_oracle(0.996, 1.0, 2000, 0, 0.0)),
    ):
        np.testing.assert_allclose([schedule.at(step) for step in range(2000)], expected, rtol=1e-12, atol=1e-15)
    temperatures = np.concatenate((np.linspace(0.04, 0.07, 30), np.full(70, 0.07)))
    np.testing.assert_allclose([schedules.teacher_temp.at(epoch) for epoch in range(100)], temperatures)


def test_learning_rate_is_unscaled_without_reference_batch() -> None:
    config = tiny_config(lr=1e-3, lr_reference_batch=0, warmup_epochs=0.0)
    assert Schedules.of(config, 5, 4096).lr.at(0) == 1e-3


def test_fractional_warmup_epochs_are_converted_to_steps() -> None:
    schedules = Schedules.of(tiny_config(epochs=2, warmup_epochs=0.5), steps_per_epoch=10, global_batch=8)
    assert schedules.lr.warmup_steps == 5
    assert schedules.warning == ""


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 10.0), (10, 10.5), (10, 10.0)])
def test_warmup_as_long_as_run_is_shortened_with_warning(epochs: int, warmup: float) -> None:
    schedules = Schedules.of(tiny_config(epochs=epochs, warmup_epochs=warmup), steps_per_epoch=20, global_batch=8)
    total = epochs * 20
    assert 0 < schedules.lr.warmup_steps <= total // 5
    assert "warmup_epochs" in schedules.warning
    values = [schedules.lr.at(step) for step in range(total)]
    np.testing.assert_allclose(values, cosine_oracle(2e-3, 1e-6, total, schedules.lr.warmup_steps, 0.0), rtol=1e-12)


@pytest.mark.parametrize(
    ("setting", "value", "warns"),
    [("freeze_last_layer", 2, False), ("freeze_last_layer", 3, True), ("warmup_teacher_temp_epochs", 3, True)],
)
def test_epoch_setting_as_long_as_run_gives_warning(setting: str, value: int, warns: bool) -> None:
    config = tiny_config(**{"epochs": 3, "warmup_epochs": 0.5, "teacher_temp": 0.07, setting: value})
    assert (setting in Schedules.of(config, steps_per_epoch=20, global_batch=8).warning) is warns


def test_single_step_run_has_positive_learning_rate() -> None:
    schedules = Schedules.of(tiny_config(epochs=1, warmup_epochs=10.0), steps_per_epoch=1, global_batch=8)
    assert schedules.lr.at(0) > 0
