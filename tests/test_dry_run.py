"""--dry-run: what it reports, and that it writes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from run_here import Here
from tiny_run import CPU, build_state, schedules_of, steps, tiny_config

import run_pretrain
from dino_xcit import dry_run
from dino_xcit.augment import group_by_size
from dino_xcit.dry_run import doubtful_settings, first_images


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "SECONDS", 0.2)


def test_report_is_printed_and_nothing_is_written(here: Here, tmp_path: Path) -> None:
    done = here(run_pretrain, "--dry-run", "--output-dir", tmp_path / "run", "--device", "cpu", "--out-dim", 64)
    assert done.code == 0
    lines = {line.split()[0]: line for line in done.out.splitlines() if line[:1].isalpha()}
    assert {"memory", "loader", "step", "duration", "disk"} <= lines.keys()
    assert "is the limit" in lines["duration"]
    assert not list(tmp_path.iterdir())


def test_memory_line_and_largest_batch_scale_with_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(batch_size_per_gpu=16)
    state, (batch,) = build_state(config, CPU), next(steps(config, 0, 1))
    peaks = iter([10e9, 2e9, 3e9])  # the first is that of the optimizer's state; 0.5 GB per image
    monkeypatch.setattr(dry_run, "peak_memory", lambda device: int(next(peaks)))
    monkeypatch.setattr(dry_run, "available_memory", lambda: 20 * 10**9)
    line, largest = dry_run._memory(state, batch, schedules_of(config), config, CPU)
    assert largest == 34  # (0.9 * 20 - 1) / 0.5
    assert "9 GB for 16 images" in line


def test_first_images_have_all_views() -> None:
    config = tiny_config()
    (batch,) = next(steps(config, 0, 1))
    part = first_images(batch, 3)
    assert part.indices.tolist() == batch.indices[:3].tolist()
    for views, whole, crops in zip(batch.views, batch.crops, part.crops, strict=True):
        size = len(batch.indices)
        assert torch.equal(crops, torch.cat([whole[view * size : view * size + 3] for view in range(views)]))
    assert len(batch.crops) == len(group_by_size([view.size for view in config.augmentation().views]))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"teacher_temp": 0.08}, "teacher_temp"),
        ({"teacher_temp": 0.1, "student_temp": 0.1}, "teacher_temp"),
        ({"out_dim": 65536}, "out_dim"),
        ({"freeze_last_layer": 4}, "freeze_last_layer"),
        ({"momentum_teacher": 0.9996}, "momentum_teacher"),
    ],
)
def test_setting_known_to_fail_is_named(settings: dict[str, float], name: str) -> None:
    assert any(name in line for line in doubtful_settings(tiny_config(**settings), 5000, 5000))


def test_settings_of_the_default_run_are_not_doubtful() -> None:
    assert doubtful_settings(tiny_config(), 5000, 5000) == []
