"""Where a run starts: the output directory, what an earlier start left there, and whether it may go on."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dino_xcit import safe_load
from dino_xcit.checkpoint import state as checkpoint
from dino_xcit.checkpoint.folder import CheckpointFolder
from dino_xcit.config import OF_THE_STATE, PretrainConfig, differences
from dino_xcit.errors import InputError
from dino_xcit.runtime import atomic, distributed
from dino_xcit.runtime.logging import counted
from dino_xcit.runtime.run_lock import OWNER, locked


@contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """The output directory, made if need be, locked against other runs while this context lasts."""
    lock, refusal = ExitStack(), None
    if distributed.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            lock.enter_context(locked(folder))
        except OSError as error:
            refusal = f"cannot write to the output directory {folder}: {error.strerror}; choose another --output-dir"
        except InputError as error:
            refusal = str(error)
    refusal = distributed.main_decides(refusal)
    if refusal:
        raise InputError(refusal)
    try:
        if unseeing := distributed.ranks_without(folder / OWNER):
            # Only the main process writes; the others read a checkpoint when the run carries on.
            distributed.say(
                f"notice: the output directory {folder} of process 0 is not that of {unseeing}: this run goes "
                "on, but to carry on later all have to see it; name an --output-dir on a disk that all machines share"
            )
        yield
    finally:
        lock.close()


def find_stored(config: PretrainConfig, checkpoints: CheckpointFolder) -> tuple[dict[str, Any], Path]:
    """The newest whole checkpoint of the output directory and its path; an empty dictionary for a fresh start."""
    found: tuple[Path | None, list[str]] = (None, [])
    refusal = None
    if distributed.is_main():
        try:
            atomic.remove_leftovers(checkpoints.output_dir)
            atomic.remove_leftovers(checkpoints.folder)
            if not starts_anew(config):
                found = checkpoints.newest()
        except InputError as error:
            refusal = str(error)
        except OSError as error:
            refusal = (
                f"cannot look into {checkpoints.folder}: {error.strerror}; mend it, or choose another --output-dir"
            )
    refusal, (path, notices) = distributed.main_decides((refusal, found))
    if refusal:
        raise InputError(refusal)
    for notice in notices:
        distributed.say(f"notice: {notice}")
    if path is None:
        return {}, checkpoints.latest
    if unseeing := distributed.ranks_without(path):
        raise InputError(
            f"this run would carry on from {path}, which {unseeing} cannot see: name an --output-dir on a disk "
            "that all machines share, copy it to the same place on each, or start anew with --resume never"
        )
    try:
        content = safe_load.read(path)
    except InputError as error:
        raise InputError(f"{error}: bring it back from a copy, or start anew with --resume never") from error
    if "args" not in content:
        raise InputError(f"{path} is not a checkpoint of run_pretrain.py: choose another --output-dir")
    return content, path


def starts_anew(config: PretrainConfig) -> bool:
    """Whether earlier checkpoints are to be forgotten: ``--resume never``, the first time it is said.

    torchrun and Slurm start a run that died with the same words again; that is no wish to lose it.
    """
    again = any(int(os.environ.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return config.resume == "never" and not again


def prepare(config: PretrainConfig, checkpoints: CheckpointFolder, path: Path, stored: Mapping[str, Any]) -> None:
    """Now that the run is sure to begin: forget what ``--resume never`` overwrites, or end a save that was cut short.

    Raises:
        InputError: the output directory cannot be written to.
    """
    refusal = None
    if distributed.is_main():
        try:
            if starts_anew(config):
                checkpoints.clear()
            elif stored:
                checkpoints.finish(path, stored)
        except OSError as error:
            refusal = (
                f"cannot write to {checkpoints.output_dir}: {error.strerror}; mend that, then run the same command"
            )
    refusal = distributed.main_decides(refusal)
    if refusal:
        raise InputError(refusal)


def keep_global_batch(config: PretrainConfig, stored: Mapping[str, Any]) -> PretrainConfig:
    """Where a run carries on with another number of processes, accumulation makes up for it."""
    then, world = stored.get("world_size"), distributed.world_size()
    wanted, one_pass = int(stored.get("global_batch", 0)), config.batch_size_per_gpu * world
    if not then or then == world or wanted == checkpoint.global_batch(config) or config.resume == "changed":
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
    distributed.say(
        f"notice: from here on {counted(world, 'process')} instead of {then}, and "
        f"{counted(config.accumulation_steps, 'forward pass')} a step: the global batch stays {wanted}"
        + ("" if config.centering == "centering" else "; sinkhorn_knopp spreads over fewer images at a time than then")
    )
    return config


def refuse_another_run(
    stored: Mapping[str, Any], path: Path, config: PretrainConfig, steps_per_epoch: int, images: str = ""
) -> None:
    """Raise InputError where the checkpoint is of a run with other settings or images, and that was not allowed; or of
    other networks or another optimizer, which no word makes fit."""
    changed = differences(dict(stored["args"]), config)
    if images and stored.get("images", images) not in ("", images):
        changed.insert(0, f"other images in {config.data_path}: {stored['images']} -> {images}")
    for key, now in (("global_batch", checkpoint.global_batch(config)), ("steps_per_epoch", steps_per_epoch)):
        if stored.get(key) != now:
            changed.append(f"{key} {stored.get(key)} -> {now} (--accumulation-steps makes up for fewer processes)")
    if changed and config.resume == "auto":
        listed = "; ".join(changed[:4]) + ("; ..." if len(changed) > 4 else "")
        raise InputError(
            f"{config.output_dir} holds another run ({listed}): choose another --output-dir, or --resume changed to "
            "carry on with the new settings, or --resume never to overwrite it"
        )
    unfit = [change for change in differences(dict(stored["args"]), config) if change.partition(" ")[0] in OF_THE_STATE]
    if unfit:
        raise InputError(
            f"{path} does not fit these networks or their optimizer ({'; '.join(unfit)}), and cannot carry on with "
            f"them: choose another --output-dir, to which --init-weights {path} brings the weights that fit"
        )
