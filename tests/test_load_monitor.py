"""Training that waits for images is told so, once, and for what."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_run import CPU, tiny_config

from dino_xcit.data import Source, open_source
from dino_xcit.data.load_monitor import DataLoadMonitor
from dino_xcit.data.loader import Batch, Seconds, StepSampler, build_loader


def batch(seconds: Seconds, images: int = 4) -> Batch:
    return Batch([], [], 0, torch.zeros(images, dtype=torch.int64), seconds=seconds)


def test_milliseconds_an_image_are_told_by_stage() -> None:
    monitor = DataLoadMonitor(2, cores=16)
    monitor.note([batch((0.004, 0.04, 0.4)), batch((0.004, 0.0, 0.0))])
    assert monitor.metrics(0.0) == pytest.approx({"read_ms": 1.0, "decode_ms": 5.0, "augment_ms": 50.0})
    assert monitor.metrics(0.0) == {"read_ms": 0.0, "decode_ms": 0.0, "augment_ms": 0.0}


@pytest.mark.parametrize(
    ("seconds", "workers", "words"),
    [
        ((0.001, 0.002, 0.1), 2, ["slowest: augment", "2 loader processes a rank, 16 cores", "--num-workers"]),
        ((0.001, 0.2, 0.1), 2, ["slowest: decode", "files smaller"]),
        ((0.3, 0.2, 0.1), 2, ["slowest: read", "a faster disk"]),
        ((0.001, 0.002, 0.1), 0, ["the training process itself loads them: raise --num-workers"]),
    ],
)
def test_it_is_said_once_after_a_while_and_says_which_stage_is_slow(
    seconds: Seconds, workers: int, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = DataLoadMonitor(workers, cores=16)
    for data_wait in (0.9, 0.9, 0.1, 0.9, 0.9):  # a slow start is no starvation
        monitor.metrics(data_wait)
    assert capsys.readouterr().out == ""
    for _ in range(3):
        monitor.note([batch(seconds)])
        monitor.metrics(0.45)
    (sentence,) = capsys.readouterr().out.splitlines()
    assert sentence.startswith("warning: training waits for images 45% of the time")
    for word in words:
        assert word in sentence


def test_work_moves_to_the_gpu_before_anything_is_complained_of(capsys: pytest.CaptureFixture[str]) -> None:
    moved: list[str] = []
    monitor = DataLoadMonitor(2, lambda: moved.append("moved"), cores=16)
    for _ in range(3):
        assert moved == []
        monitor.metrics(0.45)
    assert moved == ["moved"]
    (said,) = capsys.readouterr().out.splitlines()
    assert "to the GPU" in said
    assert not said.startswith("warning")
    for _ in range(2):
        monitor.metrics(0.45)
    assert capsys.readouterr().out == ""  # it has time to work
    for _ in range(3):
        monitor.metrics(0.45)
    assert moved == ["moved"]
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("warning")
    assert "--num-workers" in said


class SlowDisk:
    """A folder on a disk that takes 20 ms a file."""

    def __init__(self, folder: Path) -> None:
        for index in range(8):
            Image.new("RGB", (40, 40), (index * 30, 0, 0)).save(folder / f"{index}.png")
        self._files = open_source(str(folder))
        self.url, self.classes, self.labels = self._files.url, None, None
        self.name, self.fingerprint = self._files.name, self._files.fingerprint

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> tuple[object, int | None]:
        time.sleep(0.02)
        return self._files.read(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_measures_each_stage(tmp_path: Path, workers: int) -> None:
    source: Source = SlowDisk(tmp_path)  # type: ignore[assignment]
    sampler = StepSampler(8, 4, start_step=0, stop_step=2)
    batches = list(build_loader(source, tiny_config().augmentation(), sampler, 0, workers, CPU))
    assert len(batches) == 2
    for found in batches:
        read, decoded, augmented = found.seconds
        assert 4 * 0.02 <= read < 1.0
        assert decoded > 0
        assert augmented > 0
        assert decoded + augmented < read
