"""Every setting of a launch on a cluster, with its default: what run_slurm.py takes besides the runner's own flags."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, MinLen

from dino_xcit.bounds import FilePath, Repeatable
from dino_xcit.errors import InputError

_OURS = {
    "nodes": "--nodes", "gpus-per-node": "--gpus-per-node", "ntasks-per-node": "--tasks-per-node",
    "ntasks": "--tasks-per-node", "cpus-per-task": "--cpus-per-task", "time": "--time", "partition": "--partition",
    "account": "--account", "constraint": "--constraint", "comment": "--comment", "job-name": "--job-name",
    "signal": "--signal-delay", "output": "--job-dir", "error": "--job-dir", "requeue": "--requeues",
    "open-mode": "--job-dir",
}  # fmt: skip
"""Slurm's options that the launcher sets itself, and the flag that decides them."""


@dataclass(frozen=True)
class LaunchConfig:
    """Settings of run_slurm.py; every other flag is the runner's, as it would be typed after torchrun."""

    run: Literal["pretrain", "knn", "linear", "extract", "retrieval"] = "pretrain"
    """What to start: run_pretrain.py, run_knn.py, run_linear.py, run_extract.py or run_retrieval.py."""
    cluster: Literal["slurm", "local"] = "slurm"
    """slurm: queue a job; local: the same job on this machine, now, and wait for it."""
    nodes: Annotated[int, Ge(1)] = 1
    """Machines."""
    gpus_per_node: Annotated[int, Ge(0)] = 1
    """GPUs a machine; 0: none."""
    tasks_per_node: Annotated[int, Ge(0)] = 0
    """Processes a machine; 0: one a GPU, or one where there is none."""
    cpus_per_task: Annotated[int, Ge(1)] = 10
    """Cores a process, for its loader processes; docs/scaling.md says how many an architecture needs."""
    time: str = "1-00:00:00"
    """Time limit, as Slurm writes it: MINUTES, H:MM:SS, DAYS-HOURS, DAYS-H:MM:SS ... The run is told before it ends,
    saves, and is queued again."""
    partition: str = ""
    """Slurm's partition; empty: the cluster's default."""
    account: str = ""
    """Whom the time is charged to; empty: the cluster's default."""
    constraint: str = ""
    """Features that the machines must have, such as h100."""
    comment: str = ""
    """A word for whoever reads the queue."""
    job_name: str = "dino-xcit"
    """The job's name in the queue."""
    slurm_additional: Annotated[tuple[str, ...], Repeatable] = ()
    """Other options of sbatch: KEY=VALUE, such as qos=high mem=200G, or KEY alone, such as exclusive."""
    job_dir: Annotated[FilePath, MinLen(1)] = "runs/slurm"
    """Where jobs and their logs go, JOB_DIR/JOBID_PROCESS_log.out; every machine has to see it."""
    signal_delay: Annotated[int, Ge(1)] = 120
    """Seconds before the time limit at which the run is told; a step, a save, and W&B's last words must fit in."""
    requeues: Annotated[int, Ge(0)] = 100
    """So many times the job is queued again after its time limit."""

    def check(self) -> None:
        """Check how the settings go together, and texts.

        Raises:
            InputError: names the field, its value and what is expected.
        """
        if self.cluster == "local" and self.nodes != 1:
            raise InputError(f"nodes is {self.nodes}, but --cluster local is this machine alone: expected 1")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str) and not text.isprintable():  # a line of its own in the batch script
                    raise InputError(f"{field.name} is {text!r}, expected text of one line")
        if "%" in self.job_dir:
            raise InputError(f"job_dir is {self.job_dir!r}, expected a folder, such as runs/slurm")
        if not self.seconds > self.signal_delay:
            raise InputError(
                f"time is {self.time}, expected more than signal_delay, {self.signal_delay} s, to train in"
            )
        self.additional()

    @property
    def processes_per_node(self) -> int:
        """Ranks a machine."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def seconds(self) -> int:
        """The time limit.

        Raises:
            InputError: it is not written as Slurm does.
        """
        forms = (
            r"(?P<m>\d+)(:(?P<s>\d\d))?",
            r"(?P<h>\d+):(?P<m>\d\d):(?P<s>\d\d)",
            r"(?P<d>\d+)-(?P<h>\d+)(:(?P<m>\d\d)(:(?P<s>\d\d))?)?",
        )
        found = next((match for form in forms if (match := re.fullmatch(form, self.time, re.ASCII))), None)
        if found is None or len(self.time) > 20:
            raise InputError(f"time is {self.time!r}, expected MINUTES, M:SS, H:MM:SS, DAYS-HOURS or DAYS-H:MM:SS")
        part = {name: int(value or 0) for name, value in found.groupdict().items()}
        return ((part.get("d", 0) * 24 + part.get("h", 0)) * 60 + part.get("m", 0)) * 60 + part.get("s", 0)

    def additional(self) -> dict[str, str | bool]:
        """``slurm_additional`` by key; True for one without a value.

        Raises:
            InputError: one that is no option, or one that a flag of ours decides.
        """
        options: dict[str, str | bool] = {}
        for entry in self.slurm_additional:
            key, equals, value = entry.removeprefix("--").partition("=")
            key = key.replace("_", "-")
            if not re.fullmatch(r"[a-z][a-z-]*", key):
                raise InputError(f"slurm_additional has {entry!r}, expected KEY=VALUE, such as qos=high")
            if key in _OURS:
                raise InputError(f"slurm_additional has {entry!r}, which {_OURS[key]} decides: use that")
            options[key] = value if equals else True
        return options
