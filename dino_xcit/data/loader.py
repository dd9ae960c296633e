"""Batches of augmented views, in an order that depends on (seed, step) alone. B batch, V views."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

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

Seconds = tuple[float, float, float]
"""Time for reading, decoding and augmenting, in the process that does it."""

SUBSTITUTES = 20
"""So many other images are tried in the place of one that cannot be read."""


@dataclass(frozen=True)
class Unreadable:
    """An image that could not be read, and was replaced."""

    index: int
    """In the source."""
    name: str
    cause: str
    epoch: int


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
    unreadable: list[Unreadable] = field(default_factory=list)
    """Images that should have been in this batch, and that others stand in for."""
    seconds: Seconds = (0.0, 0.0, 0.0)
    """What this batch's images took."""

    def pin_memory(self) -> Batch:
        """Called by the loader where batches go to a GPU."""
        crops = [crop.pin_memory() for crop in self.crops]
        return Batch(crops, self.views, self.epoch, self.indices.pin_memory(), self.unreadable, self.seconds)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; from pinned memory without waiting."""
        crops = [crop.to(device, non_blocking=True) for crop in self.crops]
        indices = self.indices.to(device, non_blocking=True)
        return Batch(crops, self.views, self.epoch, indices, self.unreadable, self.seconds)


@dataclass
class Sample:
    """The views of one image, grouped by size, on their way to a batch."""

    views: list[Tensor]
    epoch: int
    index: int
    unreadable: list[Unreadable]
    seconds: Seconds


class MultiCropDataset(Dataset[Sample]):
    """(epoch, index) to that image's views, grouped by size.

    An image that cannot be read is replaced by another one that follows from (seed, epoch, index) alone, so that the
    views do not depend on who reads them, or when.
    """

    def __init__(self, source: Source, augmentation: MultiCropAugmentation, seed: int) -> None:
        self.source = source
        self.augmentation = augmentation
        self.seed = seed
        self.groups = group_by_size([view.size for view in augmentation.views])

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> Sample | UndecodableImage:  # type: ignore[override]
        epoch, index = key
        unreadable: list[Unreadable] = []
        for candidate in self._candidates(epoch, index):
            began = time.perf_counter()
            try:
                item, _ = self.source.read(candidate)
                read = time.perf_counter()
                image = decode(item, self.source.name(candidate))
                decoded = time.perf_counter()
            except InputError as error:
                cause = error.cause if isinstance(error, UndecodableImage) else str(error)
                unreadable.append(Unreadable(candidate, self.source.name(candidate), cause, epoch))
                continue
            # Keyed by the place in the order, not by the image: a substitute's own turn gives it other views.
            views = self.augmentation(image, self.seed, epoch, index)
            grouped = [torch.stack([views[view] for view in group]) for group in self.groups]
            seconds = (read - began, decoded - read, time.perf_counter() - decoded)
            return Sample(grouped, epoch, candidate, unreadable, seconds)
        # Handed over rather than raised: a loader process would bury the sentence in a traceback.
        return UndecodableImage(
            f"{unreadable[0].name} cannot be read ({unreadable[0].cause}), and neither can {SUBSTITUTES} other images "
            "drawn in its place: are these images, and is the disk there?"
        )

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        yield index
        generator = np.random.default_rng([self.seed, epoch, index, 1])
        yield from generator.integers(len(self.source), size=SUBSTITUTES).tolist()


def collate(samples: list[Sample | UndecodableImage]) -> Batch | UndecodableImage:
    """Samples to a view-major batch; one place for which no image can be read makes the whole batch that error."""
    good: list[Sample] = []
    for sample in samples:
        if isinstance(sample, UndecodableImage):
            return sample
        good.append(sample)
    crops = [torch.stack(views, dim=1).flatten(0, 1) for views in zip(*(sample.views for sample in good), strict=True)]
    views = [group.shape[0] for group in good[0].views]
    indices = torch.tensor([sample.index for sample in good])
    read, decoded, augmented = (sum(part) for part in zip(*(sample.seconds for sample in good), strict=True))
    unreadable = [bad for sample in good for bad in sample.unreadable]
    return Batch(crops, views, good[0].epoch, indices, unreadable, (read, decoded, augmented))


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
        UndecodableImage: while iterating, where neither an image nor what would stand in for it can be read.
    """
    loader: DataLoader[Batch] = DataLoader(
        MultiCropDataset(source, augmentation, seed),  # type: ignore[arg-type]
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=partial(be_a_loader_process, os.getpid()) if num_workers else None,
    )
    for batch in loader:
        if isinstance(batch, UndecodableImage):
            raise batch
        yield batch


def be_a_loader_process(parent: int, _: int) -> None:
    """Set up a process that reads images: one thread, deaf to signals that are meant for the run, gone with its parent.

    Slurm and terminals send their signals to every process of a job; one that dies of it takes the run along before
    that could save.
    """
    torch.set_num_threads(1)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if sys.platform == "linux":
        die_with_parent = 1  # PR_SET_PDEATHSIG, of prctl(2): a parent killed by SIGKILL cannot clean up
        ctypes.CDLL(None, use_errno=True).prctl(die_with_parent, signal.SIGKILL)
        if os.getppid() != parent:  # it died just before that
            os._exit(1)
