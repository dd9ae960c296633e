"""Submit a run to a Slurm cluster, with the runner's own flags. The job saves and requeues before its time limit.

python run_slurm.py --nodes 2 --gpus-per-node 8 --partition gpu --data-path /data/imagenet/train
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, MinLen

from dino_xcit.bounds import FilePath, Repeatable, annotations_of
from dino_xcit.cli import parse, parse_known
from dino_xcit.errors import PREEMPTED, STOP_SIGNALS, InputError, one_line, run_main


@dataclass(frozen=True)
class LaunchConfig:
    """Submit a runner as a Slurm job. The flags of the runner are accepted as well."""

    run: Literal["pretrain", "knn", "linear", "extract", "retrieval", "finetune", "detect", "segment"] = "pretrain"
    """Command to run: run_pretrain.py, run_knn.py, run_finetune.py ..."""
    nodes: Annotated[int, Ge(1)] = 1
    """Number of nodes."""
    gpus_per_node: Annotated[int, Ge(0)] = 1
    """GPUs per node; 0: none."""
    tasks_per_node: Annotated[int, Ge(0)] = 0
    """Processes per node; 0: one per GPU, or one without GPUs."""
    cpus_per_task: Annotated[int, Ge(1)] = 10
    """CPU cores per process, for its loader workers; docs/scaling.md estimates the demand."""
    time: Annotated[str, MinLen(1)] = "1-00:00:00"
    """Time limit in Slurm's format: MINUTES, H:MM:SS, DAYS-HOURS, DAYS-H:MM:SS."""
    partition: str = ""
    """Slurm partition; empty: the cluster's default."""
    slurm_additional: Annotated[tuple[str, ...], Repeatable] = ()
    """Other sbatch options: KEY=VALUE, such as account=vision qos=high mem=200G, or KEY, such as exclusive."""
    job_dir: Annotated[FilePath, MinLen(1)] = "runs/slurm"
    """Directory of the jobs and their logs, JOB_DIR/JOBID_RANK_log.out; must be visible on all nodes."""
    signal_delay: Annotated[int, Ge(1)] = 120
    """Seconds between the signal to save and the time limit; must cover one step and one save."""
    requeues: Annotated[int, Ge(0)] = 100
    """Maximum number of times that the job is requeued."""


def main() -> None:
    """Check the flags of the launcher and the runner, then submit the job."""
    # Imported here because the tasks of the job do not need them.
    from dino_xcit.config import PretrainConfig
    from dino_xcit.recipes import parse_pretrain
    from eval.config import KnnConfig, LinearConfig
    from eval.retrieval_config import ExtractConfig, RetrievalConfig
    from supervised.detect_config import DetectConfig
    from supervised.finetune_config import FinetuneConfig
    from supervised.segment_config import SegmentConfig

    configs: dict[str, Any] = {
        "pretrain": PretrainConfig, "knn": KnnConfig, "linear": LinearConfig, "extract": ExtractConfig,
        "retrieval": RetrievalConfig, "finetune": FinetuneConfig, "detect": DetectConfig, "segment": SegmentConfig,
    }  # fmt: skip
    runner_flags = {name for config in configs.values() for name in annotations_of(config)}
    launch, words = parse_known(LaunchConfig, sys.argv[1:], "run_slurm.py", runner_flags)
    if launch.run == "pretrain":
        config = parse_pretrain(words).config
        from dino_xcit.metrics import require_wandb  # imports PyTorch

        require_wandb(config.wandb)
    elif not parse(configs[launch.run], words, f"run_{launch.run}.py").weights:
        raise InputError(f"no weights given: run_{launch.run}.py needs --weights FILE")
    runner = Path(__file__).resolve().with_name(f"run_{launch.run}.py")
    job = submit(launch, [sys.executable, "-u", str(runner), *words])
    print(f"job {job.job_id} is queued; the same command resumes it; its log: {job.paths.stdout}")


