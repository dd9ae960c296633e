"""What a step costs with more images, larger images, more prototypes and more processes.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py [--rounds 5]

Measured on this CPU, one thread a process: a small network, images already in memory, all settings in turn in each
round, medians. Two ranks are measured beside one process alone and beside two that have nothing to do with each other,
since two busy cores slow each other down without any exchange. Then, when each of S12/16's gradient messages starts
within the backward pass. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dino_xcit  # noqa: E402, F401  # isort: skip
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook  # noqa: E402

from dino_xcit.config import PretrainConfig  # noqa: E402
from dino_xcit.data.loader import Batch  # noqa: E402
from dino_xcit.errors import run_main  # noqa: E402
from dino_xcit.optim import Schedules  # noqa: E402
from dino_xcit.runtime import distributed  # noqa: E402
from dino_xcit.runtime.memory import keep_freed_memory  # noqa: E402
from dino_xcit.train import build_state, train_step  # noqa: E402

CPU = torch.device("cpu")
BASE: dict[str, Any] = {
    "arch": "xcit_nano_12_p16", "out_dim": 8192, "global_crops_size": 128, "local_crops_size": 64,
    "local_crops_number": 8, "batch_size_per_gpu": 4, "epochs": 100, "warmup_epochs": 0.0, "freeze_last_layer": 0,
    "precision": "fp32", "device": "cpu",
}  # fmt: skip
VARIED: dict[str, list[Any]] = {
    "batch_size_per_gpu": [2, 4, 8, 16],
    "global_crops_size": [64, 128, 192, 256],
    "out_dim": [1024, 8192, 32768, 65536],
}
FULL: dict[str, Any] = {
    "arch": "xcit_small_12_p16", "out_dim": 65536, "global_crops_size": 224, "local_crops_size": 96,
    "batch_size_per_gpu": 1,
}  # fmt: skip


# ---- one process


class Stepper:
    """A run whose images are noise that is in memory already."""

    def __init__(self, changes: Mapping[str, Any]) -> None:
        self.config = PretrainConfig(**(BASE | dict(changes)))
        self.state = build_state(self.config, CPU)
        images = self.config.batch_size_per_gpu
        self.schedules = Schedules.of(self.config, 1000, images * distributed.world_size())
        counts = {self.config.global_crops_size: 2}
        counts[self.config.local_crops_size] = (
            counts.get(self.config.local_crops_size, 0) + self.config.local_crops_number
        )
        crops = [torch.randint(0, 256, (n * images, 3, size, size), dtype=torch.uint8) for size, n in counts.items()]
        self.batch = Batch(crops, list(counts.values()), 0, torch.arange(images))

    def step(self, passes: int = 1) -> float:
        """Seconds of one step."""
        began = time.perf_counter()
        train_step(self.state, [self.batch] * passes, self.schedules, self.config)
        return time.perf_counter() - began


def message_starts(stepper: Stepper) -> list[tuple[float, float]]:
    """(share of the backward pass done when it starts, bytes) for each of DistributedDataParallel's messages."""
    starts: list[tuple[float, int]] = []

    def note(_: object, bucket: Any) -> Any:
        starts.append((time.perf_counter(), bucket.buffer().nbytes))
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]

    note.__annotations__ = {}  # PyTorch compares them with classes; here they are words
    shared = stepper.state.method.ddp_student
    assert isinstance(shared, nn.parallel.DistributedDataParallel)
    shared.register_comm_hook(None, note)
    crops = [crop.float() / 128 - 1 for crop in stepper.batch.crops]
    for _ in range(3):  # the order of the messages is settled in the first
        starts.clear()
        loss = shared(crops).logits.square().mean()
        began = time.perf_counter()
        loss.backward()
        stepper.state.optimizer.zero_grad(set_to_none=True)
    whole = starts[-1][0] - began  # the last message starts when the last gradient is there
    return [((at - began) / whole, float(size)) for at, size in starts]


def worker() -> None:
    """Answers each line on stdin with a line on stdout: a process of its own, or one of several ranks."""
    torch.set_num_threads(1)
    keep_freed_memory()
    distributed.start(CPU)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["CORE"]) % len(cores)]})
    stepper: Stepper | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if request == "starts":
            stepper = None
            print(json.dumps(message_starts(Stepper(FULL))), flush=True)
        else:
            stepper = stepper or Stepper({})
            print(json.dumps(stepper.step(request)), flush=True)


