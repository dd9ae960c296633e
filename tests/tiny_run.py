"""A small pretraining run: configuration, batches, training, and bitwise comparison of states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino_xcit.checkpoint.folder import CheckpointFolder
from dino_xcit.checkpoint.saver import on_cpu
from dino_xcit.checkpoint.state import Run, content_of
from dino_xcit.config import PretrainConfig
from dino_xcit.data import Source, Subset, open_source
from dino_xcit.data.loader import Batch, StepSampler, build_loader
from dino_xcit.optim import Schedules
from dino_xcit.train import StepResult, TrainState, build_state, train_step

CPU = torch.device("cpu")
IMAGES = 48


def tiny_config(**changes: Any) -> PretrainConfig:
    """Return settings: 2 global and 2 local views of 28 and 16 pixels, 4 layers, 48 prototypes, 6 steps/epoch."""
    settings: dict[str, Any] = {
        "arch": "xcit_pico_4_p4",
        "data_path": "sample:fashion-mnist",
        "out_dim": 48,
        "head_hidden_dim": 32,
        "head_bottleneck_dim": 16,
        "batch_size_per_gpu": 8,
        "epochs": 4,
        "warmup_epochs": 0.0,
        "lr": 2e-3,
        "lr_reference_batch": 0,
        "global_crops_size": 28,
        "local_crops_size": 16,
        "local_crops_number": 2,
        "precision": "fp32",
        "device": "cpu",
        "mean": (0.286, 0.286, 0.286),
        "std": (0.353, 0.353, 0.353),
    }
    return PretrainConfig(**(settings | changes))


@lru_cache(maxsize=2)
def tiny_source(count: int = IMAGES) -> Source:
    """Return the first ``count`` images of the embedded sample."""
    return Subset(open_source("sample:fashion-mnist", "train"), np.arange(count))


def sampler_of(config: PretrainConfig, rank: int = 0, world_size: int = 1) -> StepSampler:
    return StepSampler(
        len(tiny_source()), config.batch_size_per_gpu, config.accumulation_steps, rank, world_size, config.seed
    )


def steps(config: PretrainConfig, first: int, last: int, rank: int = 0, world_size: int = 1) -> Iterator[list[Batch]]:
    """Yield the batches of this rank for each step from ``first`` to ``last`` (exclusive), one per forward pass."""
    sampler = sampler_of(config, rank, world_size)
    sampler.start_step, sampler.stop_step = first, last
    loader = build_loader(tiny_source(), config.augmentation(), sampler, config.seed, 0, CPU)
    for _ in range(first, last):
        yield list(islice(loader, config.accumulation_steps))


def run(config: PretrainConfig, last: int, state: TrainState | None = None) -> tuple[TrainState, list[StepResult]]:
    """Train a fresh or given state up to step ``last`` in one process."""
    state, schedules = state or build_state(config, CPU), schedules_of(config)
    return state, [train_step(state, batches, schedules, config) for batches in steps(config, state.step, last)]


def schedules_of(config: PretrainConfig) -> Schedules:
    sampler = sampler_of(config)
    return Schedules.of(config, sampler.steps_per_epoch, sampler.global_batch)


def save(state: TrainState, config: PretrainConfig, steps_per_epoch: int = 6) -> Path:
    """Write a checkpoint into ``config.output_dir`` as a run does, and return the path of ``checkpoint.pth``."""
    folder = CheckpointFolder(Path(config.output_dir))
    folder.write(on_cpu(content_of(state, Run(config, steps_per_epoch, transform=config.eval_transform()))))
    return folder.latest


def tensors_of(value: object, prefix: str = "") -> dict[str, Tensor]:
    """Return every tensor (copied) and number in nested mappings and sequences, by path."""
    if isinstance(value, Tensor):
        return {prefix: value.detach().clone()}
    if isinstance(value, bool | int | float):
        return {prefix: torch.tensor(value)}
    items: list[tuple[object, object]] = []
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    return {path: tensor for key, inner in items for path, tensor in tensors_of(inner, f"{prefix}/{key}").items()}


def learnt(state: TrainState) -> dict[str, Tensor]:
    """Return the state that a step may change, without step number, skipped-step counts and scheduled rates."""
    return tensors_of({"method": state.method.state_dict(), "optimizer": state.optimizer.state_dict()["state"]})


def differing_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Return the paths whose bits, types or shapes differ, or that only one mapping has."""

    def bits(tensor: Tensor) -> tuple[object, ...]:
        return tensor.shape, tensor.dtype, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    both = a.keys() & b.keys()
    return sorted({*(a.keys() ^ b.keys()), *(path for path in both if bits(a[path]) != bits(b[path]))})
