"""Contents of a checkpoint, and restoring a run from it.

A DINO run has the keys of facebookresearch/dino (``student``, ``teacher``, ``optimizer``, ``epoch``, ``args``,
``dino_loss``), for compatibility with tools that read them. All values are tensors and plain Python values.
:mod:`dino_xcit.checkpoint.folder` writes and reads the files.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dino_xcit.config import TrainConfig
from dino_xcit.errors import InputError
from dino_xcit.runtime import distributed
from dino_xcit.transform import EvalTransform

if TYPE_CHECKING:
    from dino_xcit.observers import Observers
    from dino_xcit.train import TrainState

FORMAT = "dino-xcit-2"


@dataclass(frozen=True)
class Run:
    """Constants of a run."""

    config: TrainConfig
    steps_per_epoch: int
    images: str = ""
    """:func:`dino_xcit.data.source.identity` of the training images."""
    transform: EvalTransform = field(default_factory=EvalTransform)
    """The transform for evaluating the backbone."""

    @property
    def global_batch(self) -> int:
        """Images per step, over all ranks and forward passes."""
        return self.config.batch_size_per_gpu * self.config.accumulation_steps * distributed.world_size()


def content_of(state: TrainState, run: Run, observers: Observers | None = None) -> dict[str, Any]:
    """Return the contents of a checkpoint. The tensors are not copied: copy them before the next step.

    Raises:
        ValueError: the method's ``state_dict`` has a reserved key.
    """
    method = state.method.state_dict()
    content = {
        "format": FORMAT,
        "backbone": state.method.eval_backbone.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "fp16_scaler": state.scaler.state_dict(),
        "skipped_steps": state.skipped_steps,
        "skipped_in_a_row": state.skipped_in_a_row,
        "step": state.step,
        "epoch": state.step // run.steps_per_epoch,
        "steps_per_epoch": run.steps_per_epoch,
        "global_batch": run.global_batch,
        "world_size": distributed.world_size(),
        "images": run.images,
        "observers": observers.state_dict() if observers else {},
        "args": {name: _plain(value) for name, value in dataclasses.asdict(run.config).items()},
        "eval_transform": {name: _plain(value) for name, value in run.transform.to_dict().items()},
        "method_keys": sorted(method),
    }
    if taken := method.keys() & content.keys():
        raise ValueError(f"the method's state_dict has the reserved keys {', '.join(sorted(taken))}: rename them")
    return method | content


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def restore(state: TrainState, content: Mapping[str, Any], path: Path, observers: Observers | None = None) -> None:
    """Load a checkpoint into a state built with the same settings.

    Raises:
        InputError: keys are missing or shapes differ.
    """
    try:
        state.method.load_state_dict({key: content[key] for key in content["method_keys"]})
        state.optimizer.load_state_dict(content["optimizer"])
        if state.scaler.is_enabled() and content["fp16_scaler"]:  # empty if written in another precision
            state.scaler.load_state_dict(content["fp16_scaler"])
        state.step = int(content["step"])
        state.skipped_steps.copy_(content["skipped_steps"])
        state.skipped_in_a_row.copy_(content["skipped_in_a_row"])
        if observers:
            observers.load_state_dict(content["observers"])
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        lines = " ".join(str(error).split())
        raise InputError(f"{path} does not fit this run: {lines[:300]}") from error


def hash_content(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the trained state: networks, optimizer, loss, loss scale, counters and step."""
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

    trained = ("optimizer", "fp16_scaler", "skipped_steps", "skipped_in_a_row", "step", "observers")
    add("", {key: content[key] for key in (*content["method_keys"], *trained)})
    return digest.hexdigest()
