"""run_slurm.py: its flags, what a job is told on a (made-up) Slurm, and a run that is stopped and resumed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_slurm
import pytest
from last_words import last_words
from ranks import ENVIRONMENT, HERE, SMALL, Server, children_of, state_in
from tiny_run import differing_bits

import run_slurm
from dino_xcit.bounds import annotations_of
from dino_xcit.cli import parse_known
from dino_xcit.errors import PREEMPTED, InputError
from dino_xcit.launch_config import LaunchConfig
from dino_xcit.runtime.metrics import read_metrics
from dino_xcit.slurm import Rank, import_submitit, rank_environment, submit

if importlib.util.find_spec("submitit") is None:  # not imported here: it reads the signal's name when it is
    pytest.skip("the package submitit is not installed", allow_module_level=True)
ROOT = HERE.parent


def test_a_process_that_waits_for_a_run_does_not_import_pytorch() -> None:
    code = "import sys, dino_xcit.slurm; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# ---- flags


def test_processes_and_options_of_a_launch() -> None:
    config = LaunchConfig(nodes=4, gpus_per_node=8, slurm_additional=("qos=high", "mem=20G", "exclusive"))
    assert config.processes_per_node == 8
    assert config.additional() == {"qos": "high", "mem": "20G", "exclusive": True}


@pytest.mark.parametrize(("written", "seconds"), [
    ("90", 5400), ("90:30", 5430), ("2:00:00", 7200), ("2-12", 216_000), ("1-00:30", 88_200), ("7-01:02:03", 608_523),
])  # fmt: skip
def test_time_limits_are_read_as_slurm_reads_them(written: str, seconds: int) -> None:
    assert LaunchConfig(time=written).seconds == seconds


def test_no_flag_of_a_runner_is_taken_for_a_typo_of_the_launch_s() -> None:
    configs = (run_slurm.PretrainConfig, *run_slurm.EVALUATORS.values())
    known = {name for config in configs for name in annotations_of(config)}
    others = [*known, "config", "use_fp16", "dist_url", "local_rank", "pretrained_weights", "checkpoint_key", "nb_knn",
              "temperature", "batch_size"]  # fmt: skip
    flags = [f"--{name}" for name in others]
    assert parse_known(LaunchConfig, flags, "x", known) == (LaunchConfig(), flags)
    assert not known & annotations_of(LaunchConfig).keys()


MISTAKES = {
    "--node 2": "did you mean --nodes",
    "--epoch 3": "did you mean --epochs",
    "--nodes two": "--nodes",
    "--nodes 0": "nodes is 0",
    "--nodes 2 --cluster local": "this machine alone: expected 1",
    "--time soon": "time is 'soon', expected MINUTES",
    "--time 1:60:00:00": "expected MINUTES",
    "--time 1:00": "nothing would be left to train in",
    "--slurm-additional =x": "expected KEY=VALUE",
    "--slurm-additional nodes=4": "which --nodes decides",
    "--slurm-additional signal=USR1@60": "which --signal-delay decides",
    "--comment a\n#SBATCH": "expected text of one line",
    "--job-dir runs/%j": "job_dir is 'runs/%j', expected a folder",
    "--run knn --weights x --ks 0": "ks is 0",
    "--run sleep": "'sleep'",
    "--run extract --weights x": "no output_dir given",
    "--run extract --query x.jpg": "no index given",
    "--run retrieval": "no protocol given",
    "--run retrieval duplicates --weights x": "no images given: use --first",
    "--run retrieval oxfrd --weights x": "'oxfrd'",
    "--run knn x --weights y": "'x'",
    "--nodes 2 3": "'3'",
    "--nodes 1 --nodes 2": "--nodes is given twice",
    "--cluster local --run knn --weights absent.pth": "weights is absent.pth, which is not there: check the path",
    "--cluster local --data-path absent": "data_path is absent, which is not there: check the path",
    "--cluster local --run extract --query absent.jpg --index .": "query is absent.jpg, which is not there",
    "--cluster local --run extract --query a.jpg --index absent": "index is absent, which is not there",
    "--cluster local --run retrieval duplicates --weights timm:x --first absent": "first is absent, which is not there",
    "--cluster local --run extract --weights timm:x --output-dir v --whiten absent": "whiten is absent, which is not",
    "--wandb xcit": "pip install 'dino-xcit[wandb]'",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_is_a_sentence_before_anything_is_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["run_slurm.py", *flags.split(" ")])
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(run_slurm, "submit", lambda *_: pytest.fail("it was submitted"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refused:
        run_slurm.main()
    assert MISTAKES[flags] in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_without_submitit_the_sentence_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.setattr(sys, "argv", ["run_slurm.py"])
    with pytest.raises(InputError, match=r"pip install 'dino-xcit\[slurm\]'"):
        run_slurm.main()


def test_without_slurm_the_sentence_names_the_way_to_run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(InputError, match=r"srun.*--cluster local runs the job on this machine"):
        submit(LaunchConfig(job_dir=str(tmp_path / "jobs")), ("true",), ROOT)


def test_a_place_that_this_machine_does_not_see_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_slurm.check_runner("pretrain", ["--data-path", str(tmp_path / "absent")])
    assert f"warning: data_path is {tmp_path / 'absent'}, which is not there on this machine" in capsys.readouterr().out
    run_slurm.check_runner("pretrain", ["--data-path", str(tmp_path)])
    run_slurm.check_runner("pretrain", ["--data-path", "tar:/data/{000..100}.tar"])
    assert "warning" not in capsys.readouterr().out


def test_a_retrieval_protocol_may_stand_alone_as_in_its_own_runner(capsys: pytest.CaptureFixture[str]) -> None:
    typed = "--nodes 2 --run retrieval oxford --weights w.pth --data-path d"
    launch, words = parse_known(LaunchConfig, typed.split(), "x", ())
    assert (launch.nodes, launch.run, words[0]) == (2, "retrieval", "oxford")
    run_slurm.check_runner("retrieval", words)
    assert "warning: weights is w.pth" in capsys.readouterr().out


def test_a_process_is_told_its_place_as_torchrun_would() -> None:
    job = types.SimpleNamespace(
        num_nodes=2, num_tasks=8, global_rank=5, local_rank=1, hostnames=["a7", "b2"], raw_job_id="123456789",
        job_id="123456789",
    )  # fmt: skip
    told = rank_environment(job, {}, restarts=3)  # type: ignore[arg-type]
    assert told == {
        "MASTER_ADDR": "a7", "MASTER_PORT": "26789", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "5",
        "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "123456789", "TORCHELASTIC_RESTART_COUNT": "3",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    inherited = {"SLURM_RESTART_COUNT": "4", "OMP_NUM_THREADS": "2"}
    told = rank_environment(job, inherited, restarts=3)  # type: ignore[arg-type]
    assert told["TORCHELASTIC_RESTART_COUNT"] == "4"
    assert "OMP_NUM_THREADS" not in told
    job.num_nodes = 1
    assert rank_environment(job, {}, 0)["MASTER_ADDR"] == "127.0.0.1"  # type: ignore[arg-type]


# ---- a job on a made-up Slurm

RUNNER = """
import json, os, signal, sys, time
from pathlib import Path
folder, first, later = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
rank = os.environ["RANK"]
asked = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: asked.append(number))
(folder / f"started-{start}-{rank}").write_text(json.dumps(dict(os.environ)))
what = later if start else first
if what == "wait":
    while not asked:
        time.sleep(0.01)
    time.sleep(0.4)
    (folder / f"saved-{start}-{rank}").write_text(str(time.time()))
    sys.exit(75)
