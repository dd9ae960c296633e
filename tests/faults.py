"""Faults that a test injects into a process of a real run before it starts. All arguments come from JSON."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dino_xcit import loop, train
from dino_xcit.runtime import atomic

Step = Callable[..., train.StepResult]


def around_each_step(do: Callable[..., train.StepResult]) -> None:
    """Replace each training step ``step(*arguments)`` by ``do(step, *arguments)``."""
    loop.train_step = partial(do, loop.train_step)


def none() -> None:
    """Inject no fault."""


# ---- saving


def die_at_file_operation(folder: str, first_step: int, number: int) -> None:
    """Kill the process just before the ``number``-th file operation below ``folder`` since the save of ``first_step``.

    Counts the saver thread's operations: those that Python reports to audit hooks (open, rename, link, remove, mkdir,
    ...) and fsync. Operations of the main thread, which runs in parallel, would make the count random.
    """
    seen = [-1]

    def count(path: object) -> None:
        if not threading.current_thread().name.startswith("saver"):
            return
        name = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        if seen[0] < 0 and f"step{first_step:08d}.pth" in name:
            seen[0] = 0
        if seen[0] >= 0:
            seen[0] += 1
            if seen[0] == number:
                Path(folder, "died-at").write_text(f"{number} {name}")
                os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        watched = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "shutil.copyfileobj"}
        if event in watched and "died-at" not in str(arguments[0]):
            inside = [a for a in arguments if isinstance(a, (str, bytes, os.PathLike)) and folder in os.fsdecode(a)]
            if inside:
                count(inside[-1])

    fsync = os.fsync

    def counted_fsync(descriptor: int) -> None:
        count(f"fsync of {os.readlink(f'/proc/self/fd/{descriptor}')}")
        fsync(descriptor)

    os.fsync = counted_fsync
    sys.addaudithook(hook)


def die_in_the_middle_of_a_file(bytes_of_a_file: int) -> None:
    """Let the kernel kill the process (SIGXFSZ) at exactly this byte of the first file that grows to it."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_of_a_file, resource.RLIM_INFINITY))


def full_disk_while(flag: str) -> None:
    """Make every fsync fail with ENOSPC while the file ``flag`` exists."""
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if os.path.exists(flag):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    os.fsync = full


def slow_saves(seconds: float) -> None:
    """Delay the completion of each checkpoint, so that a test can act while one is unfinished."""
    write = atomic.write

    def slowly(path: Path, fill: Any) -> atomic.Digest:
        def fill_slowly(file: Any) -> None:
            fill(file)
            file.flush()
            time.sleep(seconds)

        return write(path, fill_slowly if path.name.startswith("step") and path.suffix == ".pth" else fill)

    atomic.write = slowly


# ---- non-finite values


def spoil(what: str, first_step: int, last_step: int) -> None:
    """Make values on this rank non-finite from step ``first_step`` to ``last_step`` (both from 0).

    A non-finite activation reaches the other ranks through the averaged gradients. A teacher logit of -inf has
    a softmax of exactly zero; the other ranks detect it only through an exchanged flag.

    Args:
        what: ``activations``, ``gradients`` or ``teacher`` (a logit).
    """

    def one_minus_infinity(_module: object, _inputs: object, output: Any) -> Any:
        output = output.clone()
        output[0, 0] = -torch.inf
        return output

    def spoilt(step: Step, state: train.TrainState, *arguments: Any) -> train.StepResult:
        if not first_step <= state.step <= last_step:
            return step(state, *arguments)
        method: Any = state.method
        if what == "activations":
            handle = method.student.backbone.blocks[1].register_forward_hook(lambda _, __, out: out + torch.inf)
        elif what == "teacher":
            handle = method.teacher.head.register_forward_hook(one_minus_infinity)
        else:
            handle = next(iter(method.student.parameters())).register_hook(lambda gradient: gradient * torch.nan)
        try:
            return step(state, *arguments)
        finally:
            handle.remove()

    around_each_step(spoilt)


# ---- delays


def slow_steps(seconds: float) -> None:
    """Delay each step, so that a test can act within one."""

    def slowly(step: Step, *arguments: Any) -> train.StepResult:
        time.sleep(seconds)
        return step(*arguments)

    around_each_step(slowly)


def slow_evaluation(seconds: float) -> None:
    """Delay each evaluation, so that a test can act within one."""
    evaluate = loop.evaluate

    def slowly(*arguments: Any) -> dict[str, float]:
        time.sleep(seconds)
        return evaluate(*arguments)

    loop.evaluate = slowly


def together(*several: list[Any]) -> None:
    """Inject several faults."""
    for name, *arguments in several:
        globals()[name](*arguments)


# ---- recording


def record_random_state(path: str) -> None:
    """After each step, write the step and the hash of PyTorch's random state to the file ``path``."""

    def recorded(step: Step, state: train.TrainState, *arguments: Any) -> train.StepResult:
        result = step(state, *arguments)
        digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
        Path(path).write_text(f"{state.step} {digest}")
        return result

    around_each_step(recorded)


def record_images(path: str) -> None:
    """Append a line of JSON per step to ``path``: its number and this rank's image indices for each forward pass."""

    def recorded(step: Step, state: train.TrainState, batches: Any, *arguments: Any) -> train.StepResult:
        with open(path, "a") as file:
            file.write(json.dumps([state.step, [batch.indices.tolist() for batch in batches]]) + "\n")
        return step(state, batches, *arguments)

    around_each_step(recorded)
