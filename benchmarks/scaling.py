"""What a step costs with more images, larger images, more prototypes and more processes.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py [--rounds 5]

A small network on this CPU, one thread a process, images in memory, the step of benchmarks/step.py; all settings in
turn in each round, medians. Two ranks stand beside one process alone and beside two that do not know each other, since
two busy cores slow each other down without any exchange. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dino_xcit  # noqa: E402, F401  # isort: skip  (before torch: it sets how idle threads wait)
import torch  # noqa: E402
from against import exit_on_sigterm, process_group  # noqa: E402
from step import OurStep, Row, Settings, Worker, draw_crops  # noqa: E402

from dino_xcit.errors import run_main  # noqa: E402
from dino_xcit.runtime.memory import keep_freed_memory  # noqa: E402
from eval.table import table  # noqa: E402

BASE = Settings(arch="xcit_nano_12_p16", batch=4, out_dim=8192, global_size=128, local_size=64)
OURS = Row("ours-fp32", "ours, fp32", "ours", "fp32")
VARIED = {
    "batch": [2, 4, 8, 16],
    "global_size": [64, 128, 192, 256],
    "out_dim": [1024, 8192, 32768, 65536],
}
"""Local crops are half as large as the global ones."""


def by_setting(rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds a step for each value of each setting."""
    steps: dict[tuple[str, int], tuple[OurStep, list[torch.Tensor]]] = {}
    for name, values in VARIED.items():
        for value in values:
            changes: dict[str, Any] = {name: value} | ({"local_size": value // 2} if name == "global_size" else {})
            settings = dataclasses.replace(BASE, **changes)
            steps[name, value] = OurStep(settings, OURS), draw_crops(settings, 0)
    times: dict[tuple[str, int], list[float]] = {key: [] for key in steps}
    for _ in range(rounds + 1):
        for key, (step, crops) in steps.items():
            began = time.perf_counter()
            step(crops)
            times[key].append(time.perf_counter() - began)
    # The first round warms up.
    return {name: {str(value): median(times[name, value][1:]) for value in VARIED[name]} for name in VARIED}


def start_two(group: int, together: bool) -> list[Worker]:
    """Two processes, each on a core of its own: the ranks of a run, or strangers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    cores = sorted(os.sched_getaffinity(0))
    workers = []
    for rank in range(2):
        told = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if together else {}
        workers.append(Worker(OURS, BASE, "", group, environment=told | {"OMP_NUM_THREADS": "1"}))
        os.sched_setaffinity(workers[-1].process.pid, {cores[rank % len(cores)]})
    for worker in workers:
        worker.send("build")
    for worker in workers:
        worker.answer()
    return workers


def seconds(workers: Sequence[Worker], passes: int = 1) -> float:
    """A step of all of them at the same time, of the slowest."""
    for worker in workers:
        worker.send("steps", warm_up=0, count=1, arguments={"passes": passes})
    return max(worker.answer()["seconds"] for worker in workers)


def by_ranks(rounds: int) -> dict[str, float]:
    """Median seconds a step of one process, two strangers, two ranks with 1 and with 4 passes a step."""
    times: dict[str, list[float]] = {"1 process": [], "2 strangers": [], "2 ranks": [], "2 ranks, 4 passes": []}
    with process_group() as group:
        strangers, ranks = start_two(group, together=False), start_two(group, together=True)
        for _ in range(rounds + 1):
            times["1 process"].append(seconds(strangers[:1]))
            times["2 strangers"].append(seconds(strangers))
            times["2 ranks"].append(seconds(ranks))
            times["2 ranks, 4 passes"].append(seconds(ranks, passes=4))
    return {name: median(found[1:]) for name, found in times.items()}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    keep_freed_memory()
    exit_on_sigterm()
    print(f"one thread a process, {BASE}")
    settings = by_setting(rounds)
    rows = []
    for name, times in settings.items():
        for value, step in times.items():
            images = int(value) if name == "batch" else BASE.batch
            rows.append([f"{name} {value}", f"{1e3 * step:.1f}", f"{images / step:.1f}"])
    ranks = by_ranks(rounds)
    for name, step in ranks.items():
        images = BASE.batch * (1 if name == "1 process" else 2) * (4 if "4 passes" in name else 1)
        rows.append([name, f"{1e3 * step:.1f}", f"{images / step:.1f}"])
    print(table(["", "milliseconds a step", "images/s"], rows))
    if len(os.sched_getaffinity(0)) < 2:
        print("two processes share ONE core here")
    print(json.dumps({"settings_s": settings, "ranks_s": ranks}))


if __name__ == "__main__":
    run_main(main)