class Workers:
    """Worker processes, one a core: the ranks of a run, or strangers."""

    def __init__(self, number: int, together: bool) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self._processes = []
        for core in range(number):
            own: dict[str, object] = {"CORE": core, "OMP_NUM_THREADS": 1}
            own |= shared | {"RANK": core, "LOCAL_RANK": core} if together else {"WORLD_SIZE": 1}
            environment = os.environ | {key: str(value) for key, value in own.items()}
            command, pipe = [sys.executable, __file__, "--worker"], subprocess.PIPE
            self._processes.append(subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True))

    def ask(self, request: object, number: int | None = None) -> list[Any]:
        """The answers of the first ``number`` of them, who work at the same time."""
        asked = self._processes[:number]
        for process in asked:
            assert process.stdin is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        return [json.loads(process.stdout.readline()) for process in asked if process.stdout is not None]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


# ---- measured


def by_setting(rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds a step for each value of each setting."""
    steppers = {
        (name, value): Stepper({name: value} | ({"local_crops_size": value // 2} if "crops" in name else {}))
        for name, values in VARIED.items()
        for value in values
    }
    times: dict[tuple[str, Any], list[float]] = {key: [] for key in steppers}
    for number in range(rounds + 1):
        for key, stepper in steppers.items():
            seconds = stepper.step()
            if number:  # the first warms up
                times[key].append(seconds)
    return {name: {str(value): median(times[name, value]) for value in values} for name, values in VARIED.items()}


def by_ranks(rounds: int) -> tuple[dict[str, float], list[tuple[float, float]]]:
    """Median seconds a step of one process, two strangers, two ranks (with 1 and 4 passes a step); message starts."""
    strangers, ranks = Workers(2, together=False), Workers(2, together=True)
    times: dict[str, list[float]] = {"1 process": [], "2 strangers": [], "2 ranks": [], "2 ranks, 4 passes": []}
    try:
        for number in range(rounds + 1):
            found = {
                "1 process": max(strangers.ask(1, number=1)),
                "2 strangers": max(strangers.ask(1)),
                "2 ranks": max(ranks.ask(1)),
                "2 ranks, 4 passes": max(ranks.ask(4)),
            }
            for name, seconds in found.items():
                if number:
                    times[name].append(seconds)
        starts = [(share, size) for share, size in ranks.ask("starts")[0]]
    finally:
        strangers.close()
        ranks.close()
    return {name: median(found) for name, found in times.items()}, starts


def report_measured(rounds: int) -> dict[str, Any]:
    """Print what was measured; it for the last line."""
    settings = by_setting(rounds)
    base = ", ".join(f"{name} {BASE[name]}" for name in ("arch", "out_dim", "batch_size_per_gpu", "global_crops_size"))
    print(f"measured, one thread, {base}; local crops half as large")
    for name, times in settings.items():
        print(f"  {name}:")
        for value, seconds in times.items():
            images = int(value) if name == "batch_size_per_gpu" else BASE["batch_size_per_gpu"]
            print(f"    {value:>6s}  {1e3 * seconds:8.1f} ms a step  {1e3 * seconds / images:7.1f} ms an image")
    ranks, starts = by_ranks(rounds)
    print("  processes, each on a core of its own:" if len(os.sched_getaffinity(0)) > 1 else "  processes on ONE core:")
    images = BASE["batch_size_per_gpu"]
    for name, seconds in ranks.items():
        number = images * (1 if name == "1 process" else 2) * (4 if "4 passes" in name else 1)
        print(f"    {name:18s} {1e3 * seconds:8.1f} ms a step  {number / seconds:6.1f} images/s")
    print("  S12/16, 2 x 224 + 8 x 96, 2 ranks: share of the backward pass done when a message starts, and its MB")
    print("    " + ", ".join(f"{100 * share:.0f}%: {size / 1e6:.1f}" for share, size in starts))
    return {"settings_s": settings, "ranks_s": ranks, "message_starts": starts}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker()
    torch.set_num_threads(1)
    keep_freed_memory()
    print(json.dumps(report_measured(arguments.rounds)))
    return None


if __name__ == "__main__":
    run_main(main)