def submit(launch: LaunchConfig, command: Sequence[str]) -> Any:
    """Submit a job that runs ``command`` in every process; return submitit's job.

    Raises:
        InputError: submitit is not installed, or the submission failed.
    """
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"  # the runners handle SIGUSR1; submitit reads this on import
    additional: dict[str, Any] = {"job_name": "dino-xcit", "requeue": True, "time": launch.time}
    for option in launch.slurm_additional:
        key, equals, value = option.removeprefix("--").partition("=")
        additional[key.replace("-", "_")] = value if equals else True
    try:
        import submitit

        executor = submitit.SlurmExecutor(launch.job_dir)
        executor.update_parameters(
            nodes=launch.nodes, gpus_per_node=launch.gpus_per_node or None, cpus_per_task=launch.cpus_per_task,
            ntasks_per_node=launch.tasks_per_node or max(1, launch.gpus_per_node), partition=launch.partition or None,
            signal_delay_s=launch.signal_delay, stderr_to_stdout=True, additional_parameters=additional,
            setup=["export SUBMITIT_PREEMPT_SIGNAL=USR1"],  # the job may not inherit this environment
            srun_args=["--kill-on-bad-exit=0"],  # the first task must survive to requeue the job
        )  # fmt: skip
        return executor.submit(run_task, command, launch.requeues)
    except ModuleNotFoundError as error:
        raise InputError("submitit is not installed: pip install 'dino-xcit[slurm]'") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: srun is missing or sbatch failed
        raise InputError(f"cannot submit the job: {one_line(error)}; use a Slurm login node or torchrun") from error


def run_task(command: Sequence[str], requeues: int) -> None:
    """Run the command as a child of one process of the job, and exit with its code.

    SIGUSR1 (time limit or preemption) and SIGTERM (preemption or scancel) are forwarded to the runner, which saves and
    exits with code 75. After SIGUSR1 the job is requeued. After SIGTERM alone Slurm decides.
    """
    import submitit

    job = submitit.JobEnvironment()
    child: subprocess.Popen[bytes] | None = None
    received: set[int] = set()

    def forward(number: int, _: object) -> None:
        received.add(number)
        if child:
            child.send_signal(number)

    for number in STOP_SIGNALS:
        signal.signal(number, forward)
    child = subprocess.Popen(command, env=os.environ | rank_environment(job))
    for number in tuple(received):  # signals that arrived before the child started
        child.send_signal(number)
    code = child.wait()
    stopped = code in (PREEMPTED, *(-number for number in STOP_SIGNALS))  # signals kill it before its first step
    if stopped and signal.SIGUSR1 in received and job.global_rank == 0:
        restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        if restarts >= requeues or subprocess.call(["scontrol", "requeue", job.job_id]):
            print("warning: the run is saved, but not queued again; the same command resumes it", flush=True)
    sys.exit(code if code >= 0 else 128 - code)


def rank_environment(job: Any) -> dict[str, str]:
    """Return the environment variables that torchrun sets; ``job`` is submitit's JobEnvironment."""
    per_node = job.num_tasks // job.num_nodes
    return {
        "MASTER_ADDR": job.hostnames[0] if job.num_nodes > 1 else "127.0.0.1",
        "MASTER_PORT": str(20_000 + int(job.raw_job_id) % 10_000),  # below Linux's ephemeral ports
        "WORLD_SIZE": str(job.num_tasks),
        "LOCAL_WORLD_SIZE": str(per_node),
        "RANK": str(job.global_rank),
        "LOCAL_RANK": str(job.local_rank),
        "TORCHELASTIC_RUN_ID": job.job_id,  # makes the watchdog stop the rank when its parent dies
    } | ({"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")} if per_node > 1 else {})


def command() -> None:
    """Run :func:`main` with the exit codes of docs/reliability.md."""
    run_main(main)


if __name__ == "__main__":
    command()
