"""Weights & Biases beside metrics.jsonl: ``--wandb PROJECT``. Whatever goes wrong there, the run goes on.

Everything else is W&B's own: ``wandb login``, and its environment (``WANDB_MODE=offline`` needs no network and keeps
the records for ``wandb sync``; ``WANDB_ENTITY``, ``WANDB_NAME``, ``WANDB_TAGS`` ...).
"""

from __future__ import annotations

import importlib.util
import json
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dino_xcit.errors import InputError, one_line
from dino_xcit.runtime import atomic

FILE_NAME = "wandb.json"
"""In the output directory: the project, and the id under which a resumed run goes on there."""

PATIENCE = 20
"""Seconds that W&B may take to begin, and to send the rest at the end: shorter than whoever stops a run waits."""


def require_package(project: str) -> None:
    """Nothing, if ``project`` is empty or the package is there.

    Raises:
        InputError: it is not installed.
    """
    if project and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"wandb is {project}, but the package wandb is not installed: pip install 'dino-xcit[wandb]', or leave "
            "--wandb out"
        )


class WandbMirror:
    """Sends each record to a W&B run, under the names that TensorBoard has, with ``trainer_step`` as the x axis.

    W&B's own count of steps cannot go back, and a resumed run repeats the steps after its checkpoint: those come twice
    there, with the same values, and once in metrics.jsonl.
    """

    def __init__(
        self, project: str, folder: Path, from_step: int, config: Mapping[str, Any], say: Callable[[str], None] = print
    ) -> None:
        """Begin a run, or go on with the one that ``folder`` remembers.

        Args:
            folder: the output directory; its name becomes the run's where WANDB_NAME does not say another.
            from_step: 0 begins a new run.
            config: the settings to show with it.
            say: is told once, when something fails.
        """
        self._say = say
        self._run: Any = None
        try:
            import wandb

            known = None if from_step == 0 else _read_id(folder, project)
            run_id = known or uuid.uuid4().hex[:12]
            if known is None:
                atomic.write_json(folder / FILE_NAME, {"project": project, "id": run_id})
            self._run = wandb.init(
                project=project,
                id=run_id,
                resume="allow",
                dir=str(folder),
                config=dict(config),
                settings=wandb.Settings(
                    run_name=_name_of(folder),
                    console="off",  # what the run prints is not W&B's to wrap
                    init_timeout=PATIENCE,
                    finish_timeout=PATIENCE,
                    finish_timeout_raises=True,
                ),
            )
            self._run.define_metric("trainer_step")
            self._run.define_metric("*", step_metric="trainer_step")
        except Exception as error:
            self._give_up(error)

    def write(self, kind: str, step: int, values: Mapping[str, float | int]) -> None:
        """One record; see :meth:`dino_xcit.runtime.metrics.MetricsWriter.write`."""
        if self._run is None:
            return
        try:
            self._run.log({f"{kind}/{name}": value for name, value in values.items()} | {"trainer_step": step})
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """Send what is left; :data:`PATIENCE` at most."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.finish()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        self._say(
            f"warning: nothing goes to Weights & Biases from here on ({type(error).__name__}: {one_line(error)}); the "
            "run goes on, and metrics.jsonl has everything (WANDB_MODE=offline needs no network)"
        )


def _name_of(folder: Path) -> str | None:
    return None if "WANDB_NAME" in os.environ else folder.absolute().name


def _read_id(folder: Path, project: str) -> str | None:
    """The id that an earlier start left; None where there is none, or one of another project."""
    try:
        stored = json.loads((folder / FILE_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(stored, dict) or stored.get("project") != project:
        return None
    found = stored.get("id")
    return found if isinstance(found, str) and len(found) == 12 and found.isalnum() else None
