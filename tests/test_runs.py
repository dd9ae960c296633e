"""python -m eval.runs and python -m eval.report as commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from dino_xcit.errors import InputError
from eval import runs
from eval.report import __main__ as report


def write_run(folder: Path, step: int) -> Path:
    folder.mkdir(parents=True)
    rows = [
        {
            "kind": "run",
            "step": 0,
            "settings": {"lr": step / 1000},
            "changed": {"lr": [0.1, step / 1000]},
            "total_steps": 100,
        },
        {"kind": "step", "step": step, "loss": 1.5},
        {"kind": "epoch", "step": step, "knn_top1": 61.25},
        {"kind": "verdict", "step": step, "state": "healthy"},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / ".lock").touch()
    return folder


def command(module: object, monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
    module.main()  # type: ignore[attr-defined]


def test_runs_are_listed_with_their_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, step in (("deep/finished", 100), ("stopped", 40), ("running", 7)):
        write_run(tmp_path / name, step)
    with FileLock(tmp_path / "running" / ".lock"):
        command(runs, monkeypatch, tmp_path)
    lines = {line.split()[0].removeprefix(f"{tmp_path}/"): line for line in capsys.readouterr().out.splitlines()[2:]}
    for name, progress in (("deep/finished", "100%"), ("stopped", "40%"), ("running", "7%")):
        words = lines[name].split()
        assert words[1:5] == [name.removeprefix("deep/"), progress, "of", "100"]
        assert {"61.2", "healthy", "ago"} <= set(words)


def test_odd_folder_does_not_end_the_list(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert runs.row_of(tmp_path)[1] == "unreadable"
    for row, state in (
        ('{"kind": "run", "step": 0}', "stopped"),
        ('{"kind": "run", "step": 0, "settings": [1]}', "unreadable"),
        ('{"kind": "step", "step": 1, "loss": null}', "unreadable"),
        ('{"kind": "step", "step": 1, "loss": "abc"}', "unreadable"),
        ('{"kind": "verdict", "step": 1}', "unreadable"),
    ):
        (tmp_path / "metrics.jsonl").write_text(f"{row}\n")
        assert runs.row_of(tmp_path)[1] == state, row


def test_folder_without_runs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no runs"):
        command(runs, monkeypatch, tmp_path)


@pytest.mark.parametrize(("seconds", "shown"), [(5, "5 s"), (70, "1 minute"), (7300, "2 hours"), (90_000, "1 day")])
def test_age_has_one_unit(seconds: float, shown: str) -> None:
    assert runs.age(seconds) == shown


def test_report_of_one_run_and_of_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = (write_run(tmp_path / name, step) for name, step in (("one", 10), ("two", 20)))
    command(report, monkeypatch, one)
    assert "Settings that differ from the recipe" in (one / "report.html").read_text()
    command(report, monkeypatch, one, two, "--out", tmp_path / "both.html")
    assert '["lr","0.01","0.02"]' in (tmp_path / "both.html").read_text()
    assert "both.html" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"eval\.runs"):
        command(report, monkeypatch, tmp_path)
    with pytest.raises(InputError, match="there is no folder"):
        command(report, monkeypatch, tmp_path / "nowhere")
    same = write_run(tmp_path / "deeper" / "one", 30)
    command(report, monkeypatch, one, same, "--out", tmp_path / "same.html")
    assert f'"label":"{same}"' in (tmp_path / "same.html").read_text()
