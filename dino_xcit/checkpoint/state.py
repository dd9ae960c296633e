"""What a checkpoint holds, and how a run is put back to where it was.

How it gets to the disk and back: :mod:`dino_xcit.checkpoint.folder`. The keys are DINO's (``student``,
``teacher``, ``optimizer``, ``epoch``, ``args``, ``dino_loss``), so that tools which read DINO's files read these; all
values are tensors and plain Python values.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dino_xcit.checkpoint.folder import CheckpointFolder
from dino_xcit.config import PretrainConfig
from dino_xcit.errors import InputError
from dino_xcit.runtime import distributed
from dino_xcit.train import TrainState

FORMAT = "dino-xcit-1"


def global_batch(config: PretrainConfig) -> int:
    """Images a step, over all processes and accumulated forward passes."""
    return config.batch_size_per_gpu * config.accumulation_steps * distributed.world_size()


def content_of(state: TrainState, config: PretrainConfig, steps_per_epoch: int, images: str = "") -> dict[str, Any]:
    """What a checkpoint holds; ``images``: :func:`dino_xcit.data.source.identity` of what is learnt from."""
    return {
        "format": FORMAT,
        "student": state.student.state_dict(),
        "teacher": state.teacher.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "dino_loss": state.loss.state_dict(),
        "fp16_scaler": state.scaler.state_dict(),
        "rejected": state.rejected,
        "rejected_in_a_row": state.rejected_in_a_row,
        "step": state.step,
        "epoch": state.step // steps_per_epoch,
        "steps_per_epoch": steps_per_epoch,
        "global_batch": global_batch(config),
        "world_size": distributed.world_size(),
        "images": images,
        "args": {name: _plain(value) for name, value in dataclasses.asdict(config).items()},
        "eval_transform": {name: _plain(value) for name, value in config.eval_transform().to_dict().items()},
    }


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def save(state: TrainState, config: PretrainConfig, steps_per_epoch: int, keep: bool = False) -> Path:
    """Write the state into the output directory and wait for it; where ``checkpoint.pth`` is. For the main process.

    A run writes beside its training instead: :class:`dino_xcit.checkpoint.saver.Saver`.
    """
    folder = CheckpointFolder(Path(config.output_dir), config.keep_last)
    folder.write(content_of(state, config, steps_per_epoch), keep)
    return folder.latest


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
    state.rejected_in_a_row.copy_(torch.as_tensor(content.get("rejected_in_a_row", 0)))


def hash_content(content: Mapping[str, Any]) -> str:
    """SHA-256 over all that training changes: networks, optimizer, centre, scale, counts and step; not the settings."""
    digest = hashlib.sha256()

    def add(path: str, value: object) -> None:
        if isinstance(value, Mapping):
            for key in sorted(value, key=str):
                add(f"{path}/{key}", value[key])
        elif isinstance(value, (list, tuple)):
            for index, inner in enumerate(value):
                add(f"{path}/{index}", inner)
        elif isinstance(value, torch.Tensor):
            tensor = value.detach().cpu().contiguous()
            digest.update(f"{path} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{path} {value!r}\n".encode())

    learnt = ("student", "teacher", "optimizer", "dino_loss", "fp16_scaler", "rejected", "rejected_in_a_row", "step")
    add("", {key: content[key] for key in learnt})
    return digest.hexdigest()
