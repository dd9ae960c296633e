"""Simulated sbatch, srun and scontrol for one machine without Slurm.

``sbatch`` starts the batch script in the background. ``srun`` starts the tasks with Slurm's rank variables.
``scontrol`` records its arguments and restarts the script after its end, as ``scontrol requeue`` does.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(os.environ.get("FAKE_SLURM", ""))


def sbatch(script: str) -> None:
    text = Path(script).read_text()
    (FOLDER / "script").write_text(text)
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", text, re.M))
    nodes, per_node = int(options["nodes"]), int(options["ntasks-per-node"])
    names = ",".join(f"host-{number}" for number in range(nodes))
    env = {"SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": "0", "SLURM_JOB_NUM_NODES": str(nodes),
           "SLURM_NTASKS": str(nodes * per_node), "SLURM_JOB_NODELIST": names}  # fmt: skip
    again = "while bash script; [ -e requeue ]; do rm requeue; ((SLURM_RESTART_COUNT++)); done; touch ended"
    job = ["bash", "-c", f"exec &> /dev/null; {again}"]
    subprocess.Popen(job, env=os.environ | env, cwd=FOLDER, start_new_session=True)
    print("Submitted batch job 4711")


def srun(*words: str) -> None:
    output = words[words.index("--output") + 1].replace("%j", os.environ["SLURM_JOB_ID"])
    command = words[max(number for number, word in enumerate(words) if word.startswith("--")) + 1 :]
    total, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_JOB_NUM_NODES"])
    tasks = []
    for rank in range(total):
        env = os.environ | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % (total // nodes))}
        log = open(output.replace("%t", str(rank)), "ab")  # noqa: SIM115
        tasks.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    (FOLDER / "tasks").write_text(" ".join(str(task.pid) for task in tasks))
    (FOLDER / "codes").write_text(" ".join(str(task.wait()) for task in tasks))


def install(folder: Path) -> dict[str, str]:
    """Install the three commands below ``folder`` and return the environment variables that they need."""
    python = f"exec {sys.executable} {__file__}"
    note = 'cd $FAKE_SLURM; echo "$@" >> asked; [ ! -e refuses ] && touch requeue'
    (folder / "bin").mkdir()
    for name, text in (("sbatch", f'{python} sbatch "$@"'), ("srun", f'{python} srun "$@"'), ("scontrol", note)):
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    return {"FAKE_SLURM": str(folder), "PATH": os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])}


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
