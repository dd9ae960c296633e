"""This project's own training step, as run_pretrain.py takes it. B batch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from step_settings import Row, Settings
from torch import Tensor

from dino_xcit.config import PretrainConfig
from dino_xcit.data import open_source
from dino_xcit.data.loader import Batch, Loader, StepSampler, build_loader
from dino_xcit.data.workers import choose_workers
from dino_xcit.optim import Schedules
from dino_xcit.train import build_state, train_step

STEPS_PER_EPOCH = 1000


def exists(row: Row) -> bool:
    """Whether this version of the project has the settings that a row asks for."""
    known = {field.name for field in dataclasses.fields(PretrainConfig)}
    return not row.checkpointing or "activation_checkpointing" in known


def config_of(settings: Settings, row: Row, **changes: Any) -> PretrainConfig:
    """The project's defaults, with what the row and the common configuration say."""
    if row.checkpointing:
        changes["activation_checkpointing"] = True
    return PretrainConfig(
        arch=settings.arch,
        out_dim=settings.out_dim,
        head_hidden_dim=settings.head_hidden,
        head_bottleneck_dim=settings.head_bottleneck,
        batch_size_per_gpu=settings.batch,
        local_crops_number=settings.local_crops,
        global_crops_size=settings.global_size,
        local_crops_size=settings.local_size,
        device=settings.device,
        precision=row.precision,
        **{"drop_path_rate": settings.drop_path, **changes},
        freeze_last_layer=0,  # as in all epochs but the first
        warmup_epochs=0.0,
    )


class OurStep:
    """A run's state, and one step of it."""

    def __init__(self, settings: Settings, row: Row, **changes: Any) -> None:
        self.settings = settings
        self.config = config_of(settings, row, **changes)
        self.device = torch.device(settings.device)
        if self.device.type == "cuda":  # as run_pretrain.py chooses
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")
        self.schedules = Schedules.of(self.config, STEPS_PER_EPOCH, settings.batch)
        self.state = build_state(self.config, self.device)

    def batch_of(self, crops: Sequence[Tensor]) -> Batch:
        """What the loader would hand over: uint8 crops, and which images they are of."""
        views = [count for count, _ in self.settings.groups]
        return Batch(list(crops), views, epoch=0, indices=torch.arange(self.settings.batch))

    def __call__(self, crops: Sequence[Tensor]) -> Tensor:
        """One training step over uint8 crops; its loss, on the device."""
        return self.step(self.batch_of(crops))

    def step(self, batch: Batch) -> Tensor:
        """One training step over a loader's batch; its loss, on the device."""
        return train_step(self.state, [batch], self.schedules, self.config).loss


class FedStep(OurStep):
    """The same with the loader's own batches, augmented from images while the step computes."""

    def __init__(self, settings: Settings, row: Row) -> None:
        super().__init__(settings, row)
        source = open_source(row.data)
        sampler = StepSampler(len(source), settings.batch)
        sampler.stop_step = 1 << 30  # epoch after epoch
        self.workers = choose_workers(-1, 1)
        loader = build_loader(source, self.config.augmentation(), sampler, 0, self.workers, self.device)
        if self.device.type == "cuda":
            loader.finish_on_device()
        self.loader: Loader = loader
        self.batches: Iterator[Batch] = itertools.chain(loader)

    def __call__(self, crops: Sequence[Tensor]) -> Tensor:
        """One training step over the loader's next batch; the crops that are given are not used."""
        return self.step(next(self.batches))
