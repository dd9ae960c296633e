"""Batches of augmented views, in an order that depends on (seed, step) alone. B batch, V views."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dino_xcit.augment import MultiCropAugmentation, group_by_size
from dino_xcit.data.decode import UndecodableImage, decode
from dino_xcit.data.source import Source
from dino_xcit.errors import InputError

Key = tuple[int, int]
"""(epoch, index in the source)."""


@dataclass
class Batch:
    """One forward pass of one process."""

    crops: list[Tensor]
    """One tensor a crop size, [views of that size * B, 3, size, size] uint8, view-major; the global crops first."""
    views: list[int]
    """How many views each of those tensors holds."""
    epoch: int
    indices: Tensor
    """[B] int64, which images of the source these are."""

    def pin_memory(self) -> Batch:
        """Called by the loader where batches go to a GPU."""
        return Batch([crop.pin_memory() for crop in self.crops], self.views, self.epoch, self.indices.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; from pinned memory without waiting."""
        crops = [crop.to(device, non_blocking=True) for crop in self.crops]
        return Batch(crops, self.views, self.epoch, self.indices.to(device, non_blocking=True))


class MultiCropDataset(Dataset[tuple[list[Tensor], int, int]]):
    """(epoch, index) to that image's views, grouped by size."""

    def __init__(self, source: Source, augmentation: MultiCropAugmentation, seed: int) -> None:
        self.source = source
        self.augmentation = augmentation
        self.seed = seed
        self.groups = group_by_size([view.size for view in augmentation.views])

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> tuple[list[Tensor], int, int] | UndecodableImage:  # type: ignore[override]
        epoch, index = key
        try:
            item, _ = self.source.read(index)
            image = decode(item, self.source.name(index))
        except InputError as error:
            # Handed over rather than raised: a loader process would bury the sentence in a traceback.
            return UndecodableImage(str(error))
        views = self.augmentation(image, self.seed, epoch, index)
        return [torch.stack([views[view] for view in group]) for group in self.groups], epoch, index


def collate(samples: list[tuple[list[Tensor], int, int] | UndecodableImage]) -> Batch | UndecodableImage:
    """Samples to a view-major batch; one image that cannot be read makes the whole batch that error."""
    good: list[tuple[list[Tensor], int, int]] = []
    for sample in samples:
        if isinstance(sample, UndecodableImage):
            return sample
        good.append(sample)
    crops = [torch.stack(views, dim=1).flatten(0, 1) for views in zip(*(sample[0] for sample in good), strict=True)]
    views = [group.shape[0] for group in good[0][0]]
    return Batch(crops, views, good[0][1], torch.tensor([sample[2] for sample in good]))


class StepSampler(Sampler[list[Key]]):
    """Which images each process sees in each forward pass of each step.

    Epoch e visits the images in the permutation that (seed, e) gives; step s of an epoch takes the s-th run of
    ``global_batch`` of them, cut into equal forward passes that are dealt to the processes in turn. So the images of
    a step depend neither on the number of processes nor on where a run was resumed. A last incomplete batch is left
    out.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start_step: int = 0,
        stop_step: int = 0,
    ) -> None:
        self.length, self.batch_size, self.accumulation_steps = length, batch_size, accumulation_steps
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.start_step, self.stop_step = start_step, stop_step
        self.global_batch = batch_size * accumulation_steps * world_size
        self.steps_per_epoch = length // self.global_batch
        if self.steps_per_epoch == 0:
            raise InputError(
                f"{length} images are fewer than one global batch of {self.global_batch}: lower --batch-size-per-gpu "
                f"to at most {max(1, length // (accumulation_steps * world_size))}"
            )

    def __len__(self) -> int:
        return max(0, self.stop_step - self.start_step) * self.accumulation_steps

    def __iter__(self) -> Iterator[list[Key]]:
        order, order_epoch = np.empty(0, dtype=np.int64), -1
        for step in range(self.start_step, self.stop_step):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = np.random.default_rng([self.seed, epoch]).permutation(self.length), epoch
            for part in range(self.accumulation_steps):
                start = position * self.global_batch + (part * self.world_size + self.rank) * self.batch_size
                yield [(epoch, int(index)) for index in order[start : start + self.batch_size]]


def choose_workers(wanted: int, processes_here: int) -> int:
    """Loader processes for one rank: ``wanted``, or this machine's cores shared among its ranks, ten at most."""
    if wanted >= 0:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(10, cores // max(1, processes_here)))


def build_loader(
    source: Source,
    augmentation: MultiCropAugmentation,
    sampler: StepSampler,
    seed: int,
    num_workers: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Batches for every forward pass of ``sampler``, in order.

    Raises:
        UndecodableImage: while iterating, for an image that cannot be read.
    """
    loader: DataLoader[Batch] = DataLoader(
        MultiCropDataset(source, augmentation, seed),  # type: ignore[arg-type]
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=_one_thread if num_workers else None,
    )
    for batch in loader:
        if isinstance(batch, UndecodableImage):
            raise batch
        yield batch


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
