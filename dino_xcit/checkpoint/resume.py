"""Where a run starts: the output directory, what an earlier start left there, and whether it may go on."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dino_xcit import safe_load
from dino_xcit.checkpoint.folder import CheckpointFolder
from dino_xcit.checkpoint.state import FORMAT, Run
from dino_xcit.config import OF_THE_STATE, PretrainConfig, differences
from dino_xcit.errors import InputError
from dino_xcit.runtime import atomic, distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import counted
from dino_xcit.runtime.run_lock import OWNER, locked


@contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """The output directory, made if need be, locked against other runs while this context lasts."""
    lock = ExitStack()

    def take() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        lock.enter_context(locked(folder))

    distributed.on_main(take, f"cannot write to the output directory {folder}", "choose another --output-dir")
    try:
        if unseeing := distributed.ranks_without(folder / OWNER):
            # Only the main process writes; the others read a checkpoint when the run resumes.
            log.warning(
                f"the output directory {folder} of process 0 is not that of {unseeing}: this run goes "
                "on, but to resume later all have to see it; name an --output-dir on a disk that all machines share"
            )
        yield
    finally:
        lock.close()


@dataclass(frozen=True)
class Stored:
    """A checkpoint that a run resumes from; false where there is none."""

    content: dict[str, Any]
    path: Path

    def __bool__(self) -> bool:
        return bool(self.content)


def find_stored(config: PretrainConfig, checkpoints: CheckpointFolder) -> Stored:
    """The newest whole checkpoint of the output directory; an empty one for a fresh start."""

    def look() -> Path | None:
        atomic.remove_leftovers(checkpoints.output_dir)
        atomic.remove_leftovers(checkpoints.folder)
        path, damages = (None, []) if starts_anew(config) else checkpoints.newest()
        for damage in damages:
            log.warning(damage)
        return path

    path = distributed.on_main(
        look, f"cannot look into {checkpoints.folder}", "mend it, or choose another --output-dir"
    )
    if path is None:
        return Stored({}, checkpoints.latest)
    if unseeing := distributed.ranks_without(path):
        raise InputError(
            f"this run would resume from {path}, which {unseeing} cannot see: name an --output-dir on a disk "
            "that all machines share, copy it to the same place on each, or start anew with --resume never"
        )
    try:
        content = safe_load.read(path)
    except InputError as error:
        raise InputError(f"{error}: bring it back from a copy, or start anew with --resume never") from error
    if content.get("format") != FORMAT:
        raise InputError(
            f"{path} is no checkpoint of this version (format {content.get('format')!r}, expected {FORMAT!r}), so the "
            f"run cannot be resumed: choose another --output-dir, or --resume never; --init-weights {path} starts from "
            "its weights"
        )
    return Stored(content, path)


def starts_anew(config: PretrainConfig) -> bool:
    """Whether earlier checkpoints are to be forgotten: ``--resume never``, the first time it is said.

    torchrun and Slurm start a run that died with the same words again; that is no wish to lose it.
    """
    again = any(int(os.environ.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return config.resume == "never" and not again


def prepare(config: PretrainConfig, checkpoints: CheckpointFolder, stored: Stored) -> None:
    """Now that the run is sure to begin: forget what ``--resume never`` overwrites, or end a save that was cut short.

    Raises:
        InputError: the output directory cannot be written to.
    """

    def tidy() -> None:
        if starts_anew(config):
            checkpoints.clear()
        elif stored:
            checkpoints.finish(stored.path, stored.content)

    distributed.on_main(tidy, f"cannot write to {checkpoints.output_dir}", "mend that, then run the same command")


def keep_global_batch(config: PretrainConfig, stored: Stored) -> PretrainConfig:
    """Where a run resumes with another number of ranks, accumulation makes up for it."""
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
            f"this run has a global batch of {wanted} ({counted(then, 'process')} before), which "
            f"{counted(world, 'process')} cannot share in passes of {config.batch_size_per_gpu}: "
            f"{', or '.join(ways) or 'choose another --output-dir'}"
        )
    config = dataclasses.replace(config, accumulation_steps=wanted // one_pass)
    log.info(
        f"from here on {counted(world, 'process')} instead of {then}, and "
        f"{counted(config.accumulation_steps, 'forward pass')} a step: the global batch stays {wanted}"
        + ("" if config.centering == "centering" else "; sinkhorn_knopp spreads over fewer images at a time than then")
    )
    return config


def refuse_another_run(stored: Stored, run: Run) -> None:
    """Raise InputError where the checkpoint is of a run with other settings or images, and that was not allowed; or of
    other networks or another optimizer, which no word makes fit."""
    content, path, config, images = stored.content, stored.path, run.config, run.images
    changed = differences(dict(content["args"]), config)
    if images and content.get("images", images) not in ("", images):
        changed.insert(0, f"other images in {config.data_path}: {content['images']} -> {images}")
    for key, now in (("global_batch", run.global_batch), ("steps_per_epoch", run.steps_per_epoch)):
        if content.get(key) != now:
            changed.append(f"{key} {content.get(key)} -> {now} (--accumulation-steps makes up for fewer processes)")
    if changed and config.resume == "auto":
        listed = "; ".join(changed[:4]) + ("; ..." if len(changed) > 4 else "")
        raise InputError(
            f"{config.output_dir} holds another run ({listed}): choose another --output-dir, or --resume changed to "
            "resume with the new settings, or --resume never to overwrite it"
        )
    unfit = [
        change for change in differences(dict(content["args"]), config) if change.partition(" ")[0] in OF_THE_STATE
    ]
    if unfit:
        raise InputError(
            f"{path} does not fit these networks or their optimizer ({'; '.join(unfit)}), and cannot resume with "
            f"them: choose another --output-dir, to which --init-weights {path} brings the weights that fit"
        )