sys.exit(int(what))
"""


class Job:
    """A queued one, and what it leaves."""

    def __init__(self, folder: Path, job: object) -> None:
        self.folder, self.job = folder, job

    def until(self, there: Callable[[], bool]) -> None:
        until = time.monotonic() + 60
        while not there():
            logs = [path.read_text() for path in (self.folder / "jobs").glob("*.out")]
            assert time.monotonic() < until, logs
            time.sleep(0.01)

    def signal(self, *numbers: signal.Signals) -> None:
        """To each task and to what it has started, as slurmstepd does."""
        self.until(lambda: len(list(self.folder.glob("started-0-*"))) == 2)
        for number in numbers:
            for task in (self.folder / "tasks").read_text().split():
                os.killpg(int(task), number)

    def end(self) -> list[int]:
        """The tasks' exit codes of the last start."""
        self.until((self.folder / "code").exists)
        return [int(code) for code in (self.folder / "codes").read_text().split()]

    def asked(self) -> list[str]:
        """What scontrol was asked."""
        path = self.folder / "asked"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Job]]:
    """Queues RUNNER on two machines of one process, or of more."""
    for name, value in (fake_slurm.install(tmp_path) | {"PYTHONPATH": ""}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runner.py").write_text(RUNNER)

    def start(first: str, later: str = "0", **changes: Any) -> Job:
        launch = LaunchConfig(nodes=2, job_dir=str(tmp_path / "jobs"), **changes)
        command = (sys.executable, str(tmp_path / "runner.py"), str(tmp_path), first, later)
        return Job(tmp_path, submit(launch, command, ROOT))

    yield start
    tasks = tmp_path / "tasks"
    for task in tasks.read_text().split() if tasks.exists() else []:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(task), signal.SIGKILL)


