"""``--against DIR`` of the benchmarks: two commits in turn; and a killed benchmark leaves no process."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import ENVIRONMENT

from dino_xcit.errors import InputError, RunStopped

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import against  # noqa: E402

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
    """A checkout with one benchmark."""
    (folder / "benchmarks").mkdir(parents=True)
    (folder / "benchmarks" / name).write_text(script)
    return folder


def compare(monkeypatch: pytest.MonkeyPatch, this: Path, that: Path, rounds: int) -> None:
    monkeypatch.setattr(against, "ROOT", this)
    monkeypatch.setattr(against, "exit_on_sigterm", lambda: None)
    monkeypatch.setattr(sys, "argv", ["new.py", "--k", "1", "2", "--against", str(that), "--against-rounds", "9"])
    given = argparse.Namespace(against=that, against_rounds=rounds)
    against.compare_commits(["new.py", "old.py"], {"speed": "more", "s": "less", "new": "less"}, given)


def test_both_commits_run_in_turn(
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
def test_a_comparison_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, name: str, rounds: int, error: type
) -> None:
    that = checkout(tmp_path, name, script)
    with pytest.raises(error):
        compare(monkeypatch, that, that, rounds)


# ---- killed


def living(session: int) -> dict[int, str]:
    """Command lines of the living processes of a session."""
    found = {}
    for pid in (int(folder.name) for folder in Path("/proc").glob("[0-9]*")):
        with contextlib.suppress(OSError):  # gone meanwhile
            if os.getsid(pid) == session and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
                found[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return found


def until(happened: Callable[[], bool]) -> bool:
    end = time.monotonic() + 120
    while not (there := happened()) and time.monotonic() < end:
        time.sleep(0.02)
    return there


GRANDCHILD = """
import subprocess, against
against.exit_on_sigterm()
with against.process_group() as group:
    subprocess.run(["sh", "-c", "sleep 1000; exit"], process_group=group)
"""
STEP = [str(BENCHMARKS / "step.py"), "--quick", "--only", "ours-fp32", "--rounds", "1"]


@pytest.mark.skipif(sys.platform != "linux", reason="it looks for processes in /proc")
@pytest.mark.parametrize(
    ("words", "child", "number"),
    [
        (["-c", GRANDCHILD], "sleep", signal.SIGKILL),
        (["-c", GRANDCHILD], "sleep", signal.SIGTERM),
        pytest.param(STEP, "--worker", signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_a_killed_benchmark_leaves_no_process(words: list[str], child: str, number: int) -> None:
    """Not even one that is stopped, or that a script of an earlier commit started."""
    environment = os.environ | ENVIRONMENT
    environment["PYTHONPATH"] += f":{BENCHMARKS}"
    with subprocess.Popen([sys.executable, *words], env=environment, start_new_session=True) as process:
        try:
            assert until(lambda: child in " ".join(living(process.pid).values()).split())
            for pid, command in living(process.pid).items():
                if child in command.split():
                    os.kill(pid, signal.SIGSTOP)  # it can notice nothing by itself
            process.send_signal(number)
            assert until(lambda: not living(process.pid)), living(process.pid)
        finally:
            for pid in living(process.pid):
                os.kill(pid, signal.SIGKILL)
