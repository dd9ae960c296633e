"""Saving beside the training: a step waits for a copy of the state, and the disk has the rest of the time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from dino_xcit.errors import InputError
from dino_xcit.reliability.checkpoint_folder import CheckpointFolder


class Saver:
    """Writes the checkpoints of a run in a thread. Used on the main process alone.

    A save that fails leaves the older checkpoints as they are; training goes on until ``tolerated`` of them failed in
    a row.
    """

    def __init__(self, folder: CheckpointFolder, tolerated: int, at_step: int, say: Callable[[str], None]) -> None:
        """``at_step``: the step whose state is on the disk already; 0 for a fresh run, which has nothing to lose."""
        self.folder = folder
        self._tolerated = tolerated
        self._say = say
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saver")
        self._under_way: list[tuple[int, Future[object]]] = []
        self._saved_step = at_step
        self._failed_in_a_row = 0
        self._why = ""

    def save(self, content: Mapping[str, Any], keep: bool = False) -> None:
        """Copy ``content`` to the CPU and write it later. Waits for the save before this one: one copy at a time."""
        self._wait()
        copy = on_cpu(content)
        self._under_way.append((int(content["step"]), self._thread.submit(self.folder.write, copy, keep)))

    def note_knn(self, step: int, knn_top1: float) -> None:
        """As :meth:`CheckpointFolder.note_knn`, after that checkpoint is written."""
        self._under_way.append((step, self._thread.submit(self.folder.note_knn, step, knn_top1)))

    def look(self) -> None:
        """Say what came of the saves that have ended, without waiting for others."""
        while self._under_way and self._under_way[0][1].done():
            step, future = self._under_way.pop(0)
            error = future.exception()
            if error is None:
                self._failed_in_a_row, self._saved_step = 0, step
                continue
            if not isinstance(error, OSError):
                raise error  # a fault of ours
            self._failed_in_a_row += 1
            self._why = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
            self._say(
                f"warning: the checkpoint of step {step} could not be written ({self._why}); that is failure "
                f"{self._failed_in_a_row} in a row of {self._tolerated} that end the run; the last one on the disk is "
                f"that of step {self._saved_step}"
            )

    def ensure(self, step: int, content: Callable[[], Mapping[str, Any]], keep: bool = False) -> None:
        """Return when the state of ``step`` is on the disk; writes it if no save of it has gone well.

        Raises:
            InputError: it cannot be written.
        """
        self._wait()
        if self._saved_step != step:
            self.save(content(), keep)
            self._wait()
        if self._saved_step != step:
            raise self.refusal()

    @property
    def gave_up(self) -> bool:
        """Whether so many saves in a row failed that the run shall stop."""
        return self._failed_in_a_row >= self._tolerated

    def refusal(self) -> InputError:
        """What the run ends with where it cannot save."""
        return InputError(
            f"checkpoints cannot be written to {self.folder.output_dir} ({self._why}): free space or mend the disk, "
            f"then run the same command; it carries on after step {self._saved_step}"
        )

    def _wait(self) -> None:
        for _, future in self._under_way:
            future.exception()
        self.look()


def on_cpu(value: Any) -> Any:
    """A copy of nested dictionaries, lists and tuples with every tensor copied to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: on_cpu(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_cpu(inner) for inner in value)
    return value
