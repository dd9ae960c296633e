"""Asynchronous saving: the training step copies the state to the CPU, and a thread writes the copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dino_xcit.checkpoint.folder import CheckpointFolder, Score
from dino_xcit.errors import InputError
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log


@dataclass
class _Job:
    """A pending task of the thread."""

    step: int
    future: Future[object]
    is_save: bool
    """False: scores to store in a manifest."""


class Saver:
    """Context manager that writes checkpoints in a thread and waits for them at the end. Used on rank 0 only.

    A failed save leaves older checkpoints unchanged. Training continues until ``max_failures`` consecutive failures.
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
        """Set the last saved step; 0 for a fresh run."""
        self._saved_step = at_step

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        # With several ranks the process ends with os._exit, so wait at most 5 s. A single process waits for all writes,
        # because it releases the lock afterwards.
        futures.wait([job.future for job in self._under_way], timeout=None if distributed.world_size() == 1 else 5)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def save(self, content: Mapping[str, Any], keep: bool = False) -> None:
        """Copy ``content`` to the CPU and write it later. Waits for the previous save, to hold one copy at a time."""
        self.wait()
        copy = on_cpu(content)
        self._under_way.append(_Job(int(content["step"]), self._thread.submit(self.folder.write, copy, keep), True))

    def note_scores(self, step: int, scores: Mapping[str, Score]) -> None:
        """Call :meth:`CheckpointFolder.note_scores` after pending saves."""
        self._under_way.append(_Job(step, self._thread.submit(self.folder.note_scores, step, scores), False))

    def poll(self) -> None:
        """Process the results of finished tasks without waiting for pending ones."""
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
                log.warning(f"cannot write the metric of step {job.step} to its manifest ({why})")
                continue
            self._failed_in_a_row += 1
            self._why = why
            log.warning(
                f"cannot write the checkpoint of step {job.step} ({self._why}): failure {self._failed_in_a_row} of "
                f"{self._max_failures} before the run ends; the last saved step is {self._saved_step}"
            )

    def ensure(self, step: int, content: Callable[[], Mapping[str, Any]], keep: bool = False) -> None:
        """Wait until the state of ``step`` is on disk; save it if no save of it succeeded.

        Raises:
            InputError: the checkpoint cannot be written.
        """
        self.wait()
        if self._saved_step != step:
            self.save(content(), keep)
            self.wait()
        if self._saved_step != step:
            raise self._error()

    @property
    def save_error(self) -> InputError | None:
        """The error that ends the run after too many consecutive failed saves."""
        return self._error() if self._failed_in_a_row >= self._max_failures else None

    def _error(self) -> InputError:
        return InputError(
            f"cannot write checkpoints to {self.folder.output_dir} ({self._why}): free disk space or fix permissions, "
            f"then run the same command; it resumes after step {self._saved_step}"
        )

    def wait(self) -> None:
        """Wait until all pending tasks have finished or failed."""
        for job in self._under_way:
            job.future.exception()
        self.poll()


def on_cpu(value: Any, copies: dict[tuple[Any, ...], Tensor] | None = None) -> Any:
    """Copy nested dictionaries, lists and tuples with all tensors on the CPU; shared tensors are copied once."""
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
