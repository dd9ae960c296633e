"""Metrics of a run: metrics.jsonl, rates and TensorBoard."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dino_xcit.metrics import MetricsWriter, Progress, read_metrics


def write_steps(folder: Path, first: int, last: int, from_step: int, loss: float = 1.0) -> None:
    writer = MetricsWriter(folder, from_step)
    for step in range(first, last + 1):
        writer.write("step", step, {"epoch": 0, "loss": loss + step})
    writer.close()


def steps_of(folder: Path) -> list[int]:
    return [record["step"] for record in read_metrics(folder / "metrics.jsonl")]


def test_metrics_writer_writes_json_lines(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0, steps_per_epoch=4)
    writer.write("step", 3, {"epoch": 0, "loss": 2.5})
    # lines are flushed, so a crash loses at most the line being written
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"kind": "step", "step": 3, "steps_per_epoch": 4, "epoch": 0, "loss": 2.5}
    writer.write("epoch", 4, {"epoch": 0, "loss": 2.0})
    writer.close()
    assert [record["kind"] for record in read_metrics(tmp_path / "metrics.jsonl")] == ["step", "epoch"]


def test_resumed_run_replaces_steps_after_its_checkpoint(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 5, from_step=0)
    write_steps(tmp_path, 4, 6, from_step=3, loss=100.0)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["loss"] for record in records] == [2, 3, 4, 104, 105, 106]
    write_steps(tmp_path, 1, 2, from_step=0)
    assert steps_of(tmp_path) == [1, 2]


def test_non_finite_metrics_stay_valid_json(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    writer.write("step", 1, {"loss": float("nan"), "gradient_norm": float("inf"), "lr": 0.5})
    writer.close()

    def no_constants(name: str) -> float:
        raise AssertionError(name)

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=no_constants)
    assert record["lr"] == 0.5
    assert float(record["gradient_norm"]) == float("inf")
    assert np.isnan(float(record["loss"]))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Fake ``time.perf_counter`` that returns ``clock.now``."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def test_rates_measure_throughput_and_data_wait_since_last_call(clock: SimpleNamespace) -> None:
    progress = Progress(total_steps=100, done=0, images_a_step=32, shown=False)
    for _ in range(5):
        clock.now += 2.0
        progress.step(0, waited=0.5)
    assert progress.rates() == pytest.approx({"images_per_s": 16.0, "data_wait": 0.25})
    clock.now += 50.0  # saving and evaluation do not count
    progress.restart_clock()
    clock.now += 1.0
    progress.step(0, waited=0.0)
    assert progress.rates() == pytest.approx({"images_per_s": 32.0, "data_wait": 0.0})


def test_damaged_and_truncated_lines_are_skipped(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 3, 0)
    path = tmp_path / "metrics.jsonl"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x80  # makes the second line invalid UTF-8
    path.write_bytes(bytes(data) + b'5\n[]\n{}\n{"kind": "step", "step": 3, "lo')
    assert steps_of(tmp_path) == [1, 3]
    write_steps(tmp_path, 4, 4, 3)
    assert steps_of(tmp_path) == [1, 3, 4]


def test_unwritable_metrics_file_warns_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = MetricsWriter(tmp_path, 0)
    assert writer._file is not None
    writer._file.close()
    writer._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    writer.write("step", 1, {"loss": 1.0})
    writer.write("step", 2, {"loss": 1.0})
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: ")
    assert str(tmp_path) in line


def test_tensorboard_steps_match_metrics_jsonl_after_batch_size_change(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps_per_epoch, from_step, steps in ((4, 0, range(1, 7)), (2, 3, (4, 5)), (2, 4, (5,))):
        writer = MetricsWriter(tmp_path, from_step, steps_per_epoch=steps_per_epoch)
        for step in steps:
            writer.write("step", step, {"loss": float("nan") if step == 1 else 1.0})
        writer.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("step/loss")] == steps_of(tmp_path) == [1, 1, 2, 2, 3, 3, 4, 5]
    assert board.Tags()["scalars"] == ["step/loss"]
