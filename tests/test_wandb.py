"""Weights & Biases logging: records, run ids and tolerated errors. A mock replaces the module wandb."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pytest

from dino_xcit.errors import InputError
from dino_xcit.metrics import MetricsWriter, WandB, read_metrics, require_wandb


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Mock of both the module and the run that ``init`` returns."""
    module = Mock()
    module.init.return_value = module
    module.Settings = dict
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def begun(fake: Mock) -> list[dict[str, Any]]:
    """Return the keyword arguments of each ``init`` call."""
    return [init.kwargs for init in fake.init.call_args_list]


def finished(folder: Path, from_step: int = 0) -> None:
    writer = MetricsWriter(folder, from_step, [WandB("xcit", folder, from_step, {"lr": 0.1})])
    writer.write("step", from_step + 1, {"epoch": 0, "loss": 2.5})
    writer.write("epoch", from_step + 2, {"knn_top1": 50.0})
    writer.close()


def test_wandb_records_use_trainer_step_as_axis(tmp_path: Path, fake: Mock) -> None:
    finished(tmp_path)
    assert [logged.args[0] for logged in fake.log.call_args_list] == [
        {"step/epoch": 0, "step/loss": 2.5, "trainer_step": 1},
        {"epoch/knn_top1": 50.0, "trainer_step": 2},
    ]
    assert fake.define_metric.call_args_list == [call("trainer_step"), call("*", step_metric="trainer_step")]
    fake.finish.assert_called_once_with()
    (values,) = begun(fake)
    assert (values["project"], values["config"]) == ("xcit", {"lr": 0.1})


def test_resumed_run_keeps_wandb_id_and_fresh_run_gets_new_id(tmp_path: Path, fake: Mock) -> None:
    for from_step in (0, 10, 20, 0, 5):
        finished(tmp_path, from_step)
    first, second, third, anew, last = (values["id"] for values in begun(fake))
    assert first == second == third
    assert anew == last != first
    assert {values["resume"] for values in begun(fake)} == {"allow"}


@pytest.mark.parametrize("what", ["init", "log", "finish"])
def test_wandb_error_gives_one_warning_and_keeps_metrics_complete(
    tmp_path: Path, fake: Mock, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    getattr(fake, what).side_effect = RuntimeError("the server\nsaid no")
    finished(tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: ")
    assert "RuntimeError: the server said no" in line
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_missing_wandb_package_is_refused_only_with_a_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    require_wandb("")
    with pytest.raises(InputError):
        require_wandb("xcit")