def test_the_batch_script_says_what_the_flags_said(slurm: Callable[..., Job]) -> None:
    job = slurm(
        "0", partition="gpu", account="vision", constraint="h100", comment="for the paper; $(rm)", time="2-00:00:30",
        cpus_per_task=12, signal_delay=90, slurm_additional=("qos=high", "exclusive"),
    )  # fmt: skip
    assert job.end() == [0, 0]
    lines = (job.folder / "script").read_text().splitlines()
    for line in ("--nodes=2", "--gpus-per-node=1", "--ntasks-per-node=1", "--cpus-per-task=12", "--partition=gpu",
                 "--account=vision", "--constraint=h100", "--comment='for the paper; $(rm)'", "--time=2881",
                 "--signal=USR1@90", "--qos=high", "--exclusive", "--requeue", "--job-name=dino-xcit"):  # fmt: skip
        assert f"#SBATCH {line}" in lines


def test_every_process_of_a_job_knows_its_place(slurm: Callable[..., Job]) -> None:
    job = slurm("0", gpus_per_node=0, tasks_per_node=2)
    assert job.end() == [0, 0, 0, 0]
    told = [json.loads((job.folder / f"started-0-{rank}").read_text()) for rank in range(4)]
    assert [(env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) for env in told] == [
        ("0", "0", "4", "2"), ("1", "1", "4", "2"), ("2", "0", "4", "2"), ("3", "1", "4", "2"),
    ]  # fmt: skip
    assert {(env["MASTER_ADDR"], env["MASTER_PORT"]) for env in told} == {("host-0", "24711")}
    assert job.asked() == []


@pytest.mark.parametrize("signals", [[signal.SIGUSR1], [signal.SIGTERM, signal.SIGUSR1]], ids=["time", "preemption"])
def test_before_the_time_limit_and_when_preempted_the_run_saves_and_is_then_queued_again_once(
    slurm: Callable[..., Job], signals: list[signal.Signals]
) -> None:
    job = slurm("wait")
    job.signal(*signals)
    assert job.end() == [0, 0]
    assert job.asked() == ["requeue 4711"]
    saved = max(float((job.folder / f"saved-0-{rank}").read_text()) for rank in range(2))
    assert saved < (job.folder / "asked").stat().st_mtime
    assert len(list(job.folder.glob("started-1-*"))) == 2


