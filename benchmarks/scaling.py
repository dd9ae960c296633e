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
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dino_xcit  # noqa: E402, F401  # isort: skip  (before torch: it sets how idle threads wait)
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
    """(images, median seconds) a step for each value of each setting."""
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
    return {key: (steps[key][2], median(found[1:])) for key, found in times.items()}  # the first round warms up


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
        worker.ready()
    return workers


def seconds(workers: Sequence[Worker], passes: int) -> float:
    """A step of all of them at the same time, of the slowest."""
    for worker in workers:
        worker.send("steps", warm_up=0, count=1, arguments={"passes": passes})
    return max(worker.answer()["seconds"] for worker in workers)


def by_ranks(rounds: int) -> dict[str, tuple[int, float]]:
    """(images, median seconds) a step of one process, two strangers, two ranks with 1 and with 4 passes a step."""
    with process_group() as group:
        strangers, ranks = start_two(group, together=False), start_two(group, together=True)
        turns = {"1 process": (strangers[:1], 1), "2 strangers": (strangers, 1)}
        turns |= {"2 ranks": (ranks, 1), "2 ranks, 4 passes": (ranks, 4)}
        times = [{name: seconds(*turn) for name, turn in turns.items()} for _ in range(rounds + 1)]
    return {
        name: (BASE.batch * len(workers) * passes, median(found[name] for found in times[1:]))
        for name, (workers, passes) in turns.items()
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    keep_freed_memory()
    exit_on_sigterm()
    print(f"one thread a process, {BASE}")
    if len(os.sched_getaffinity(0)) < 2:
        print("two processes share ONE core here")
    found = by_setting(rounds) | by_ranks(rounds)
    rows = [[name, f"{1e3 * step:.1f}", f"{images / step:.1f}"] for name, (images, step) in found.items()]
    print(table(["", "milliseconds a step", "images/s"], rows))
    print(json.dumps({"rounds": rounds, "seconds": {name: step for name, (_, step) in found.items()}}))


if __name__ == "__main__":
    run_main(main)
