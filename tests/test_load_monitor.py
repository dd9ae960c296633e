"""The load monitor: timings per stage, and one warning if training waits for images."""

from __future__ import annotations

import time

import pytest
import torch
from tiny_run import CPU, tiny_config, tiny_source

from dino_xcit.data.load_monitor import DataLoadMonitor
from dino_xcit.data.loader import Batch, Seconds, StepSampler, build_loader


def batch(seconds: Seconds, images: int = 4) -> Batch:
    return Batch([], [], epoch=0, indices=torch.zeros(images, dtype=torch.int64), seconds=seconds)


def test_load_monitor_reports_milliseconds_per_image_by_stage() -> None:
    monitor = DataLoadMonitor(2, cores=16)
    monitor.note([batch((0.004, 0.04, 0.4)), batch((0.004, 0.0, 0.0))])
    assert monitor.metrics(0.0) == pytest.approx({"read_ms": 1.0, "decode_ms": 5.0, "augment_ms": 50.0})
    assert monitor.metrics(0.0) == {"read_ms": 0.0, "decode_ms": 0.0, "augment_ms": 0.0}


@pytest.mark.parametrize(
    ("seconds", "workers", "words"),
    [
        ((0.001, 0.002, 0.1), 2, ["slowest: augment", "2 workers per rank, 16 cores", "--num-workers"]),
        ((0.001, 0.2, 0.1), 2, ["slowest: decode", "smaller files"]),
        ((0.3, 0.2, 0.1), 2, ["slowest: read", "a faster disk"]),
        ((0.001, 0.002, 0.1), 0, ["the training process itself loads them: raise --num-workers"]),
    ],
)
def test_slowest_stage_is_warned_about_once_after_repeated_waits(
    seconds: Seconds, workers: int, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = DataLoadMonitor(workers, cores=16)
    for data_wait in (0.9, 0.9, 0.1, 0.9, 0.9):  # two slow reports in a row are too few for a warning
        monitor.metrics(data_wait)
    assert capsys.readouterr().out == ""
    for _ in range(3):
        monitor.note([batch(seconds)])
        monitor.metrics(0.45)
    (sentence,) = capsys.readouterr().out.splitlines()
    assert sentence.startswith("warning: training waits for images 45% of the time")
    for word in words:
        assert word in sentence


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_measures_each_stage(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    source = tiny_source(8)
    read = source.read

    def slowly(index: int) -> object:
        time.sleep(0.02)
        return read(index)

    monkeypatch.setattr(source, "read", slowly)
    sampler = StepSampler(8, 4, start_step=0, stop_step=2)
    batches = list(build_loader(source, tiny_config().augmentation(), sampler, 0, workers, CPU))
    assert len(batches) == 2
    for found in batches:
        seconds = dict(zip(("read", "decoded", "augmented"), found.seconds, strict=True))
        assert 4 * 0.02 <= seconds["read"] < 1.0
        assert seconds["decoded"] > 0
        assert seconds["augmented"] > 0
        assert seconds["decoded"] + seconds["augmented"] < seconds["read"]
