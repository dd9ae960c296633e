"""Faults that a test puts into a real process of a run before it starts. Each takes plain words: they come as JSON."""

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

from dino_xcit import observers, train
from dino_xcit.runtime import atomic

Step = Callable[..., train.StepResult]


def around_each_step(do: Callable[..., train.StepResult]) -> None:
    """``do(step, *arguments)`` takes the place of ``step(*arguments)``."""
    train.train_step = partial(do, train.train_step)


def none() -> None:
    """A healthy process."""


# ---- saving


def die_at_file_operation(folder: str, first_step: int, number: int) -> None:
    """Die just before the ``number``-th operation on files below ``folder`` since the save of ``first_step`` began.

    The operations are those that Python reports to audit hooks (open, rename, link, remove, mkdir, ...) and fsync, in
    the thread that saves: the main thread goes on meanwhile, and its operations would make the count a matter of luck.
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
    """The kernel ends the process (SIGXFSZ) at exactly that byte of the first file that grows so long."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_of_a_file, resource.RLIM_INFINITY))


def full_disk_while(flag: str) -> None:
    """Every flush to the disk fails with ENOSPC as long as the file ``flag`` exists."""
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if os.path.exists(flag):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    os.fsync = full


def slow_saves(seconds: float) -> None:
    """Each checkpoint is so much longer unfinished: so that a test has the time to hit one."""
    write = atomic.write

    def slowly(path: Path, fill: Any) -> atomic.Digest:
        def fill_slowly(file: Any) -> None:
            fill(file)
            file.flush()
            time.sleep(seconds)

        return write(path, fill_slowly if path.name.startswith("step") and path.suffix == ".pth" else fill)

    atomic.write = slowly


# ---- numbers that are not finite


def spoil(what: str, first_step: int, last_step: int) -> None:
    """From step ``first_step`` to ``last_step`` (from 0) this rank's ``activations``, ``gradients`` or ``teacher`` are
    not finite. A bad activation reaches the other ranks through the shared gradients; a bad logit of the teacher, whose
    softmax is a clean zero, only if the ranks tell each other."""

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


# ---- the pace of a run


def slow_steps(seconds: float) -> None:
    """Each step takes so much longer: a test can act within one."""

    def slowly(step: Step, *arguments: Any) -> train.StepResult:
        time.sleep(seconds)
        return step(*arguments)

    around_each_step(slowly)


def slow_evaluation(seconds: float) -> None:
    """Each evaluation takes so much longer: a test can act within one."""
    evaluate = observers.evaluate

    def slowly(*arguments: Any) -> dict[str, float]:
        time.sleep(seconds)
        return evaluate(*arguments)

    observers.evaluate = slowly


def together(*several: list[Any]) -> None:
    """More than one of them."""
    for name, *arguments in several:
        globals()[name](*arguments)


# ---- looking on


def record_random_state(path: str) -> None:
    """After each step, the hash of PyTorch's generator is what this file says."""

    def recorded(step: Step, state: train.TrainState, *arguments: Any) -> train.StepResult:
        result = step(state, *arguments)
        digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
        Path(path).write_text(f"{state.step} {digest}")
        return result

    around_each_step(recorded)


def record_images(path: str) -> None:
    """A line of JSON a step: its number, and the images of each of this rank's forward passes."""

    def recorded(step: Step, state: train.TrainState, batches: Any, *arguments: Any) -> train.StepResult:
        with open(path, "a") as file:
            file.write(json.dumps([state.step, [batch.indices.tolist() for batch in batches]]) + "\n")
        return step(state, batches, *arguments)

    around_each_step(recorded)
