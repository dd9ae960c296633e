"""Checkpoints of a run, used on all ranks: rank 0 writes, every rank reads."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino_xcit.checkpoint import resume
from dino_xcit.checkpoint.folder import BEST, BEST_LABELFREE, CheckpointFolder, Score
from dino_xcit.checkpoint.resume import Stored
from dino_xcit.checkpoint.saver import Saver
from dino_xcit.checkpoint.state import Run, content_of, restore
from dino_xcit.config import TrainConfig
from dino_xcit.errors import InputError
from dino_xcit.runtime import distributed, watchdog
from dino_xcit.runtime import logging as log

if TYPE_CHECKING:
    from dino_xcit.observers import Observers
    from dino_xcit.train import TrainState


class Checkpoints:
    """Context manager that locks the output directory and waits for pending saves at the end.

    Raises:
        InputError: (on entering) the directory cannot be written, or another run uses it.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self.folder = CheckpointFolder(Path(config.output_dir), config.keep_last)
        self._saver = Saver(self.folder, config.max_failed_saves) if distributed.is_main() else None
        self._context = ExitStack()

    def __enter__(self) -> Checkpoints:
        self._context.enter_context(resume.output_folder(self.folder.output_dir))
        if self._saver:
            self._context.enter_context(self._saver)
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def find(self) -> Stored:
        """Return the newest intact checkpoint, or an empty one for a fresh start."""
        return resume.find_stored(self._config, self.folder)

    def begin(self, stored: Stored, state: TrainState, observers: Observers, run: Run) -> None:
        """Restore the state from ``stored`` unless it is empty, and register it for later saves.

        Raises:
            InputError: the checkpoint belongs to another run or does not fit.
        """
        if stored:
            resume.refuse_another_run(stored, run)
            restore(state, stored.content, stored.path, observers)
            if run.config.resume == "changed":  # the new settings may fix the skipped steps
                state.skipped_in_a_row.zero_()
            state.step = resume.step_of(stored, run)
        content_of(state, run)  # fails early, on every rank, if the method uses a reserved key
        resume.prepare(run.config, self.folder, stored)
        self._state, self._observers, self._run = state, observers, run
        if self._saver:
            self._saver.begin(state.step)

    @property
    def save_error(self) -> InputError | None:
        """The error that ends the run after too many consecutive failed saves; None on other ranks than 0."""
        return self._saver.save_error if self._saver else None

    def maybe_save(self, run_ends: bool) -> bool:
        """Save at the end of each epoch and of the run, and every ``save_every`` steps; return whether it was due."""
        step, config = self._state.step, self._run.config
        epoch_ends = step % self._run.steps_per_epoch == 0
        if self._saver:
            self._saver.poll()
        if not (epoch_ends or run_ends or (config.save_every and step % config.save_every == 0)):
            return False
        self._observers.deliver()
        # Saving while steps are skipped would prune good checkpoints.
        if self._saver and not int(self._state.skipped_in_a_row):
            watchdog.phase("saving", step)
            self._saver.save(self._content(), keep=self._keeps(step))
        return True

    def wait(self) -> None:
        """Wait for pending saves."""
        if self._saver:
            watchdog.phase("saving", self._state.step)
            self._saver.wait()

    def note(self, metrics: dict[str, float], run_ends: bool) -> None:
        """Store the scores of the step just saved, which select ``best.pth`` and ``best-labelfree.pth``."""
        name = self._run.config.best_metric
        names = {BEST: name, BEST_LABELFREE: self._run.config.labelfree_metric}
        scores = {link: Score(one, metrics[one]) for link, one in names.items() if one in metrics}
        scores = {link: score for link, score in scores.items() if math.isfinite(score.value)}
        if self._saver and scores:
            self._saver.note_scores(self._state.step, scores)
        if metrics and name not in metrics and run_ends and name != type(self._run.config).best_metric:
            # every evaluator has run
            log.warn_once(f"no best.pth: no evaluator returns --best-metric {name} (found {', '.join(metrics)})")

    def finish(self) -> None:
        """Save the final state on rank 0; every rank waits for it.

        Raises:
            InputError: the checkpoint cannot be written.
        """
        step = self._state.step
        watchdog.phase("saving", step)
        self._observers.deliver()

        def save() -> None:
            assert self._saver is not None
            self._saver.ensure(step, self._content, keep=self._keeps(step))

        distributed.on_main(save)

    def _keeps(self, step: int) -> bool:
        """Whether ``saveckp_freq`` keeps the checkpoint of this step permanently."""
        epoch, within = divmod(step, self._run.steps_per_epoch)
        every = self._run.config.saveckp_freq
        return within == 0 and every > 0 and epoch % every == 0

    def _content(self) -> dict[str, Any]:
        return content_of(self._state, self._run, self._observers)
