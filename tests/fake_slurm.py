"""sbatch, srun and scontrol for one machine, as small scripts: what a job is told, and what it asks for, without Slurm.

``sbatch FILE`` starts the batch script at once, in the background; ``srun`` starts SLURM_NTASKS tasks with the numbers
that Slurm gives them, and sends on the signals that it gets; ``scontrol requeue`` writes down that it was asked, and
starts the script again when it has ended, as Slurm does.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HEADER = f"#!{sys.executable}\nimport os, re, signal, subprocess, sys, time\nfrom pathlib import Path\n"

SBATCH = """
folder = Path(os.environ["FAKE_SLURM"])
script = Path(sys.argv[1])
job = "4711"
(folder / "script").write_text(script.read_text())
told = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", script.read_text(), re.M))
nodes, each = int(told["nodes"]), int(told["ntasks-per-node"])
names = ",".join(f"host-{number}" for number in range(nodes))
env = os.environ | {"SLURM_JOB_ID": job, "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_NTASKS": str(nodes * each),
                    "SLURM_JOB_NODELIST": names, "FAKE_EACH": str(each)}
again = "import os, subprocess, sys, pathlib\\n" \\
    "folder, script = map(pathlib.Path, sys.argv[1:])\\n" \\
    "count = 0\\n" \\
    "while True:\\n" \\
    "    env = dict(os.environ, **({'SLURM_RESTART_COUNT': str(count)} if count else {}))\\n" \\
    "    code = subprocess.call(['bash', str(script)], env=env)\\n" \\
    "    count += 1\\n" \\
    "    if not (folder / 'requeue').exists(): break\\n" \\
    "    (folder / 'requeue').unlink()\\n" \\
    "(folder / 'code').write_text(str(code))\\n"
subprocess.Popen([sys.executable, "-c", again, str(folder), str(folder / "script")], env=env,
                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
print(f"Submitted batch job {job}")
"""

SRUN = """
folder = Path(os.environ["FAKE_SLURM"])
words = sys.argv[1:]
output = words[words.index("--output") + 1]
place = max(number for number, word in enumerate(words) if word.startswith("--"))
tasks, each = int(os.environ["SLURM_NTASKS"]), int(os.environ["FAKE_EACH"])
time.sleep(0.5)  # the launcher puts the job where the tasks look for it
running = []
for task in range(tasks):
    env = os.environ | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task % each), "SLURM_NODEID": str(task // each)}
    log = open(output.replace("%j", os.environ["SLURM_JOB_ID"]).replace("%t", str(task)), "ab")
    running.append(subprocess.Popen(words[place + 1:], env=env, stdout=log, stderr=log, start_new_session=True))
(folder / "tasks").write_text(" ".join(str(task.pid) for task in running))
codes = [task.wait() for task in running]
(folder / "codes").write_text(" ".join(map(str, codes)))
sys.exit(max(codes))
"""

SCONTROL = """
folder = Path(os.environ["FAKE_SLURM"])
with open(folder / "asked", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if (folder / "refuses").exists():
    sys.exit("scontrol: error: no")
(folder / "requeue").touch()
"""


def install(folder: Path) -> dict[str, str]:
    """The three commands below ``folder``, and the environment in which they are found."""
    (folder / "bin").mkdir(parents=True)
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / "bin" / name).write_text(HEADER + text)
        (folder / "bin" / name).chmod(0o755)
    return {"FAKE_SLURM": str(folder), "PATH": os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])}
