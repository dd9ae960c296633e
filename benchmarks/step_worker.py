"""One pipeline in a process of its own, which steps when it is told to.

    python benchmarks/step_worker.py TASK

Started by benchmarks/step.py. Orders come as lines of JSON on stdin; each is answered by one line on stdout. What the
pipelines themselves print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dino_xcit  # noqa: E402, F401  # isort: skip  (how threads wait is set before PyTorch is loaded, for all alike)
import torch  # noqa: E402
from step_crops import draw_crops, normalised, view_by_view  # noqa: E402
from step_memory import memory_of_helpers, peak_memory, resident_memory  # noqa: E402
from step_settings import Row, Task  # noqa: E402
from torch import Tensor  # noqa: E402

from dino_xcit.errors import InputError  # noqa: E402
from dino_xcit.runtime.memory import keep_freed_memory  # noqa: E402

PEAK_SIDE = 2048
BATCHES = 2
"""Crops are drawn before anything is timed; so many batches of them take turns."""

Step = Callable[[Sequence[Tensor]], Tensor]


def import_pipeline(task: Task) -> Callable[[], Step]:
    """Load the code of a pipeline; the function that is returned builds it."""
    row, settings, device = task.row, task.settings, torch.device(task.settings.device)
    if row.project == "reference":
        from step_reference import ReferenceStep, import_reference

        modules = import_reference(Path(task.reference))
        return lambda: ReferenceStep(modules, settings, row.precision)
    if row.project == "timm":
        from step_plain import PlainStep

        return lambda: PlainStep(settings, row.precision, device)
    if row.project == "ours":
        from step_ours import FedStep, OurStep

        return lambda: FedStep(settings, row) if row.data else OurStep(settings, row)
    if row.project == "checks":
        return lambda: lambda crops: torch.zeros(())
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[row.precision]

    def product() -> Step:
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        a = torch.randn(PEAK_SIDE, PEAK_SIDE, device=device).to(dtype)
        out = torch.empty_like(a)
        return lambda crops: torch.mm(a, a, out=out)[0, 0]

    return product


def crops_for(task: Task) -> list[list[Tensor]]:
    """The batches that a pipeline steps over, in the form in which its loader hands them over."""
    if task.row.project == "peak":
        return [[]]
    batches = [draw_crops(task.settings, number) for number in range(BATCHES)]
    if task.row.project == "ours":
        return batches
    floats = [normalised(crops) for crops in batches]
    if task.row.project == "reference":
        return [view_by_view(crops, task.settings) for crops in floats]
    return floats


class Pipeline:
    """A pipeline that has been built, and the orders that it knows."""

    def __init__(self, task: Task, step: Step) -> None:
        self.step, self.crops = step, crops_for(task)
        self.cuda = task.settings.device == "cuda"
        self.done = 0

    def steps(self, warm_up: int, count: int) -> dict[str, float]:
        """``warm_up`` steps without, and ``count`` steps with a clock: seconds a step, and the last loss."""
        for _ in range(warm_up):
            self._one()
        self._wait()
        began = time.perf_counter()
        for _ in range(count):
            loss = self._one()
        self._wait()
        seconds = (time.perf_counter() - began) / count
        if self.cuda:
            torch.cuda.empty_cache()  # the others want the memory; the first step of the next turn is not timed
        return {"seconds": seconds, "loss": float(loss)}

    def _one(self) -> Tensor:
        self.done += 1
        return self.step(self.crops[self.done % len(self.crops)])

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def check_all(task: Task, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Hold the pipelines beside each other; ``rows`` are this project's."""
    from step_checks import check

    return check(task.settings, [Row(**row) for row in rows], Path(task.reference) if task.reference else None)


def serve(task: Task, answers: TextIO) -> None:
    """Build the pipeline and follow orders until there are no more."""

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    cuda = task.settings.device == "cuda"
    if task.row.keep_freed_memory and not cuda:
        keep_freed_memory()
    build = import_pipeline(task)
    imports = 0 if cuda else resident_memory()
    name = torch.cuda.get_device_name() if cuda else ""
    answer(threads=torch.get_num_threads(), torch=torch.__version__, timm=version("timm"), gpu=name)
    pipeline: Pipeline | None = None
    rested, rested_cpu = time.perf_counter(), time.process_time()
    waited = waited_cpu = 0.0
    for line in sys.stdin:
        waited += time.perf_counter() - rested
        waited_cpu += time.process_time() - rested_cpu
        order = json.loads(line)
        if order["do"] == "check":
            answer(**check_all(task, order["rows"]))
        elif order["do"] == "build":
            pipeline = Pipeline(task, build())
            answer()
        elif order["do"] == "steps" and pipeline:
            answer(**pipeline.steps(order["warm_up"], order["count"]))
        elif order["do"] == "report":
            peak = torch.cuda.max_memory_allocated() if cuda else peak_memory()
            helpers = memory_of_helpers(os.getpid())
            answer(peak=peak, imports=imports, helpers=helpers, waited=waited, waited_cpu=waited_cpu)
        rested, rested_cpu = time.perf_counter(), time.process_time()


def main() -> None:
    """The process."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        serve(Task.from_json(sys.argv[1]), answers)
    except InputError as error:
        print(json.dumps({"error": str(error)}), file=answers, flush=True)
    except torch.OutOfMemoryError:
        print(json.dumps({"out_of_memory": True}), file=answers, flush=True)


if __name__ == "__main__":
    main()