def test_a_cancelled_job_saves_and_is_not_queued_again(slurm: Callable[..., Job]) -> None:
    job = slurm("wait")
    job.signal(signal.SIGTERM)
    assert job.end() == [PREEMPTED] * 2
    assert job.asked() == []
    assert len(list(job.folder.glob("saved-0-*"))) == 2


@pytest.mark.parametrize("code", [2, 4])
def test_a_run_that_ends_by_itself_is_not_queued_again_and_its_code_is_the_job_s(
    slurm: Callable[..., Job], code: int
) -> None:
    job = slurm(str(code))
    assert job.end() == [code] * 2
    assert job.asked() == []
    assert all("Traceback" not in path.read_text() for path in (job.folder / "jobs").glob("*.out"))


def test_a_job_is_queued_again_only_so_often(slurm: Callable[..., Job]) -> None:
    job = slurm("wait", requeues=0, time="3")  # submitit takes one so short for timed out
    job.signal(signal.SIGUSR1)
    assert job.end() == [PREEMPTED] * 2
    assert job.asked() == []
    log = (job.folder / "jobs" / "4711_0_log.out").read_text()
    assert "warning: the run is saved, but not queued again (Job not requeued because: timed-out too many times)" in log
    assert "Traceback" not in log


def test_where_slurm_refuses_to_queue_it_again_that_is_said(slurm: Callable[..., Job], tmp_path: Path) -> None:
    (tmp_path / "refuses").touch()
    job = slurm("wait")
    job.signal(signal.SIGUSR1)
    assert job.end() == [PREEMPTED] * 2
    log = (job.folder / "jobs" / "4711_0_log.out").read_text()
    assert "warning: the run is saved, but not queued again" in log
    assert "Traceback" not in log


def test_what_takes_a_job_s_place_is_the_same_command() -> None:
    again = Rank(("run", "this"), restarts=2).checkpoint().function
    assert again == Rank(("run", "this"), restarts=3)
    assert import_submitit().slurm.slurm.SlurmJobEnvironment.USR_SIG == "USR1"


# ---- the same path on this machine, with real runs


def launch_here(folder: Path, *flags: object) -> subprocess.Popen[str]:
    launch = ["--cluster", "local", "--gpus-per-node", "0", "--tasks-per-node", "2", "--job-dir", folder / "jobs"]
    words = last_words([*launch, *SMALL, *flags, "--output-dir", folder / "run"])
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run_slurm.py"), *words],
        env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
    )  # fmt: skip


@pytest.mark.slow
def test_a_job_that_is_preempted_resumes_and_ends_with_the_same_bits(
    server: Server, photos: Path, tmp_path: Path
) -> None:
    flags = ["--data-path", photos, "--batch-size-per-gpu", "2", "--epochs", "5", "--max-steps", "60"]
    alone = server.start(tmp_path / "alone", *flags)
    assert alone.wait() == [0, 0], alone.err()
    job = launch_here(tmp_path, *flags)
    until = time.monotonic() + 240
    while not any(record["step"] >= 3 for record in read_metrics(tmp_path / "run" / "metrics.jsonl")):
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    (controller,) = children_of(job.pid)
    for task in children_of(controller):
        os.kill(task, signal.SIGUSR1)
    said, _ = job.communicate(timeout=240)
    assert job.returncode == 0, said
    assert "stopped by SIGUSR1 after saving step " in said
    step = int(said.split("stopped by SIGUSR1 after saving step ")[1].split()[0])
    assert 3 <= step < 60
    assert f"resuming after step {step} of 60" in said
    assert differing_bits(state_in(tmp_path / "run"), state_in(tmp_path / "alone")) == []


@pytest.mark.slow
def test_a_run_that_fails_here_ends_with_its_sentence_and_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()  # what is not there at all, the launcher itself refuses
    job = launch_here(tmp_path, "--data-path", tmp_path / "empty")
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 1
    assert "error: no image in" in said
    assert "the job ended early" in said
    assert "Traceback" not in said
