"""Asynchronous saving: a step waits for a copy of the state, and a thread writes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dino_xcit.checkpoint.folder import CheckpointFolder
from dino_xcit.errors import InputError
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log


@dataclass
class _Job:
    """Something that the thread was given to do."""

    step: int
    future: Future[object]
    is_save: bool
    """Or a note on one."""


class Saver:
    """Writes the checkpoints of a run in a thread, in a context that does not end before they are written.

    Used on the main process alone. A save that fails leaves the older checkpoints as they are; training goes on until
    ``max_failures`` of them failed in a row.
    """

    def __init__(self, folder: CheckpointFolder, max_failures: int) -> None:
        self.folder = folder
        self._max_failures = max_failures
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saver")
        self._under_way: list[_Job] = []
        self._saved_step = 0
        self._failed_in_a_row = 0
        self._why = ""

    def begin(self, at_step: int) -> None:
        """``at_step``: the step whose state is on the disk already; 0 for a fresh run, which has nothing to lose."""
        self._saved_step = at_step

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        # With several ranks the process ends by os._exit: wait at most 5 s for a save. A single process waits for all
        # writes, because it releases the lock after this.
        futures.wait([job.future for job in self._under_way], timeout=None if distributed.world_size() == 1 else 5)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def save(self, content: Mapping[str, Any], keep: bool = False) -> None:
        """Copy ``content`` to the CPU and write it later. Waits for the save before this one: one copy at a time."""
        self.wait()
        copy = on_cpu(content)
        self._under_way.append(_Job(int(content["step"]), self._thread.submit(self.folder.write, copy, keep), True))

    def note_metric(self, step: int, name: str, value: float) -> None:
        """As :meth:`CheckpointFolder.note_metric`, after that checkpoint is written."""
        self._under_way.append(_Job(step, self._thread.submit(self.folder.note_metric, step, name, value), False))

    def look(self) -> None:
        """Process finished saves without waiting for the others."""
        while self._under_way and self._under_way[0].future.done():
            job = self._under_way.pop(0)
            error = job.future.exception()
            if error is None:
                if job.is_save:
                    self._failed_in_a_row, self._saved_step = 0, job.step
                continue
            if not isinstance(error, OSError):
                raise error  # a programming error
            why = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
            if not job.is_save:
                log.warning(f"cannot write the metric of step {job.step} beside its checkpoint ({why})")
                continue
            self._failed_in_a_row += 1
            self._why = why
            log.warning(
                f"cannot write the checkpoint of step {job.step} ({self._why}): failure {self._failed_in_a_row} of "
                f"{self._max_failures} in a row that end the run; the last saved step is {self._saved_step}"
            )

    def ensure(self, step: int, content: Callable[[], Mapping[str, Any]], keep: bool = False) -> None:
        """Return when the state of ``step`` is on the disk; writes it if no save of it has gone well.

        Raises:
            InputError: it cannot be written.
        """
        self.wait()
        if self._saved_step != step:
            self.save(content(), keep)
            self.wait()
        if self._saved_step != step:
            raise self._error()

    @property
    def save_error(self) -> InputError | None:
        """The error that ends the run, after so many failed saves in a row."""
        return self._error() if self._failed_in_a_row >= self._max_failures else None

    def _error(self) -> InputError:
        return InputError(
            f"cannot write checkpoints to {self.folder.output_dir} ({self._why}): free disk space or fix permissions, "
            f"then run the same command; it resumes after step {self._saved_step}"
        )

    def wait(self) -> None:
        """Until everything that was handed over is on the disk, or has failed."""
        for job in self._under_way:
            job.future.exception()
        self.look()


def on_cpu(value: Any, copies: dict[tuple[Any, ...], Tensor] | None = None) -> Any:
    """A copy of nested dictionaries, lists and tuples with every tensor copied to the CPU, once each."""
    copies = {} if copies is None else copies
    if isinstance(value, Tensor):
        same = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() == 0 or same not in copies:
            copies[same] = value.detach().to("cpu", copy=True)
        return copies[same]
    if isinstance(value, Mapping):
        return {key: on_cpu(inner, copies) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_cpu(inner, copies) for inner in value)
    return value
