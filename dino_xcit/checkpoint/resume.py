"""Start of a run: lock the output directory, find a checkpoint, and check that the run may resume from it."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dino_xcit import safe_load
from dino_xcit.bounds import marked
from dino_xcit.checkpoint.folder import ANEW, CheckpointFolder
from dino_xcit.checkpoint.state import FORMAT, Run
from dino_xcit.config import StateField, TrainConfig, differences
from dino_xcit.errors import InputError
from dino_xcit.runtime import atomic, distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import counted
from dino_xcit.runtime.run_lock import OWNER, locked

Config = TypeVar("Config", bound=TrainConfig)


@contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Create the output directory and lock it against other runs during the context."""
    lock = ExitStack()

    def take() -> None:
        refuse_file(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        lock.enter_context(locked(folder))

    distributed.on_main(take, f"cannot write to the output directory {folder}", "choose another --output-dir")
    try:
        if missing := distributed.ranks_without(folder / OWNER):
            # Other ranks need the directory only to resume.
            log.warning(
                f"{missing} cannot see the output directory of rank 0, {folder}: the run starts, but resuming needs an "
                "--output-dir on a disk that all machines share"
            )
        yield
    finally:
        lock.close()


def refuse_file(folder: Path) -> None:
    """Raise InputError if the output directory is a file."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"the output directory {folder} is not a folder: choose another --output-dir")


@dataclass(frozen=True)
class Stored:
    """A checkpoint to resume from; false if there is none."""

    content: dict[str, Any]
    path: Path

    def __bool__(self) -> bool:
        return bool(self.content)


def find_stored(config: TrainConfig, checkpoints: CheckpointFolder) -> Stored:
    """Return the newest intact checkpoint of the output directory, or an empty one for a fresh start.

    Raises:
        InputError: the checkpoint cannot be read, is of another version, or is not visible on all ranks.
    """

    def newest() -> Path | None:
        atomic.remove_leftovers(checkpoints.output_dir)
        atomic.remove_leftovers(checkpoints.folder)
        if anew := starts_anew(config):
            (checkpoints.output_dir / ANEW).touch()
        path, warnings = (None, []) if anew else checkpoints.newest()
        for warning in warnings:
            log.warning(warning)
        return path

    path = distributed.on_main(
        newest, f"cannot read {checkpoints.folder}", "fix its permissions, or choose another --output-dir"
    )
    if path is None:
        return Stored({}, checkpoints.latest)
    if missing := distributed.ranks_without(path):
        raise InputError(
            f"cannot resume from {path}: {missing} cannot see it; choose an --output-dir on a disk that all machines "
            "share, copy it to the same place on each machine, or start from scratch with --resume never"
        )
    try:
        content = safe_load.read(path)
    except InputError as error:
        raise InputError(f"{error}: restore it from a backup, or start from scratch with --resume never") from error
    if content.get("format") != FORMAT:
        raise InputError(
            f"cannot resume from {path}: its format is {content.get('format')!r}, expected {FORMAT!r}; choose another "
            f"--output-dir (with {config.weights_flag} {path} to start from its weights), or --resume never"
        )
    return Stored(content, path)


def starts_anew(config: TrainConfig) -> bool:
    """Whether to discard earlier checkpoints: ``--resume never``, unless torchrun or Slurm restarts a run that did."""
    again = any(int(os.environ.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return config.resume == "never" and (not again or (Path(config.output_dir) / ANEW).exists())


def prepare(config: TrainConfig, checkpoints: CheckpointFolder, stored: Stored) -> None:
    """Delete old checkpoints for ``--resume never``, or complete an interrupted save.

    Raises:
        InputError: the output directory cannot be written.
    """

    def tidy() -> None:
        if starts_anew(config):
            checkpoints.clear()
        elif stored:
            checkpoints.finish(stored.path, stored.content)

    distributed.on_main(
        tidy,
        f"cannot write to {checkpoints.output_dir}",
        "free disk space or fix permissions, then run the same command",
    )


def keep_global_batch(config: Config, stored: Stored) -> Config:
    """Adjust accumulation_steps to a changed number of ranks.

    Raises:
        InputError: no number of accumulation steps gives the stored global batch.
    """
    then, world = stored.content.get("world_size"), distributed.world_size()
    wanted, one_pass = int(stored.content.get("global_batch", 0)), config.batch_size_per_gpu * world
    if not then or then == world or wanted == one_pass * config.accumulation_steps or config.resume == "changed":
        return config
    if wanted % one_pass:
        fitting = [count for count in range(1, wanted + 1) if wanted % (config.batch_size_per_gpu * count) == 0]
        numbers = " or ".join(map(str, fitting[:8]))
        ways = [f"start {numbers} {'process' if fitting == [1] else 'processes'}"] if fitting else []
        if wanted % world == 0:
            share = max(b for b in range(1, config.batch_size_per_gpu + 1) if wanted // world % b == 0)
            ways.append(f"give --batch-size-per-gpu {share}")
        raise InputError(
            f"cannot keep the global batch of {wanted} (from {counted(then, 'process')}) on "
            f"{counted(world, 'process')} with --batch-size-per-gpu {config.batch_size_per_gpu}: "
            f"{', or '.join(ways) or 'choose another --output-dir'}"
        )
    config = dataclasses.replace(config, accumulation_steps=wanted // one_pass)
    log.info(
        f"resuming on {counted(world, 'process')} instead of {then} with "
        f"{counted(config.accumulation_steps, 'forward pass')} a step: the global batch stays {wanted}"
    )
    return config


def step_of(stored: Stored, run: Run) -> int:
    """Return the step to resume at: the checkpoint's position in epochs if the number of steps per epoch changed."""
    step, then, now = int(stored.content["step"]), int(stored.content["steps_per_epoch"]), run.steps_per_epoch
    if then == now:
        return step
    epoch, within = divmod(step, then)
    new = epoch * now + within * now // then
    log.info(f"an epoch has {now:,} steps instead of {then:,}: step {step:,}, {step / then:.2f} epochs, is now {new:,}")
    return new


def refuse_another_run(stored: Stored, run: Run) -> None:
    """Check that the checkpoint belongs to this run.

    Raises:
        InputError: settings or images differ without ``--resume changed``, or the networks or the optimizer differ.
    """
    content, path, config, images = stored.content, stored.path, run.config, run.images
    changed = differences(dict(content["args"]), config)
    if images and content.get("images", images) not in ("", images):
        changed.insert(0, f"other images in {config.data_path}: {content['images']} -> {images}")
    for key, now in (("global_batch", run.global_batch), ("steps_per_epoch", run.steps_per_epoch)):
        if content.get(key) != now:
            changed.append(f"{key} {content.get(key)} -> {now} (use --accumulation-steps with fewer processes)")
    if changed and config.resume == "auto":
        listed = "; ".join(changed[:4]) + ("; ..." if len(changed) > 4 else "")
        raise InputError(
            f"{config.output_dir} contains another run ({listed}): choose another --output-dir, --resume changed to "
            "resume with the new settings, or --resume never to overwrite it"
        )
    shapes = marked(type(config), StateField)
    unfit = [change for change in differences(dict(content["args"]), config) if change.partition(" ")[0] in shapes]
    if unfit:
        raise InputError(
            f"cannot resume {path}: the networks or the optimizer differ ({'; '.join(unfit)}); choose another "
            f"--output-dir, with {config.weights_flag} {path} to load the matching weights"
        )
