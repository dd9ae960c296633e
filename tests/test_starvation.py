"""Training that waits for images is told so, once, and for what."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_run import CPU, tiny_config

from dino_xcit.data import Source, open_source
from dino_xcit.data.loader import Batch, Seconds, StepSampler, build_loader
from dino_xcit.data.starvation import Starvation


def batch(seconds: Seconds, images: int = 4) -> Batch:
    return Batch([], [], 0, torch.zeros(images, dtype=torch.int64), [], seconds)


def test_milliseconds_an_image_are_told_by_stage() -> None:
    starvation = Starvation(2, 16, print)
    starvation.note([batch((0.004, 0.04, 0.4)), batch((0.004, 0.0, 0.0))])
    assert starvation.figures(0.0) == pytest.approx({"read_ms": 1.0, "decode_ms": 5.0, "augment_ms": 50.0})
    assert starvation.figures(0.0) == {"read_ms": 0.0, "decode_ms": 0.0, "augment_ms": 0.0}


@pytest.mark.parametrize(
    ("seconds", "workers", "words"),
    [
        ((0.001, 0.002, 0.1), 2, ["most for augment", "2 loader processes a rank, 16 cores", "--num-workers"]),
        ((0.001, 0.2, 0.1), 2, ["most for decode", "smaller files"]),
        ((0.3, 0.2, 0.1), 2, ["most for read", "a faster disk"]),
        ((0.001, 0.002, 0.1), 0, ["by the training process itself: give --num-workers"]),
    ],
)
def test_it_is_said_once_after_a_while_and_says_which_stage_is_slow(
    seconds: Seconds, workers: int, words: list[str]
) -> None:
    said: list[str] = []
    starvation = Starvation(workers, 16, said.append)
    for data_wait in (0.9, 0.9, 0.1, 0.9, 0.9):  # a slow start is no starvation
        starvation.figures(data_wait)
    assert said == []
    for _ in range(3):
        starvation.note([batch(seconds)])
        starvation.figures(0.45)
    (sentence,) = said
    assert sentence.startswith("notice: 45% of the time goes by waiting for images")
    for word in words:
        assert word in sentence


def test_work_moves_to_the_gpu_before_anything_is_complained_of() -> None:
    said: list[str] = []
    moved: list[str] = []
    starvation = Starvation(2, 16, said.append, relieve=lambda: moved.append("moved"))
    for _ in range(3):
        assert moved == []
        starvation.figures(0.45)
    assert moved == ["moved"]
    assert "move to the GPU" in said[0]
    for _ in range(2):
        starvation.figures(0.45)
    assert len(said) == 1  # it has time to work
    for _ in range(3):
        starvation.figures(0.45)
    assert moved == ["moved"]
    assert "--num-workers" in said[1]
    assert len(said) == 2


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
