"""A run as a job of submitit's: one task a process, told before it has to end, and queued again where it stopped.

Each task starts the runner as a process of its own, as torchrun would, and waits for it. SIGUSR1 before the time
limit, or at a preemption, goes on to the runner, which saves and ends with code 75 (docs/reliability.md); only then
submitit's own answer to that signal is given, which queues the job again. SIGTERM goes on too, but there Slurm decides:
it requeues what it preempts, and not what somebody has cancelled.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

# Nothing here needs PyTorch: it would take seconds and memory in a process that only waits for another.
from dino_xcit.errors import PREEMPTED, STOP_SIGNALS, InputError, one_line

if TYPE_CHECKING:
    import submitit

    from dino_xcit.launch_config import LaunchConfig

_SIGNAL_VARIABLE = "SUBMITIT_PREEMPT_SIGNAL"
FIRST_PORT, PORTS = 20_000, 10_000
"""Where the processes of a job meet: below the ports that Linux hands out by itself."""


@dataclass(frozen=True)
class Rank:
    """One process of the run. submitit calls it in each task; when the job is queued again, what :meth:`checkpoint`
    returns takes its place."""

    command: tuple[str, ...]
    """The runner with its flags."""
    restarts: int = 0
    """So many times this job was queued again by us."""

    def __call__(self) -> None:
        """Run the command to its end; the process ends with its exit code."""
        submitit = import_submitit()
        job = submitit.JobEnvironment()
        queue_again = signal.getsignal(signal.SIGUSR1)
        asked: list[int] = []
        child: subprocess.Popen[bytes] | None = None

        def pass_on(number: int, _: FrameType | None) -> None:
            asked.append(number)
            if child:
                child.send_signal(number)

        for number in STOP_SIGNALS:
            signal.signal(number, pass_on)
        child = subprocess.Popen(self.command, env=os.environ | rank_environment(job, os.environ, self.restarts))
        for number in asked:  # what came before there was anybody to pass it on to
            child.send_signal(number)
        try:
            code = child.wait()
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)
            code = child.wait()
        if code == 0:
            return
        # Before the first step there is nothing to save, and a signal ends the runner as it would any process.
        stopped = code in (PREEMPTED, -signal.SIGUSR1, -signal.SIGTERM)
        cancelled = signal.SIGTERM in asked and signal.SIGUSR1 not in asked
        if stopped and not cancelled and job.global_rank == 0 and callable(queue_again):
            _queue_again(queue_again, submitit.core.utils.UncompletedJobError)
        sys.exit(code if code > 0 else 128 - code)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What runs when the job begins anew: the same command, which resumes the run."""
        return import_submitit().helpers.DelayedSubmission(Rank(self.command, self.restarts + 1))


def _queue_again(submitits_answer: Callable[[int, FrameType | None], Any], too_often: type[Exception]) -> None:
    """Queue the job again and end; where that cannot be, say so, and come back."""
    try:
        submitits_answer(signal.SIGUSR1, None)
    except (too_often, OSError, subprocess.SubprocessError) as error:
        print(
            f"warning: the run is saved, but not queued again ({one_line(error)}); the same command resumes it",
            file=sys.stderr,
            flush=True,
        )


def rank_environment(job: submitit.JobEnvironment, inherited: Mapping[str, str], restarts: int) -> dict[str, str]:
    """What torchrun would tell a process, from submitit's view of the job (see dino_xcit/distributed.py).

    Args:
        job: this task's place in its job.
        inherited: the environment besides; Slurm counts its own restarts there.
        restarts: ours.
    """
    here = job.num_tasks // job.num_nodes
    again = max(restarts, int(inherited.get("SLURM_RESTART_COUNT") or 0))
    told = {
        "MASTER_ADDR": job.hostnames[0] if job.num_nodes > 1 else "127.0.0.1",
        "MASTER_PORT": str(FIRST_PORT + int(job.raw_job_id) % PORTS),
        "WORLD_SIZE": str(job.num_tasks),
        "LOCAL_WORLD_SIZE": str(here),
        "RANK": str(job.global_rank),
        "LOCAL_RANK": str(job.local_rank),
        # The watchdog looks after its parent where there is such a name; --resume never is meant for the first start.
        "TORCHELASTIC_RUN_ID": job.job_id,
        "TORCHELASTIC_RESTART_COUNT": str(again),
    }
    return told | ({"OMP_NUM_THREADS": "1"} if here > 1 and "OMP_NUM_THREADS" not in inherited else {})


