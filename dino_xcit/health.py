"""Conditions that end a run: preemption, too many skipped steps or unreadable images, failed saves.

Collectives hang if one rank leaves the loop before the others. Each rank therefore raises a flag, and all ranks act on
the sum of the flags.
"""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from dino_xcit.config import TrainConfig
from dino_xcit.errors import DIVERGED, PREEMPTED, STOP_SIGNALS, InputError, RunStopped
from dino_xcit.runtime import distributed, watchdog
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import counted

if TYPE_CHECKING:
    from dino_xcit.checkpoint.checkpoints import Checkpoints
    from dino_xcit.data.load_monitor import DataLoadMonitor
    from dino_xcit.data.loader import Batch, StepSampler, Unreadable
    from dino_xcit.train import TrainState
    from dino_xcit.verdict import Judge


class Health:
    """Context manager that handles signals, hangs and lost ranks, and decides when the run stops.

    Raises:
        RunStopped: (from the context) a rank or a loader worker was lost.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self._config = config
        self._stop = StopFlags(device, config.hang_timeout + 30)
        self._skipped = HostCopy(device)
        self._signals = Preemption()
        self._save_error: InputError | None = None
        self._context = ExitStack()

    def __enter__(self) -> Health:
        self._context.callback(self._signals.restore)
        self._context.enter_context(watchdog.watched(self._config.hang_timeout))
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def start(
        self,
        config: TrainConfig,
        sampler: StepSampler,
        monitor: DataLoadMonitor,
        on_divergence: Callable[[], RunStopped],
        judge: Judge | None = None,
    ) -> None:
        """Start handling signals: from now on a signal ends the run after a save.

        Args:
            config: the settings with all choices made.
            sampler: the remaining steps.
            monitor: receives every batch.
            on_divergence: called on every rank after too many consecutive skipped steps; saves the failing step.
            judge: on rank 0, may end the run.
        """
        self._config, self._judge = config, judge
        self._sampler, self._monitor, self._on_divergence = sampler, monitor, on_divergence
        folder, max_share = Path(self._config.output_dir), self._config.max_unreadable
        self._unreadable = UnreadableLog(folder, sampler.length, max_share, start_anew=sampler.start_step == 0)
        self._signals.watch()

    def check(self, state: TrainState, batches: Sequence[Batch], checkpoints: Checkpoints) -> None:
        """Exchange flags with the other ranks before a step.

        Raises:
            RunStopped: the run ends, on every rank; after a stop signal the state is saved.
            InputError: too many images are unreadable, or checkpoints cannot be written.
        """
        watchdog.phase("exchanging stop flags", state.step)
        self._monitor.note(batches)
        seen = state.step * self._sampler.global_batch
        self._save_error = self._save_error or checkpoints.save_error  # on CUDA the flag takes effect a step later
        flags = self._stop.exchange(
            stop=self._signals.signal_name is not None,
            unreadable=self._unreadable.note(batches),
            too_many_unreadable=self._unreadable.too_many(seen),
            diverged=self._skipped.read(state.skipped_in_a_row) >= self._config.max_skipped_steps,
            cannot_save=self._save_error is not None,
            collapsed=self._judge is not None and self._judge.stops,
        )
        if flags["unreadable"]:
            self._unreadable.write()
        if flags["too_many_unreadable"]:
            raise self._unreadable.refusal(seen) if distributed.is_main() else RunStopped(2, "")
        if flags["cannot_save"]:
            raise self._save_error or RunStopped(2, "")
        if flags["collapsed"]:
            raise RunStopped(DIVERGED, self._judge.sentence if self._judge and distributed.is_main() else "")
        # On a GPU the flag is based on an older count; check the current one.
        if flags["diverged"] and int(state.skipped_in_a_row) >= self._config.max_skipped_steps:
            raise self._on_divergence()
        if flags["stop"]:
            checkpoints.finish()
            raise RunStopped(
                PREEMPTED, self._signals.sentence(state.step, self._config.resume) if distributed.is_main() else ""
            )
        compiles = self._config.kernels in ("compile", "fused") and state.step == self._sampler.start_step
        watchdog.phase("compiling the kernels" if compiles else "training step", state.step, limit=not compiles)

    def finish(self, state: TrainState) -> None:
        """List the last unreadable images, report skipped steps, and wait for the other ranks.

        Raises:
            RunStopped: every step was skipped.
        """
        self._unreadable.write()
        skipped, last, scale = int(state.skipped_steps), int(state.skipped_in_a_row), state.scaler.get_scale()
        found = f"{counted(skipped, 'step')} of {state.step} were not finite and were skipped"
        if state.scaler.is_enabled() and scale >= 1:
            found += f": the loss scale of fp16 is settling (now {scale:g}); train more steps, or use --precision fp32"
        elif last:
            found += f", including the last {last}: lower --lr or --clip-grad"
        watchdog.phase("leaving", state.step)
        distributed.barrier()
        if skipped == state.step:
            raise RunStopped(DIVERGED, f"error: no step changed the weights; {found}" if distributed.is_main() else "")
        if skipped:
            log.warning(found)


class StopFlags:
    """Sums a few integers over all ranks on the CPU (gloo) in one all-reduce.

    On CUDA each call returns the sums of the previous call, so that no rank waits for the current step of another.
    """

    def __init__(self, device: torch.device, timeout: float) -> None:
        """``timeout``: seconds after which the all-reduce fails."""
        self._late = device.type != "cpu"
        self._group: dist.ProcessGroup | None = None
        if distributed.world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))  # type: ignore[assignment]
        self._posted: tuple[Tensor, dist.Work] | None = None

    def exchange(self, **values: int) -> dict[str, int]:
        """Return the sums of the values over all ranks, by name. The first call on CUDA returns zeros.

        Must be called on every rank with the same names.
        """
        own = torch.tensor([int(value) for value in values.values()])
        if self._group is None:
            return dict(zip(values, own.tolist(), strict=True))
        before = self._posted
        work = dist.all_reduce(own, group=self._group, async_op=True)
        assert work is not None
        self._posted = (own, work)
        if self._late and before is None:
            return dict.fromkeys(values, 0)
        sums, work = before if self._late and before is not None else self._posted
        work.wait()
        return dict(zip(values, sums.tolist(), strict=True))


class HostCopy:
    """Reads a number on the device without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._known = 0
        self._copy = torch.zeros((), dtype=torch.int64, pin_memory=True) if device.type == "cuda" else None
        self._arrives: torch.cuda.Event | None = None

    def read(self, number: Tensor) -> int:
        """Return the number; on CUDA its value some steps ago."""
        if self._copy is None:
            return int(number)
        if self._arrives is None or self._arrives.query():
            if self._arrives is not None:
                self._known = int(self._copy)
            self._copy.copy_(number, non_blocking=True)
            self._arrives = torch.cuda.Event()
            self._arrives.record()
        return self._known


