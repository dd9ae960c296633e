"""Time of a step by batch size, image size, number of prototypes and number of processes.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py [--rounds 5]

Runs the step of benchmarks/step.py with a small network on this CPU, one thread per process, images in memory. All
settings take turns in each round; figures are medians. Two ranks are compared with one process and with two independent
processes, because two busy cores slow each other down without communication. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dino_xcit  # noqa: E402, F401  # isort: skip  (before torch: configures idle OpenMP threads)
import torch  # noqa: E402
from against import exit_on_sigterm, process_group, timed  # noqa: E402
from step import OurStep, Row, Settings, Worker, draw_crops  # noqa: E402

from dino_xcit.errors import run_main  # noqa: E402
from dino_xcit.runtime.memory import keep_freed_memory  # noqa: E402
from eval.table import table  # noqa: E402

BASE = Settings(arch="xcit_nano_12_p16", batch=4, out_dim=8192, global_size=128, local_size=64)
OURS = Row("ours-fp32", "ours, fp32", "ours", "fp32")
VARIED = {"batch": [2, 4, 8, 16], "global_size": [64, 128, 192, 256], "out_dim": [1024, 8192, 32768, 65536]}
"""Local crops are half as large as the global ones."""


def by_setting(rounds: int) -> dict[str, tuple[int, float]]:
    """Return (images, median seconds) per step for each value of each setting."""
    steps: dict[str, tuple[OurStep, list[torch.Tensor], int]] = {}
    for name, values in VARIED.items():
        for value in values:
            changes: dict[str, Any] = {name: value} | ({"local_size": value // 2} if name == "global_size" else {})
            settings = dataclasses.replace(BASE, **changes)
            steps[f"{name} {value}"] = OurStep(settings, OURS), draw_crops(settings, 0), settings.batch
    times: dict[str, list[float]] = {key: [] for key in steps}
    for _ in range(rounds + 1):
        for key, (step, crops, _) in steps.items():
            times[key].append(timed(partial(step, crops))[1])
    return {key: (steps[key][2], median(found[1:])) for key, found in times.items()}  # drop the warm-up round


def start_two(group: int, together: bool) -> list[Worker]:
    """Start two processes on separate cores: two ranks if ``together``, otherwise independent processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    cores = sorted(os.sched_getaffinity(0))
    workers = []
    for rank in range(2):
        variables = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if together else {}
        workers.append(Worker(OURS, BASE, "", group, environment=variables | {"OMP_NUM_THREADS": "1"}))
        os.sched_setaffinity(workers[-1].process.pid, {cores[rank % len(cores)]})
    for worker in workers:
        worker.ready()
    return workers


def seconds(workers: Sequence[Worker], passes: int) -> float:
    """Run a step in all processes at the same time; return the seconds of the slowest."""
    for worker in workers:
        worker.send("steps", warm_up=0, count=1, arguments={"passes": passes})
    return max(worker.answer()["seconds"] for worker in workers)


def by_ranks(rounds: int) -> dict[str, tuple[int, float]]:
    """Return (images, median seconds) per step of one process, two independent ones, two ranks with 1 or 4 passes."""
    with process_group() as group:
        independent, ranks = start_two(group, together=False), start_two(group, together=True)
        turns = {"1 process": (independent[:1], 1), "2 independent": (independent, 1)}
        turns |= {"2 ranks": (ranks, 1), "2 ranks, 4 passes": (ranks, 4)}
        times = [{name: seconds(*turn) for name, turn in turns.items()} for _ in range(rounds + 1)]
    return {
        name: (BASE.batch * len(workers) * passes, median(found[name] for found in times[1:]))
        for name, (workers, passes) in turns.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    keep_freed_memory()
    exit_on_sigterm()
    print(f"one thread per process, {BASE}")
    if len(os.sched_getaffinity(0)) < 2:
        print("warning: both processes share one core")
    found = by_setting(rounds) | by_ranks(rounds)
    rows = [[name, f"{1e3 * step:.1f}", f"{images / step:.1f}"] for name, (images, step) in found.items()]
    print(table(["", "milliseconds per step", "images/s"], rows))
    print(json.dumps({"rounds": rounds, "seconds": {name: step for name, (_, step) in found.items()}}))


if __name__ == "__main__":
    run_main(main)
