"""--dry-run: what it reports, and that it writes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from pretrain_fixtures import SMALL
from ranks import Start
from run_here import Here
from tiny_run import CPU, build_state, schedules_of, steps, tiny_config

import run_pretrain
from dino_xcit import dry_run
from dino_xcit.augment import group_by_size
from dino_xcit.checkpoint.state import Run, content_of
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


def test_unreadable_images_and_a_shorter_run_are_reported(here: Here, labelled_photos: Path, tmp_path: Path) -> None:
    photos = shutil.copytree(labelled_photos / "train", tmp_path / "photos")
    (photos / "dark" / "0.png").write_bytes(b"no image")
    flags = ("--dry-run", "--data-path", photos, *SMALL, "--output-dir", tmp_path / "run")
    done = here(run_pretrain, *flags)
    assert "1 image cannot be read" in done.out
    assert "dark/0.png" in done.out
    durations = [
        next(line for line in here(run_pretrain, *flags, "--epochs", 5000, *more).out.splitlines() if "limit" in line)
        for more in ((), ("--max-steps", 1))
    ]
    assert "0:00:00" not in durations[0]
    assert "0:00:00" in durations[1]


def test_two_ranks_try_the_same_number_of_steps(start: Start, tmp_path: Path) -> None:
    run = start("--dry-run", "--batch-size-per-gpu", "2")
    assert run.wait() == [0, 0], run.err()
    assert "is the limit" in run.out(0)
    assert run.out(1) == ""
    assert not (tmp_path / "run").exists()


def test_memory_line_and_largest_batch_scale_with_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(batch_size_per_gpu=16)
    state, (batch,) = build_state(config, CPU), next(steps(config, 0, 1))
    peaks = iter([10e9, 6e9, 7e9])  # with the optimizer's new state, 2 images, 4 images
    monkeypatch.setattr(dry_run, "peak_memory", lambda device: int(next(peaks)))
    monkeypatch.setattr(dry_run, "total_memory", lambda device: 20 * 10**9)
    memory = dry_run._memory(state, batch, schedules_of(config), config, CPU)
    assert memory == (20e9, 5e9, 0.5e9)
    assert memory.largest == 26  # (0.9 * 20 - 5) / 0.5
    assert "13 GB for 16 images" in dry_run._memory_line(memory, 16)
    same = iter([6e9, 6e9, 6e9])
    monkeypatch.setattr(dry_run, "peak_memory", lambda device: int(next(same)))
    assert dry_run._memory(state, batch, schedules_of(config), config, CPU) is None
    assert "not measurable" in dry_run._memory_line(None, 1)


def test_stored_bytes_count_shared_tensors_once(tmp_path: Path) -> None:
    content = content_of(
        build_state(tiny_config(), CPU), Run(tiny_config(), 6, transform=tiny_config().eval_transform())
    )
    torch.save(content, tmp_path / "file")
    assert dry_run._stored_bytes(content) == pytest.approx((tmp_path / "file").stat().st_size, rel=0.1)


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
        ({"teacher_temp": 0.06, "student_temp": 0.05}, "student_temp"),
        ({"out_dim": 65536}, "out_dim"),
        ({"momentum_teacher": 0.9996}, "momentum_teacher"),
    ],
)
def test_setting_known_to_fail_is_named(settings: dict[str, float], name: str) -> None:
    (line,) = doubtful_settings(tiny_config(**settings), 5000, 5000)
    assert name in line


def test_doubts_suggest_other_values() -> None:
    assert doubtful_settings(tiny_config(out_dim=64), 40, 5000)[0].endswith("try --out-dim 16")
    assert doubtful_settings(tiny_config(momentum_teacher=0.5), 5000, 5) == []


def test_settings_of_the_default_run_are_not_doubtful() -> None:
    assert doubtful_settings(tiny_config(), 5000, 5000) == []
