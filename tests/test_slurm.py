"""run_slurm.py: flags, the environment of a job on a simulated Slurm, and requeueing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_slurm
import pytest
from ranks import ENVIRONMENT, HERE, SMALL

import run_slurm
from dino_xcit.errors import PREEMPTED, InputError
from dino_xcit.metrics import read_metrics
from run_slurm import LaunchConfig, submit

os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"  # submitit reads this on import
pytest.importorskip("submitit")
ROOT = HERE.parent

# ---- flags


@pytest.mark.parametrize(("typed", "words"), [
    ("--node 2", "--nodes"), ("--epoch 3", "--epochs"), ("--nodes two", "nodes is two"), ("--nodes 0", "nodes is 0"),
    ("--run sleep", "sleep"), ("--nodes 2 3", "'3'"), ("--run knn --ks 0", "ks is 0"), ("--run knn", "--weights"),
    ("--run retrieval", "protocol"),
])  # fmt: skip
def test_invalid_flags_are_refused_before_submission(monkeypatch: pytest.MonkeyPatch, typed: str, words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["run_slurm.py", *typed.split()])
    monkeypatch.delattr(run_slurm, "submit")
    with pytest.raises(InputError, match=words):
        run_slurm.main()


def test_missing_submitit_or_slurm_error_names_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="torchrun"):
        submit(LaunchConfig(job_dir=str(tmp_path / "jobs")), ("true",))
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match=r"pip install 'dino-xcit\[slurm\]'"):
        submit(LaunchConfig(), ("true",))


# ---- jobs on a simulated Slurm

RUNNER = """
import json, os, signal, sys, time
folder, first = sys.argv[1:]
start, rank, asked = os.environ["SLURM_RESTART_COUNT"], os.environ["RANK"], []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: asked.append(number))
json.dump(dict(os.environ), open(f"{folder}/started-{start}-{rank}", "w"))
signal.alarm(120)
while first == "wait" and start == "0" and not asked:
    time.sleep(0.01)
if asked:
    time.sleep(0.2)
    open(f"{folder}/saved-{rank}", "w").close()
sys.exit(75 if asked else 0 if start > "0" else int(first))
"""


def wait_for(there: Callable[[], object]) -> None:
    end = time.monotonic() + 240
    while not there():
        assert time.monotonic() < end
        time.sleep(0.01)


def end(folder: Path) -> tuple[list[int], int]:
    """Wait for the job and return the exit codes of its last start and the number of requeue requests."""
    wait_for((folder / "ended").exists)
    asked = (folder / "asked").read_text() if (folder / "asked").exists() else ""
    return [int(code) for code in (folder / "codes").read_text().split()], asked.count("requeue 4711\n")


def send(folder: Path, number: signal.Signals) -> None:
    """Send a signal to the tasks only, as Slurm does when it tracks processes with control groups."""
    for task in (folder / "tasks").read_text().split():
        os.kill(int(task), number)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in (fake_slurm.install(tmp_path) | {"PYTHONPATH": str(ROOT)}).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "runner.py").write_text(RUNNER)
    return tmp_path


def queue(folder: Path, first: str, *signals: signal.Signals, **changes: Any) -> tuple[list[int], int]:
    """Submit RUNNER on two nodes, send the signals once both ranks run, and return the result of :func:`end`."""
    command = (sys.executable, str(folder / "runner.py"), str(folder), first)
    submit(LaunchConfig(nodes=2, job_dir=str(folder / "jobs"), **changes), command)
    for number in signals:
        wait_for(lambda: len(list(folder.glob("started-0-*"))) == 2)
        send(folder, number)
    return end(folder)


def test_batch_script_and_rank_environment_follow_the_flags(folder: Path) -> None:
    additional = ("qos=high", "--job-name=mine", "exclusive", "comment=$(rm)")
    shape = {"gpus_per_node": 0, "tasks_per_node": 2, "cpus_per_task": 12, "partition": "gpu", "signal_delay": 90}
    assert queue(folder, "0", time="2-00:00:30", slurm_additional=additional, **shape) == ([0] * 4, 0)
    for line in ("nodes=2", "ntasks-per-node=2", "cpus-per-task=12", "partition=gpu", "time=2-00:00:30", "requeue",
                 "signal=USR1@90", "qos=high", "exclusive", "job-name=mine", "comment='$(rm)'"):  # fmt: skip
        assert f"#SBATCH --{line}\n" in (folder / "script").read_text()
    for rank in range(4):
        env = json.loads((folder / f"started-0-{rank}").read_text())
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        assert [env[name] for name in names] == [str(rank), str(rank % 2), "4", "2", "host-0", "24711"]


USR1, TERM = signal.SIGUSR1, signal.SIGTERM


@pytest.mark.parametrize(("first", "signals", "requeues", "refuses", "code", "asked"), [
    ("wait", [USR1], 100, False, 0, 1), ("wait", [TERM, USR1], 100, False, 0, 1),
    ("wait", [TERM], 100, False, PREEMPTED, 0), ("wait", [USR1], 0, False, PREEMPTED, 0),
    ("wait", [USR1], 100, True, PREEMPTED, 1), ("4", [], 100, False, 4, 0),
], ids=["time limit", "preempted", "cancelled", "too often", "refused", "ends by itself"])  # fmt: skip
def test_stop_signal_saves_run_and_sigusr1_requeues_job(
    folder: Path, first: str, signals: list[signal.Signals], requeues: int, refuses: bool, code: int, asked: int
) -> None:
    if refuses:
        (folder / "refuses").touch()
    assert queue(folder, first, *signals, requeues=requeues) == ([code] * 2, asked)
    saved = [path.stat().st_mtime for path in folder.glob("saved-*")]
    assert len(saved) == (2 if signals else 0)
    assert not asked or saved[0] < (folder / "asked").stat().st_mtime
    assert len(list(folder.glob("started-1-*"))) == (0 if code else 2)
    log = (folder / "jobs" / "4711_0_log.out").read_text()
    assert ("not queued again" in log) == (code == PREEMPTED and signals == [USR1])


@pytest.mark.slow
def test_pretraining_resumes_after_sigusr1_and_requeue(photos: Path, folder: Path) -> None:
    launch = f"--gpus-per-node 0 --tasks-per-node 2 --job-dir {folder}/jobs --output-dir {folder}/run"
    run = f"--data-path {photos} --batch-size-per-gpu 2 --max-steps 60"
    words = [str(ROOT / "run_slurm.py"), *launch.split(), *SMALL, *run.split()]
    subprocess.run([sys.executable, *words], env=os.environ | ENVIRONMENT, check=True)
    wait_for(lambda: any(record["step"] >= 3 for record in read_metrics(folder / "run" / "metrics.jsonl")))
    send(folder, USR1)
    assert end(folder) == ([0, 0], 1)
    assert "resuming after step" in (folder / "jobs" / "4711_0_log.out").read_text()
