"""Pipelines in processes of their own that take turns, so that each round has all of them under the same conditions."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from process_group import process_group
from step_settings import Row, Settings, Task

from dino_xcit.errors import InputError

TURN_SECONDS = 1.0
"""A turn has as many steps as the fastest pipeline does in this time, the same number for all."""
MOST_STEPS_A_TURN = 20
IDLE = 0.05
"""Share of a core that a process may use while it waits for its turn."""


class PipelineFailed(Exception):
    """A pipeline's process ended, or ran out of memory; the sentence says which."""


class OutOfMemory(PipelineFailed):
    """The device has no room for a step of this batch."""


class Child:
    """A pipeline's process (benchmarks/step_worker.py)."""

    def __init__(self, task: Task, group: int, cache: Path | None = None) -> None:
        self.row = task.row
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        environment.setdefault("KMP_BLOCKTIME", "0")  # Intel's OpenMP; dino_xcit sets GNU's
        if cache:
            environment["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (it lives as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("step_worker.py")), task.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
            process_group=group,
        )
        self._about: dict[str, Any] | None = None

    def about(self) -> dict[str, Any]:
        """What it says when its code is loaded: threads, versions, the GPU's name."""
        if self._about is None:
            self._about = self._answer()
        return self._about

    def ask(self, do: str, **values: object) -> dict[str, Any]:
        """Give an order and wait for the answer.

        Raises:
            OutOfMemory, PipelineFailed, InputError: instead of an answer.
        """
        self.about()
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # reading says more
            print(json.dumps({"do": do, **values}), file=self._process.stdin, flush=True)
        return self._answer()

    def seconds(self, count: int = 1, warm_up: int = 0) -> float:
        """Seconds a step of a turn of ``count`` steps."""
        return float(self.ask("steps", count=count, warm_up=warm_up)["seconds"])

    def end(self) -> None:
        """There are no more turns."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()

    def kill(self) -> None:
        """End it wherever it is."""
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            print("".join(self._errors.readlines()[-30:]), file=sys.stderr)
            killed = ": killed, perhaps for want of memory" if code == -9 else ""
            raise PipelineFailed(f"the process of {self.row.key!r} ended with code {code}{killed}")
        values: dict[str, Any] = json.loads(line)
        if "error" in values:
            raise InputError(values["error"])
        if "out_of_memory" in values:
            raise OutOfMemory(f"{self.row.key!r} ran out of memory: lower --batch, or leave it out with --only")
        return values


@dataclass
class Measured:
    """What was found out about a pipeline."""

    row: Row
    batch: int
    seconds: list[float] = field(default_factory=list)
    """Of a step, one entry a round."""
    first_step: float = 0.0
    """Seconds of a process's first step, what it had compiled before being there."""
    cold_start: float | None = None
    """Seconds of the first step with nothing compiled before; None: it compiles nothing."""
    peak: int = 0
    """Most memory in bytes: resident on a CPU, allocated on a GPU."""
    imports: int = 0
    """Of it, what was there before anything was built."""
    helpers: int = 0
    """Bytes of the processes that it started."""
    waiting: float = 0.0
    """Share of a core that it used while others had their turn."""
    about: dict[str, Any] = field(default_factory=dict)
    """Threads, versions, the GPU's name."""


