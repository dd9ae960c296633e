"""benchmarks/step.py: equal work of the rows, arithmetic of the table, refused flags, and --against."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dino_xcit.errors import InputError, RunStopped

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import against  # noqa: E402
import step  # noqa: E402
from step import OurStep, PlainStep, Row, Settings, Worker, draw_crops, normalised  # noqa: E402

TINY = Settings("xcit_nano_12_p16", 2, 64, 2, 32, 16, head_hidden=32, head_bottleneck=16)
ROWS = {row.key: row for row in step.rows_for("cpu")}


def test_own_rows_match_loss_and_gradients_of_plain_step() -> None:
    found = step.check(TINY, [ROWS["ours-fp32"], ROWS["ours-bf16"], ROWS["ours-fp32-ckpt"]], "")
    assert len(found) == 5
    assert all(error <= limit for _, error, limit in found)


def test_check_detects_different_student_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "STUDENT_TEMP", 0.11)
    (_, loss, loss_limit), (_, gradient, gradient_limit) = step.check(TINY, [ROWS["ours-fp32"]], "")
    assert loss > loss_limit
    assert gradient > gradient_limit


def test_timed_steps_update_student_and_teacher() -> None:
    plain, ours = PlainStep(TINY, "fp32"), OurStep(TINY, ROWS["ours-fp32"])
    for run, student, teacher in (
        (lambda crops: plain(normalised(crops)), plain.student, plain.teacher),
        (ours, ours.state.method.student, ours.state.method.teacher),
    ):
        networks = (*student.parameters(), *teacher.parameters())
        before = [parameter.detach().clone() for parameter in networks]
        assert all(bool(torch.isfinite(run(draw_crops(TINY, number)))) for number in range(2))
        moved = [not torch.equal(old, new) for old, new in zip(before, networks, strict=True)]
        half = len(moved) // 2
        assert sum(moved[:half]) == half - 1  # the norm of the prototypes is fixed
        assert sum(moved[half:]) > 0.2 * half  # the EMA update is too small to change values near 1


# ---- table


def measured(row: Row, seconds: list[float], peak: int, mark: str = "") -> Any:
    return SimpleNamespace(row=row, key=row.key + mark, name=row.title + mark, seconds=seconds, peak=peak)


def test_report_ratios_are_medians_over_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    reference = measured(ROWS["reference"], [6.0, 9.0, 4.0], 500)
    timm = measured(ROWS["timm-fp32"], [2.0, 2.25, 1.0], 600)
    ours = measured(ROWS["ours-fp32"], [2.0, 4.5, 1.0], 300)
    earlier = measured(ROWS["ours-fp32"], [4.0, 4.5, 1.0], 200, ", abc")
    found = step.report([reference, timm, ours, earlier], batch=4)
    assert found["rows"]["ours-fp32"]["img_per_s"] == 2.0
    assert (found["ratio_fp32"], found["memory_ratio_fp32"]) == (3.0, 0.6)
    assert found["over_timm_fp32"] == 1.0
    assert (found["against_fp32"], found["memory_against_fp32"]) == (1.0, 1.5)
    assert "3 (2 - 4)" in capsys.readouterr().out


# ---- worker processes and flags


@pytest.mark.slow
def test_worker_measures_row_in_separate_process() -> None:
    with step.process_group() as group:
        worker = Worker(ROWS["ours-fp32"], TINY, "", group)
        step.take_turns([worker], 2, "cpu")
    assert len(worker.seconds) == 2
    assert worker.peak > 10e6
    assert worker.about["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--batch 0", "batch"),
        ("--rounds 0", "--rounds"),
        ("--only our-fp32", "did you mean ours-fp32"),
        ("--only ours-fp32,small", "'small'"),
        ("--arch xcit_tiny_12", "xcit_tiny_12_p16"),
        ("--against .", "benchmarks/step.py"),
    ],
)
def test_step_benchmark_refuses_invalid_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["step.py", *words.split()])
    with pytest.raises(InputError, match=named):
        step.main()


# ---- --against DIR: alternation between two commits

TURN = """
import json, os, sys
from pathlib import Path
root = Path(__file__).parent.parent
assert os.environ["PYTHONPATH"] == str(root)
with (root.parent / "turns").open("a") as file:
    print(root.name, *sys.argv[1:], file=file)
turn = len((root.parent / "turns").read_text().splitlines())
print("a table")
print(json.dumps({"speed": SPEED * turn, "s": 2.0}))
"""


def checkout(folder: Path, name: str, script: str) -> Path:
    """Create a checkout with one benchmark script."""
    (folder / "benchmarks").mkdir(parents=True)
    (folder / "benchmarks" / name).write_text(script)
    return folder


def compare(monkeypatch: pytest.MonkeyPatch, this: Path, that: Path, rounds: int) -> None:
    monkeypatch.setattr(against, "ROOT", this)
    monkeypatch.setattr(against, "exit_on_sigterm", lambda: None)
    monkeypatch.setattr(sys, "argv", ["new.py", "--k", "1", "2", "--against", str(that), "--against-rounds", "9"])
    given = argparse.Namespace(against=that, against_rounds=rounds)
    against.compare_commits(["new.py", "old.py"], {"speed": "more", "s": "less", "new": "less"}, given)


def test_compare_commits_alternates_and_reports_median_ratios(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    this = checkout(tmp_path / "this", "new.py", TURN.replace("SPEED", "2"))
    compare(monkeypatch, this, checkout(tmp_path / "that", "old.py", TURN.replace("SPEED", "1")), rounds=2)
    assert (tmp_path / "turns").read_text().splitlines() == ["this --k 1 2", "that --k 1 2"] * 2
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["against"]
    assert found["speed"] == {"ratio": 1.25, "rounds": [1.0, 1.5], "this": 4.0, "that": 3.0, "better": "more"}
    assert found["s"]["ratio"] == 1.0
    assert "new" not in found


@pytest.mark.parametrize(
    ("script", "name", "rounds", "error"),
    [
        ("import sys; sys.exit(7)", "new.py", 1, RunStopped), ("print('{}')", "new.py", 1, RunStopped),
        ("", "new.py", 0, InputError), ("", "other.py", 1, InputError),
    ],
)  # fmt: skip
def test_compare_commits_raises_for_failed_runs_and_invalid_flags(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, name: str, rounds: int, error: type
) -> None:
    that = checkout(tmp_path, name, script)
    with pytest.raises(error):
        compare(monkeypatch, that, that, rounds)
