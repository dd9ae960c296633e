"""Metrics on Weights & Biases: what arrives there, under which run, and that its failures stay its own.

A small stand-in takes the module's place; where the real package is installed, runs of real processes use it offline.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from last_words import last_words
from ranks import ENVIRONMENT, HERE, SMALL

from dino_xcit.errors import InputError
from dino_xcit.runtime.metrics import MetricsWriter, read_metrics
from dino_xcit.wandb_mirror import FILE_NAME, WandbMirror, require_package


class FakeWandb(types.ModuleType):
    """What the mirror uses of the package; remembers what it was given, and fails where it is told to."""

    def __init__(self, fails: str = "") -> None:
        super().__init__("wandb")
        self.fails = fails
        self.begun: list[dict[str, Any]] = []
        self.rows: list[dict[str, float]] = []
        self.axes: list[tuple[str, str | None]] = []
        self.finished = 0

    def _perhaps_fail(self, name: str) -> None:
        if self.fails == name:
            raise RuntimeError("the server\nsaid no")

    def Settings(self, **values: Any) -> dict[str, Any]:
        return values

    def init(self, **values: Any) -> FakeWandb:
        self._perhaps_fail("init")
        self.begun.append(values)
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes.append((name, step_metric))

    def log(self, row: dict[str, float]) -> None:
        self._perhaps_fail("log")
        self.rows.append(row)

    def finish(self) -> None:
        self._perhaps_fail("finish")
        self.finished += 1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def mirror(folder: Path, from_step: int = 0, project: str = "xcit", said: list[str] | None = None) -> WandbMirror:
    return WandbMirror(project, folder, from_step, {"lr": 0.1}, (said if said is not None else []).append)


def test_records_arrive_under_the_names_of_tensorboard_with_the_step_as_axis(tmp_path: Path, fake: FakeWandb) -> None:
    writer = MetricsWriter(tmp_path, 0, mirrors=[mirror(tmp_path)])
    writer.write("step", 3, {"epoch": 0, "loss": 2.5})
    writer.write("epoch", 4, {"knn_top1": 50.0})
    writer.close()
    assert fake.rows == [
        {"step/epoch": 0, "step/loss": 2.5, "trainer_step": 3},
        {"epoch/knn_top1": 50.0, "trainer_step": 4},
    ]
    assert fake.axes == [("trainer_step", None), ("*", "trainer_step")]
    assert fake.finished == 1
    assert fake.begun[0]["project"] == "xcit"
    assert fake.begun[0]["config"] == {"lr": 0.1}
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [3, 4]


def test_a_resumed_run_goes_on_under_its_id_and_a_new_one_gets_another(tmp_path: Path, fake: FakeWandb) -> None:
    for from_step in (0, 10, 20, 0, 5):
        mirror(tmp_path, from_step).close()
    first, second, third, anew, last = (begun["id"] for begun in fake.begun)
    assert first == second == third
    assert anew == last != first
    assert {begun["resume"] for begun in fake.begun} == {"allow"}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"project": "xcit"}', '{"project": "xcit", "id": "../../x"}',
                                     '{"project": "another", "id": "0123456789ab"}'])  # fmt: skip
def test_an_id_that_is_damaged_or_of_another_project_is_not_used(tmp_path: Path, fake: FakeWandb, content: str) -> None:
    (tmp_path / FILE_NAME).write_text(content)
    mirror(tmp_path, 10).close()
    assert fake.begun[0]["id"].isalnum()
    assert fake.begun[0]["id"] != "0123456789ab"
    assert json.loads((tmp_path / FILE_NAME).read_text()) == {"project": "xcit", "id": fake.begun[0]["id"]}


@pytest.mark.parametrize("what", ["init", "log", "finish"])
def test_a_failure_is_one_warning_and_the_metrics_are_complete(tmp_path: Path, fake: FakeWandb, what: str) -> None:
    fake.fails = what
    said: list[str] = []
    writer = MetricsWriter(tmp_path, 0, said.append, [mirror(tmp_path, said=said)])
    for step in (1, 2, 3):
        writer.write("step", step, {"loss": 1.0})
    writer.close()
    assert len(said) == 1
    assert "warning: nothing goes to Weights & Biases from here on (RuntimeError: the server said no)" in said[0]
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_failure_leaves_tensorboard_alone(tmp_path: Path, fake: FakeWandb) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fake.fails = "log"
    writer = MetricsWriter(tmp_path, 0, mirrors=[mirror(tmp_path)])
    writer.write("step", 1, {"loss": 2.5})
    writer.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.value for event in board.Scalars("step/loss")] == [2.5]


def test_an_output_directory_s_name_is_the_run_s_unless_the_environment_says_another(
    tmp_path: Path, fake: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_NAME", raising=False)
    mirror(tmp_path)
    monkeypatch.setenv("WANDB_NAME", "mine")
    mirror(tmp_path)
    assert [begun["settings"]["run_name"] for begun in fake.begun] == [tmp_path.name, None]


def test_a_missing_package_is_said_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    require_package("")
    with pytest.raises(InputError, match=r"pip install 'dino-xcit\[wandb\]'"):
        require_package("xcit")


# ---- the real package


def pretrain(folder: Path, photos: Path, last: int, **environment: str) -> subprocess.CompletedProcess[str]:
    flags = ["--data-path", photos, "--batch-size-per-gpu", "2", "--output-dir", folder / "run", "--max-steps", last]
    return subprocess.run(
        [sys.executable, str(HERE.parent / "run_pretrain.py"), *last_words([*SMALL, *flags, "--wandb", "xcit"])],
        env=os.environ | ENVIRONMENT | {"HOME": str(folder)} | environment,
        capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip


needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="the package wandb is not installed")


@needs_wandb
@pytest.mark.slow
def test_offline_a_run_and_its_continuation_are_one_run_there(tmp_path: Path, photos: Path) -> None:
    for last in (3, 5):
        ended = pretrain(tmp_path, photos, last, WANDB_MODE="offline")
        assert ended.returncode == 0, ended.stderr
        assert "warning" not in ended.stdout
    run_id = json.loads((tmp_path / "run" / FILE_NAME).read_text())["id"]
    kept = list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(kept) == 2
    assert all(b"step/loss" in path.read_bytes() for path in kept)


@needs_wandb
@pytest.mark.slow
def test_without_a_network_or_a_key_the_run_ends_well_with_one_warning(tmp_path: Path, photos: Path) -> None:
    ended = pretrain(
        tmp_path, photos, 3, WANDB_MODE="online", WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9"
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("warning: nothing goes to Weights & Biases from here on") == 1
    assert max(record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3