def take_turns(tasks: Sequence[Task], rounds: int, say: Callable[[str], None]) -> list[Measured]:
    """Measure pipelines side by side: in each round each has one turn.

    Raises:
        PipelineFailed: one of them ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        caches = {task.row.key: Path(folder) / task.row.key for task in tasks}
        cold = _cold_starts([task for task in tasks if task.row.project == "ours"], caches, say)
        with _processes(tasks, caches) as children:
            found = [Measured(child.row, task.settings.batch) for child, task in zip(children, tasks, strict=True)]
            both = list(zip(children, found, strict=True))
            for child, measured in both:
                child.ask("build")
                measured.first_step, measured.cold_start = child.seconds(), cold.get(child.row.key)
            warm_up = 1 if tasks[0].settings.device == "cuda" else 0  # which gives its memory back after each turn
            counts = _steps_a_turn({child.row.key: child.seconds(warm_up=1) for child in children})
            for number in range(rounds):
                say(f"  round {number + 1} of {rounds}")
                first = number % len(both)  # who follows whom changes
                for child, measured in both[first:] + both[:first]:
                    measured.seconds.append(child.seconds(counts[child.row.key], warm_up))
            for child, measured in both:
                _report(child, measured)
    return found


@contextlib.contextmanager
def _processes(tasks: Sequence[Task], caches: Mapping[str, Path]) -> Iterator[list[Child]]:
    """A process for each pipeline; they load their code at the same time, and are gone at the end."""
    with process_group() as group:
        children = [Child(task, group, caches.get(task.row.key)) for task in tasks]
        try:
            yield children
            for child in children:
                child.end()
        except BaseException:
            for child in children:
                child.kill()
            raise


def _cold_starts(tasks: Sequence[Task], caches: Mapping[str, Path], say: Callable[[str], None]) -> dict[str, float]:
    """Seconds of the first step of those pipelines that compile something, with nothing compiled before; what they
    compile is left in their caches."""
    seconds: dict[str, float] = {}
    with _processes(tasks, caches) as children:
        for child in children:
            child.ask("build")
            first = child.seconds()
            if any(file.is_file() for file in caches[child.row.key].rglob("*")):
                seconds[child.row.key] = first
                say(f"  {child.row.title}: the first step, nothing compiled before: {first:.1f} s")
    return seconds


def _steps_a_turn(seconds: dict[str, float]) -> dict[str, int]:
    """As many as fit into a turn of the fastest training step, the same for all of them; products have their own."""
    steps = [value for key, value in seconds.items() if not key.startswith("peak")]
    fastest = min(steps, default=TURN_SECONDS)

    def fitting(one: float) -> int:
        return max(1, min(MOST_STEPS_A_TURN, round(TURN_SECONDS / one)))

    return {key: fitting(value if key.startswith("peak") else fastest) for key, value in seconds.items()}


def _report(child: Child, measured: Measured) -> None:
    report, measured.about = child.ask("report"), child.about()
    measured.peak, measured.imports, measured.helpers = report["peak"], report["imports"], report["helpers"]
    measured.waiting = report["waited_cpu"] / max(report["waited"], 1e-9)
    if report["waited"] > 1 and measured.waiting > IDLE:
        print(
            f"warning: the process of {measured.row.key!r} used {measured.waiting:.0%} of a core while it waited for "
            f"its turn, expected less than {IDLE:.0%}: it slows the others; --only {measured.row.key} runs it alone",
            file=sys.stderr,
            flush=True,
        )


def memory_alone(task: Task, steps: int = 3) -> Measured:
    """The peak memory of a pipeline after a few steps, with nothing beside it."""
    measured = Measured(task.row, task.settings.batch)
    with _processes([task], {}) as (child,):
        child.ask("build")
        measured.seconds = [child.seconds() for _ in range(steps)]
        _report(child, measured)
    return measured


def largest_batch(task: Task, start_from: int, say: Callable[[str], None]) -> Settings:
    """The settings with the largest batch, ``start_from`` doubled again and again, of which three steps fit.

    Raises:
        OutOfMemory: not even the first one does.
    """
    fits: Settings | None = None
    settings = dataclasses.replace(task.settings, batch=start_from)
    while True:
        try:
            with _processes([dataclasses.replace(task, settings=settings)], {}) as (child,):
                child.ask("build")
                child.seconds(count=3)
        except OutOfMemory:
            if fits is None:
                raise
            return fits
        say(f"  {task.row.title}: batch {settings.batch} fits")
        fits, settings = settings, dataclasses.replace(settings, batch=2 * settings.batch)


def checks(task: Task, rows: Sequence[Row]) -> dict[str, Any]:
    """What :func:`step_checks.check` finds, in a process of its own; ``rows`` are this project's."""
    with _processes([task], {}) as (child,):
        return child.ask("check", rows=[dataclasses.asdict(row) for row in rows])
