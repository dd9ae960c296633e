"""Metrics on Weights & Biases: what arrives there, under which run, and that its failures stay its own.

A small stand-in takes the module's place.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pytest

from dino_xcit.errors import InputError
from dino_xcit.runtime.metrics import MetricsWriter, WandB, read_metrics, require_wandb


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Both the module and the run that it begins."""
    module = Mock()
    module.init.return_value = module
    module.Settings = dict
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def begun(fake: Mock) -> list[dict[str, Any]]:
    """What each run began with."""
    return [init.kwargs for init in fake.init.call_args_list]


def finished(folder: Path, from_step: int = 0) -> None:
    writer = MetricsWriter(folder, from_step, [WandB("xcit", folder, from_step, {"lr": 0.1})])
    writer.write("step", from_step + 1, {"epoch": 0, "loss": 2.5})
    writer.write("epoch", from_step + 2, {"knn_top1": 50.0})
    writer.close()


def test_records_arrive_with_the_step_as_axis(tmp_path: Path, fake: Mock) -> None:
    finished(tmp_path)
    assert [logged.args[0] for logged in fake.log.call_args_list] == [
        {"step/epoch": 0, "step/loss": 2.5, "trainer_step": 1},
        {"epoch/knn_top1": 50.0, "trainer_step": 2},
    ]
    assert fake.define_metric.call_args_list == [call("trainer_step"), call("*", step_metric="trainer_step")]
    fake.finish.assert_called_once_with()
    (values,) = begun(fake)
    assert (values["project"], values["config"]) == ("xcit", {"lr": 0.1})


def test_a_resumed_run_continues_under_its_id_and_a_new_one_gets_another(tmp_path: Path, fake: Mock) -> None:
    for from_step in (0, 10, 20, 0, 5):
        finished(tmp_path, from_step)
    first, second, third, anew, last = (values["id"] for values in begun(fake))
    assert first == second == third
    assert anew == last != first
    assert {values["resume"] for values in begun(fake)} == {"allow"}


@pytest.mark.parametrize("what", ["init", "log", "finish"])
def test_a_failure_is_one_warning_and_the_other_metrics_are_complete(
    tmp_path: Path, fake: Mock, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    getattr(fake, what).side_effect = RuntimeError("the server\nsaid no")
    finished(tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: ")
    assert "RuntimeError: the server said no" in line
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_missing_package_is_said_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    require_wandb("")
    with pytest.raises(InputError):
        require_wandb("xcit")
