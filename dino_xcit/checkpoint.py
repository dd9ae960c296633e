"""Our own checkpoints: written aside and renamed, read without executing anything.

The keys are DINO's (``student``, ``teacher``, ``optimizer``, ``epoch``, ``args``, ``dino_loss``), so that tools which
read DINO's files read these; all values are tensors and plain Python values.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dino_xcit import distributed
from dino_xcit.config import PretrainConfig
from dino_xcit.errors import InputError
from dino_xcit.train import TrainState
from dino_xcit.weights import UNREADABLE, why_unreadable

FORMAT = "dino-xcit-1"
LATEST = "checkpoint.pth"
BACKBONE = "backbone.pth"


def write_aside(path: Path, content: object) -> None:
    """``torch.save`` to a file beside ``path``, flush it to the disk, then rename: ``path`` is never half a file."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with open(aside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        # torch.save hides the file's own error, such as a full disk, behind an "unexpected pos" of its archive.
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Make a rename durable: on POSIX the folder's entry is data too."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's content, on the CPU.

    Raises:
        InputError: no such file, or a file that is not a checkpoint or is damaged.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"there is no checkpoint at {path}") from None
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        raise InputError(f"{path} is no checkpoint that can be read safely: {why_unreadable(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, expected a checkpoint")
    return content


def global_batch(config: PretrainConfig) -> int:
    """Images a step, over all processes and accumulated forward passes."""
    return config.batch_size_per_gpu * config.accumulation_steps * distributed.world_size()


def content_of(state: TrainState, config: PretrainConfig, steps_per_epoch: int) -> dict[str, Any]:
    """What a checkpoint holds."""
    return {
        "format": FORMAT,
        "student": state.student.state_dict(),
        "teacher": state.teacher.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "dino_loss": state.loss.state_dict(),
        "fp16_scaler": state.scaler.state_dict(),
        "rejected": state.rejected,
        "step": state.step,
        "epoch": state.step // steps_per_epoch,
        "steps_per_epoch": steps_per_epoch,
        "global_batch": global_batch(config),
        "args": {name: _plain(value) for name, value in dataclasses.asdict(config).items()},
        "eval_transform": {name: _plain(value) for name, value in config.eval_transform().to_dict().items()},
    }


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def save(state: TrainState, config: PretrainConfig, steps_per_epoch: int, numbered: bool = False) -> Path:
    """Write ``checkpoint.pth`` and the teacher's ``backbone.pth`` (official XCiT names, no head) into the output
    directory; with ``numbered`` also a copy named after the epoch. Call it on the main process."""
    folder = Path(config.output_dir)
    content = content_of(state, config, steps_per_epoch)
    if numbered:
        write_aside(folder / f"checkpoint{content['epoch']:04d}.pth", content)
    write_aside(folder / BACKBONE, state.teacher.backbone.state_dict())
    write_aside(folder / LATEST, content)
    return folder / LATEST


def restore(state: TrainState, content: Mapping[str, Any], path: Path) -> None:
    """Load a checkpoint into a state built with the same settings.

    Raises:
        InputError: parts are missing, or shapes differ.
    """
    missing = [key for key in ("student", "teacher", "optimizer", "dino_loss", "step") if key not in content]
    if missing:
        raise InputError(f"{path} is not a checkpoint of run_pretrain.py: it lacks {', '.join(missing)}")
    try:
        state.student.load_state_dict(content["student"])
        state.teacher.load_state_dict(content["teacher"])
        state.loss.load_state_dict(content["dino_loss"])
        state.optimizer.load_state_dict(content["optimizer"])
        if state.scaler.is_enabled() and content.get("fp16_scaler"):  # empty: written in another precision
            state.scaler.load_state_dict(content["fp16_scaler"])
    except (RuntimeError, ValueError, KeyError) as error:
        lines = " ".join(str(error).split())
        raise InputError(f"{path} does not fit this run: {lines[:300]}") from error
    state.step = int(content["step"])
    state.rejected.copy_(torch.as_tensor(content.get("rejected", 0)))