def submit(launch: LaunchConfig, command: tuple[str, ...], root: Path) -> submitit.Job[None]:
    """Queue ``command`` on every process of a job.

    Args:
        root: the folder to import dino_xcit from.

    Raises:
        InputError: submitit is missing, there is no Slurm here, or it refuses the job.
    """
    submitit = import_submitit()
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    exported = {"PYTHONPATH": os.pathsep.join(paths), _SIGNAL_VARIABLE: os.environ[_SIGNAL_VARIABLE]}
    os.environ.update(exported)
    folder = Path(launch.job_dir)
    try:
        if launch.cluster == "local":
            executor = submitit.LocalExecutor(folder, max_num_timeout=launch.requeues)
            executor.update_parameters(**_on_this_machine(launch))
        else:
            executor = submitit.SlurmExecutor(folder, max_num_timeout=launch.requeues)
            executor.update_parameters(**_on_slurm(launch, exported))
        return executor.submit(Rank(command))
    except OSError as error:
        raise InputError(
            f"cannot write to job_dir {launch.job_dir}: {error.strerror or error}; name another --job-dir"
        ) from error
    except RuntimeError as error:  # no srun here, or what sbatch said
        hint = "; --cluster local runs the job on this machine" if "srun" in str(error) else ""
        raise InputError(f"the job cannot be submitted: {one_line(error)}{hint}") from error


def _on_this_machine(launch: LaunchConfig) -> dict[str, Any]:
    """In submitit's words."""
    return {
        "gpus_per_node": launch.gpus_per_node,
        "tasks_per_node": launch.processes_per_node,
        "timeout_min": launch.seconds / 60,
        "signal_delay_s": launch.signal_delay,
        "stderr_to_stdout": True,
    }


def _on_slurm(launch: LaunchConfig, exported: Mapping[str, str]) -> dict[str, Any]:
    """In submitit's words."""
    return {
        "job_name": launch.job_name,
        "nodes": launch.nodes,
        "gpus_per_node": launch.gpus_per_node or None,
        "ntasks_per_node": launch.processes_per_node,
        "cpus_per_task": launch.cpus_per_task,
        "time": -(-launch.seconds // 60),  # minutes
        "partition": launch.partition or None,
        "account": launch.account or None,
        "constraint": launch.constraint or None,
        "comment": launch.comment or None,
        "signal_delay_s": launch.signal_delay,
        "stderr_to_stdout": True,  # one log a process, in the order in which things were said
        "additional_parameters": {"requeue": True} | launch.additional(),
        # A cluster may hand the job an environment of its own.
        "setup": [f"export {name}={shlex.quote(value)}" for name, value in exported.items()],
        # The first task queues the job again: it must not be ended because another one ended before it.
        "srun_args": ["--kill-on-bad-exit=0"],
    }


def import_submitit() -> Any:
    """The package, with the signal that our runners listen to.

    Raises:
        InputError: it is not installed.
    """
    os.environ[_SIGNAL_VARIABLE] = "USR1"  # read once, when it is imported
    try:
        import submitit
        import submitit.helpers
    except ModuleNotFoundError as error:
        raise InputError(
            "jobs are submitted by the package submitit, which is not installed: pip install 'dino-xcit[slurm]'"
        ) from error
    return submitit