class Preemption:
    """Records stop signals, which come from Slurm, torchrun or the user.

    Slurm's ``--signal=USR1@120`` sends SIGUSR1 two minutes before the time limit; a preempted job gets SIGTERM.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        """The last signal; None if there was none."""
        self._before: dict[signal.Signals, Any] = {}

    def watch(self) -> None:
        """Handle both signals until :meth:`restore`. Must be called from the main thread."""
        self._before = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}

    def restore(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def sentence(self, step: int, resume: str) -> str:
        """Return the last message of a run with ``--resume`` ``resume``."""
        by = self.signal_name or "a signal to another rank"
        without = " without --resume never" if resume == "never" else ""
        return f"stopped by {by} after saving step {step}: run the same command{without} to resume"

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name


UNREADABLE_FILE = "unreadable_images.jsonl"

_MIN_COUNTED = 10_000
"""Minimum number of images over which the share of unreadable ones is computed."""


class UnreadableLog:
    """Writes ``unreadable_images.jsonl``: one line per replaced image, with its path and the cause.

    Each rank records its own images; rank 0 writes. Each image is listed once.
    """

    def __init__(self, folder: Path, images: int, max_share: float, start_anew: bool) -> None:
        """``max_share``: maximum share of unreadable images among ``images``."""
        self.path = folder / UNREADABLE_FILE
        self._images, self._max_share = images, max_share
        self._noted: list[Unreadable] = []
        self._listed: set[int] = set()
        if distributed.is_main():
            try:
                self._open(start_anew)
            except OSError as error:
                log.warning(f"cannot read or write {self.path} ({error.strerror})")

    def _open(self, start_anew: bool) -> None:
        if start_anew:
            self.path.unlink(missing_ok=True)
        self._listed = {row["index"] for row in read_unreadable(self.path)}
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("\n")  # a crash truncated the last line

    def __len__(self) -> int:
        return len(self._listed)

    def note(self, batches: Iterable[Batch]) -> int:
        """Record the unreadable images of these batches and return their number."""
        before = len(self._noted)
        for batch in batches:
            self._noted += batch.unreadable
        return len(self._noted) - before

    def write(self) -> None:
        """Gather the recorded images of all ranks and append new ones. Must be called on every rank."""
        noted, self._noted = self._noted, []
        gathered = [bad for part in distributed.gather_objects(noted) for bad in part]
        if not distributed.is_main():
            return
        new = []
        for bad in sorted(gathered, key=lambda bad: (bad.epoch, bad.index)):
            if bad.index not in self._listed:
                self._listed.add(bad.index)
                new.append(bad)
        if not new:
            return
        if len(new) == len(self._listed):
            log.warning(
                f"cannot read {new[0].name} ({new[0].cause}): replaced by another image; {self.path} lists all of them"
            )
        try:
            with open(self.path, "a", encoding="utf-8", errors="surrogateescape") as file:
                file.writelines(json.dumps(dataclasses.asdict(bad)) + "\n" for bad in new)
        except OSError as error:
            log.warning(f"{self.path} cannot be written ({error.strerror})")

    def too_many(self, seen: int) -> bool:
        """Whether more than the allowed share of the first ``seen`` images is unreadable."""
        denominator = min(max(seen, _MIN_COUNTED), self._images)
        return len(self._listed) > self._max_share * denominator

    def refusal(self, seen: int) -> InputError:
        """Return the error for too many unreadable images."""
        return InputError(
            f"{len(self._listed):,} of the first {min(seen, self._images):,} images cannot be read, expected at most "
            f"{100 * self._max_share:g}% (--max-unreadable {self._max_share:g}): {self.path} lists them with their "
            "causes; repair or remove them, or raise --max-unreadable"
        )


def read_unreadable(path: Path) -> list[dict[str, Any]]:
    """Read ``unreadable_images.jsonl``, without lines truncated by a crash."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("index"), int):
            rows.append(row)
    return rows
