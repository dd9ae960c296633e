"""Faults that a test puts into a real process of a run before it starts. Each takes plain words: they come as JSON."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dino_xcit.runtime import atomic


def none() -> None:
    """A healthy process."""


def die() -> None:
    """As the kernel's out-of-memory killer does it: no handler, no exit code, nothing flushed."""
    os.kill(os.getpid(), signal.SIGKILL)


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
                die()

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
    """Half of it in the middle of the file, half of it before it is flushed: so that a test has the time to hit one."""
    write = atomic.write

    class Halting:
        def __init__(self, file: Any) -> None:
            self.file, self.writes = file, 0

        def write(self, data: bytes) -> int:
            self.writes += 1
            if self.writes == 100:
                time.sleep(seconds / 2)
            return self.file.write(data)

        def flush(self) -> None:
            self.file.flush()

    def slowly(path: Path, fill: Any) -> atomic.Digest:
        def fill_with_halts(file: Any) -> None:
            fill(Halting(file))
            file.flush()
            time.sleep(seconds / 2)

        return write(path, fill_with_halts if path.name.startswith("step") and path.suffix == ".pth" else fill)

    atomic.write = slowly


# ---- numbers that are not finite


class Replaced:
    """A method of one object gives ``change(what it gave)``, until :meth:`remove`."""

    def __init__(self, owner: object, name: str, change: Callable[[Any], Any]) -> None:
        self._owner, self._name = owner, name
        method = getattr(owner, name)
        setattr(owner, name, lambda *arguments: change(method(*arguments)))

    def remove(self) -> None:
        """As it was."""
        delattr(self._owner, self._name)


def spoil(what: str, first_step: int, last_step: int) -> None:
    """From step ``first_step`` to ``last_step`` (from 0) something of this rank is not finite: the ``loss``, the
    ``gradients`` or the ``activations``."""
    from dino_xcit import train

    def wrong(state: train.TrainState) -> bool:
        return first_step <= state.step <= last_step

    step = train.train_step

    def spoilt(state: train.TrainState, *arguments: Any) -> train.StepResult:
        if not wrong(state):
            return step(state, *arguments)
        if what == "loss":
            handle: Any = Replaced(state.method.loss, "cross_entropy", lambda loss: loss * torch.nan)
        elif what == "activations":
            block = state.method.student.backbone.blocks[1]  # type: ignore[index, union-attr]
            handle = block.register_forward_hook(lambda _, __, out: out + torch.inf)
        else:
            parameter = next(iter(state.method.student.parameters()))
            handle = parameter.register_hook(lambda gradient: gradient * torch.nan)
        try:
            return step(state, *arguments)
        finally:
            handle.remove()

    train.train_step = spoilt


# ---- the pace of a run


def slow_steps(seconds: float) -> None:
    """Each step takes so much longer: a test can act within one."""
    from dino_xcit import train

    step = train.train_step

    def slowly(*arguments: Any) -> train.StepResult:
        time.sleep(seconds)
        return step(*arguments)

    train.train_step = slowly


def slow_evaluation(seconds: float) -> None:
    """Each evaluation takes so much longer: a test can act within one."""
    from dino_xcit import observers

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
    import hashlib

    from dino_xcit import train

    step = train.train_step

    def recorded(state: train.TrainState, *arguments: Any) -> train.StepResult:
        result = step(state, *arguments)
        digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
        Path(path).write_text(f"{state.step} {digest}")
        return result

    train.train_step = recorded


def record_images(path: str) -> None:
    """A line of JSON a step: its number, and the images of each of this rank's forward passes."""
    import json

    from dino_xcit import train

    step = train.train_step

    def recorded(state: train.TrainState, batches: Any, *arguments: Any) -> train.StepResult:
        with open(path, "a") as file:
            file.write(json.dumps([state.step, [batch.indices.tolist() for batch in batches]]) + "\n")
        return step(state, batches, *arguments)

    train.train_step = recorded
