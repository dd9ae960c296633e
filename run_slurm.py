"""Queue a run on a Slurm cluster, with the runner's own flags. Before its time ends it saves, and is queued again.

    python run_slurm.py --nodes 2 --gpus-per-node 8 --partition gpu --data-path /data/imagenet/train
    python run_slurm.py --run linear --gpus-per-node 8 --weights runs/s12/checkpoint.pth --data-path /data/imagenet
    python run_slurm.py --cluster local --gpus-per-node 0 --tasks-per-node 2      the same job on this machine

Read top to bottom: settings, what can be checked before the queue, the job, what to type next.
"""

from __future__ import annotations

# Before torch: it decides how threads wait for each other.
from dino_xcit.runtime import logging as log

import dino_xcit  # noqa: F401  # isort: skip

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dino_xcit.bounds import annotations_of
from dino_xcit.cli import parse, parse_known
from dino_xcit.config import PretrainConfig
from dino_xcit.errors import InputError, RunStopped, printable, run_main
from dino_xcit.launch_config import LaunchConfig
from dino_xcit.recipes import parse_pretrain
from dino_xcit.runtime.logging import counted
from dino_xcit.runtime.metrics import require_wandb
from dino_xcit.slurm import import_submitit, submit
from eval.config import BackboneConfig, KnnConfig, LinearConfig
from eval.retrieval_config import ExtractConfig, RetrievalConfig

if TYPE_CHECKING:
    import submitit

ROOT = Path(__file__).resolve().parent
EVALUATORS: dict[str, type[BackboneConfig]] = {
    "knn": KnnConfig, "linear": LinearConfig, "extract": ExtractConfig, "retrieval": RetrievalConfig
}  # fmt: skip

READ = (
    "weights", "data_path", "train_data", "val_data", "distractors", "ground_truth", "index", "first", "second",
    "whiten", "query",
)  # fmt: skip
"""Settings of the evaluators that name something to read."""


def main() -> None:
    """The whole launch."""
    # ---- settings: ours, and the runner's, which are checked here rather than hours later
    argv = sys.argv[1:]
    if "-h" in argv or "--help" in argv:
        print("Every flag of the runner, and these:\n")
    runner_flags = {name for config in (PretrainConfig, *EVALUATORS.values()) for name in annotations_of(config)}
    launch, words = parse_known(LaunchConfig, argv, "run_slurm.py", runner_flags)
    check_runner(launch.run, words, here=launch.cluster == "local")
    import_submitit()

    # ---- the job
    command = (sys.executable, "-u", str(ROOT / f"run_{launch.run}.py"), *words)
    job = submit(launch, command, ROOT)
    log = job.paths.stdout
    processes = launch.nodes * launch.processes_per_node

    # ---- what next
    if launch.cluster == "slurm":
        print(f"job {job.job_id} is queued: {counted(processes, 'process')}; its log: {log}")
        print(f"squeue -j {job.job_id} shows it, scancel {job.job_id} ends it; the same command resumes it")
        return
    print(
        f"job {job.job_id} runs here: {counted(processes, 'process')}; its log, of which this is a copy: {log}",
        flush=True,
    )
    follow(job, log)
    ended_well = [job.task(number).paths.result_pickle.exists() for number in range(processes)]
    if not all(ended_well):
        raise RunStopped(
            1, f"the job ended early; what its {counted(processes, 'process')} said is in {log.parent}/{job.job_id}_*"
        )


def check_runner(run: str, words: Sequence[str], here: bool = False) -> None:
    """What can be known of a runner's flags without its data and, unless it runs ``here``, its machines.

    Raises:
        InputError: as the runner itself would.
    """
    if run == "pretrain":
        config, first_line = parse_pretrain(words)
        require_wandb(config.wandb)
        print(first_line)
        _look_for("data_path", config.data_path, here)
        return
    evaluation = parse(EVALUATORS[run], words, f"run_{run}.py")
    if not evaluation.weights and _needs_weights(evaluation):
        raise InputError("no weights given: use --weights FILE, such as runs/.../checkpoint.pth")
    for name in READ:
        given = getattr(evaluation, name, "")
        for place in given if isinstance(given, tuple) else (given,):
            _look_for(name, place, here)


def _needs_weights(evaluation: BackboneConfig) -> bool:
    """Finished collections are measured without, and their cards name those that a query is looked up with."""
    if isinstance(evaluation, ExtractConfig):
        return not (evaluation.learn_whitening or evaluation.query)
    return True


def _look_for(name: str, place: str, here: bool) -> None:
    """Only a notice where the job runs elsewhere: the cluster's machines may have disks that this one does not see."""
    if not place or ":" in place or Path(place).expanduser().exists():
        return
    if here:
        raise InputError(f"{name} is {printable(place)}, which is not there: check the path")
    log.warning(f"{name} is {printable(place)}, which is not there on this machine: the job's have to have it")


def follow(job: submitit.Job[None], log: Path) -> None:
    """Print what the first process says until the job has ended."""
    place = 0
    while True:
        ended = job.done()
        if log.exists():
            with open(log, "rb") as file:
                file.seek(place)
                data = file.read()
            place += len(data)
            sys.stdout.write(data.decode(errors="replace"))
            sys.stdout.flush()
        if ended:
            return
        time.sleep(0.2)


def command() -> None:
    """The console entry."""
    run_main(main)


if __name__ == "__main__":
    command()
