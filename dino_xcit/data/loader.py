"""Batches of augmented views, in an order that depends on (seed, step) only. B: batch size, V: number of views."""

from __future__ import annotations

import itertools
import multiprocessing
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dino_xcit.augment import MultiCropAugmentation, group_by_size
from dino_xcit.augment.parameters import COLUMNS, device_plan
from dino_xcit.data.decode import UndecodableImage, decode_pixels
from dino_xcit.data.source import Source
from dino_xcit.data.workers import PREFETCHED, fit_shared_memory, worker_init
from dino_xcit.errors import InputError
from dino_xcit.runtime import logging as log
from dino_xcit.runtime import watchdog
from dino_xcit.transform import RGB, PixelFormat

Key = tuple[int, int]
"""(epoch, index in the source)."""

Seconds = tuple[float, float, float]
"""Seconds of reading, decoding and augmenting, measured in the worker."""

# PyTorch warns if there are more workers than cores, but they help with slow disks: see dino_xcit.data.load_monitor.
warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)

SUBSTITUTES = 20
"""Maximum number of other images tried in place of an unreadable one."""


@dataclass(frozen=True)
class Unreadable:
    """An unreadable image that was replaced."""

    index: int
    """Index in the source."""
    name: str
    cause: str
    epoch: int


@dataclass(kw_only=True)
class AnyBatch(ABC):
    """Input of one forward pass on one rank."""

    epoch: int
    indices: Tensor
    """[B] int64, indices of the images in the source."""
    unreadable: list[Unreadable] = field(default_factory=list)
    """Unreadable images of this batch, which were replaced."""
    seconds: Seconds = (0.0, 0.0, 0.0)

    @abstractmethod
    def pin_memory(self) -> Self:
        """Pin the memory of all tensors for the device. Called by the DataLoader."""

    @abstractmethod
    def to(self, device: torch.device) -> Self:
        """Move the batch to a device. Asynchronous if the memory is pinned."""

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors."""


@dataclass
class Batch(AnyBatch):
    """Views of the images of one forward pass on one rank."""

    crops: list[Tensor]
    """One tensor per crop size, [views of that size * B, channels, size, size], view-major; the global crops first.
    uint8 for three channels, else float32 from 0 to 1."""
    views: list[int]
    """Number of views in each of these tensors."""
    labels: Tensor | None = None
    """[B] int64 if the source has labels. For observers; methods do not use them."""
    plans: list[Tensor] | None = None
    """What the device applies to the crops, if it does: one :func:`~dino_xcit.augment.parameters.device_plan` per crop
    size, [views of that size * B, columns] float32, on the host."""

    def pin_memory(self) -> Batch:
        labels = None if self.labels is None else self.labels.pin_memory()
        crops = [crop.pin_memory() for crop in self.crops]
        plans = None if self.plans is None else [plan.pin_memory() for plan in self.plans]
        return replace(self, crops=crops, indices=self.indices.pin_memory(), labels=labels, plans=plans)

    def to(self, device: torch.device) -> Batch:
        """Move the batch to a device and finish its views. Asynchronous if the memory is pinned."""
        crops = [crop.to(device, non_blocking=True) for crop in self.crops]
        if self.plans is not None:
            from dino_xcit.kernels.photometric import finish_views  # needs Triton

            for crop, plan in zip(crops, self.plans, strict=True):
                finish_views(crop, plan.to(device, non_blocking=True))
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        indices = self.indices.to(device, non_blocking=True)
        return replace(self, crops=crops, indices=indices, labels=labels, plans=None)

    def tensors(self) -> Iterator[Tensor]:
        yield from (*self.crops, self.indices, *([] if self.labels is None else [self.labels]))


BatchT = TypeVar("BatchT", bound=AnyBatch)


class BatchDataset(Dataset[BatchT]):
    """Map a list of (epoch, index) to a batch.

    An unreadable image is replaced by another one that depends on (seed, epoch, index) only, so that the batch does not
    depend on the worker.
    """

    sides: Sequence[int]
    """Sides of squares with the bytes of one image in a batch, as RGB; for the size of shared memory."""

    def __init__(self, source: Source, seed: int, format: PixelFormat = RGB) -> None:
        self.source, self.seed, self.format = source, seed, format

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: list[Key]) -> BatchT | UndecodableImage:
        """Make a batch. Called by the DataLoader."""
        raise NotImplementedError

    def compile(self) -> None:
        """Compile what the workers run; called once, before they start."""

    def check(self, index: int, pixels: NDArray[Any]) -> None:
        """Raise UndecodableImage if the pixels do not fit the targets of image ``index``; it is then replaced."""

    def read(
        self, epoch: int, index: int, unreadable: list[Unreadable], spent: NDArray[np.float64]
    ) -> tuple[int, int | None, NDArray[Any]] | UndecodableImage:
        """Read an image or its replacement.

        Args:
            unreadable: receives the images that were replaced.
            spent: seconds of reading and decoding are added to its first two elements.

        Returns:
            The image's index in the source, its label and its pixels [height, width, channels]; UndecodableImage if no
            replacement can be read either. It is not raised: the DataLoader would wrap the message in a traceback.
        """
        bad: list[Unreadable] = []
        for candidate in self._candidates(epoch, index):
            began = time.perf_counter()
            try:
                item, label = self.source.read(candidate)
                read = time.perf_counter()
                pixels = decode_pixels(item, self.source.name(candidate), self.format)
                self.check(candidate, pixels)
            except InputError as error:
                cause = error.cause if isinstance(error, UndecodableImage) else str(error)
                bad.append(Unreadable(candidate, self.source.name(candidate), cause, epoch))
                continue
            spent[:2] += (read - began, time.perf_counter() - read)
            unreadable += bad
            return candidate, label, pixels
        return UndecodableImage(
            f"{bad[0].name} cannot be read ({bad[0].cause}), and neither can {SUBSTITUTES} other images "
            "drawn in its place: check the data path and the disk"
        )

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        yield index
        generator = np.random.default_rng([self.seed, epoch, index, 1])
        yield from generator.integers(len(self.source), size=SUBSTITUTES).tolist()


class MultiCropDataset(BatchDataset[Batch]):
    """Map a list of (epoch, index) to a batch of the images' views."""

    def __init__(
        self, source: Source, augmentation: MultiCropAugmentation, seed: int, format: PixelFormat = RGB,
        finish_on_device: bool = False, first: Sequence[MultiCropAugmentation] = (),
    ) -> None:  # fmt: skip
        """
        Args:
            augmentation: that of the last epochs.
            finish_on_device: whether the device applies the photometric part (:meth:`Batch.to`).
            first: augmentations of the first epochs, one for each.
        """
        super().__init__(source, seed, format)
        self.augmentation, self.first, self.finish_on_device = augmentation, first, finish_on_device
        sides = [[format.rgb_side(view.size) for view in one.views] for one in (*first, augmentation)]
        self.sides = max(sides, key=lambda sides: sum(side**2 for side in sides))
        self._maker = augmentation.maker()

    def compile(self) -> None:
        self.augmentation.compile()

    def __getitems__(self, keys: list[Key]) -> Batch | UndecodableImage:
        """Make a batch; views are written into it in place."""
        epoch = keys[0][0]  # that of all keys
        augmentation = self.first[epoch] if epoch < len(self.first) else self.augmentation
        sizes = [view.size for view in augmentation.views]
        groups = group_by_size(sizes)
        shapes = [(len(group), len(keys), augmentation.channels, *[sizes[group[0]]] * 2) for group in groups]
        crops = [augmentation.empty(*shape) for shape in shapes]
        rows = np.empty((len(sizes), len(keys), COLUMNS)) if self.finish_on_device else None
        places = [group.numpy() for group in crops]
        indices: list[int] = []
        labels: list[int | None] = []
        unreadable: list[Unreadable] = []
        spent = np.zeros(3)
        for place, (_, index) in enumerate(keys):
            found = self.read(epoch, index, unreadable, spent)
            if isinstance(found, UndecodableImage):
                return found
            candidate, label, pixels = found
            began = time.perf_counter()
            self._maker.load(pixels)
            # Keyed by the replaced image's index: a replacement gets other views than in its own turn.
            drawn = augmentation.draw_rows(pixels.shape[1], pixels.shape[0], self.seed, epoch, index)
            if rows is not None:
                rows[:, place] = drawn
            for group, group_places in zip(groups, places, strict=True):
                for number, view in enumerate(group):
                    self._maker.make(drawn[view], group_places[number, place], photometric=rows is None)
            self._maker.release()
            del pixels, found  # frees the memory before the next image is decoded
            indices.append(candidate)
            labels.append(label)
            spent[2] += time.perf_counter() - began
        return Batch(
            [group.flatten(0, 1) for group in crops],
            [len(group) for group in groups],
            labels=None if None in labels else torch.tensor(labels),
            plans=None if rows is None else [_plan(rows[group]) for group in groups],
            epoch=epoch,
            indices=torch.tensor(indices),
            unreadable=unreadable,
            seconds=(float(spent[0]), float(spent[1]), float(spent[2])),
        )


class StepSampler(Sampler[list[Key]]):
    """Yield the keys of each forward pass of one rank.

    Epoch e visits the images in a permutation drawn from (seed, e). Step s of an epoch takes the s-th chunk of
    ``global_batch`` images, split into equal forward passes that are assigned to the ranks in turn. The images of a
    step therefore do not depend on the number of ranks or on resuming. The last incomplete batch is dropped.
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
        repeats: int = 1,
    ) -> None:
        """``repeats``: copies of each image in a step, with different epochs in their keys (repeated augmentation,
        arXiv 1901.09335); an epoch keeps its number of steps and visits a share of the images."""
        self.repeats = repeats
        self.length, self.batch_size, self.accumulation_steps = length, batch_size, accumulation_steps
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.start_step, self.stop_step = start_step, stop_step
        self.global_batch = batch_size * accumulation_steps * world_size
        self.steps_per_epoch = length // self.global_batch
        if self.steps_per_epoch == 0:
            most = length // (accumulation_steps * world_size)
            remedy = f"lower --batch-size-per-gpu to at most {most}" if most else "use fewer ranks or more images"
            raise InputError(
                f"{length} training images make less than one global batch of {self.global_batch}: {remedy}"
            )

    def epochs(self, step: int) -> int:
        """Return the 0-based epoch of the last of ``step`` completed steps."""
        return (step - 1) // self.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch ends after ``step`` steps."""
        return step % self.steps_per_epoch == 0

    def ends_run(self, step: int) -> bool:
        """Whether the run ends after ``step`` steps."""
        return step >= self.stop_step

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
                yield [self._key(epoch, place, order) for place in range(start, start + self.batch_size)]

    def _key(self, epoch: int, place: int, order: NDArray[np.int64]) -> Key:
        """Return the key at a place of the epoch. Copies are as far apart as possible, so on other ranks."""
        if self.repeats == 1:
            return epoch, int(order[place])
        step, within = divmod(place, self.global_batch)
        different = -(-self.global_batch // self.repeats)
        copy, image = divmod(within, different)
        return epoch * self.repeats + copy, int(order[step * different + image])


class Loader(Generic[BatchT]):
    """Iterate over the batches of a sampler, in order, on the device.

    On a GPU, batches are copied and finished on a separate stream, in parallel with the previous step.
    """

    def __init__(
        self, dataset: BatchDataset[BatchT], sampler: StepSampler, num_workers: int, device: torch.device
    ) -> None:
        self._device, self._start_step = device, sampler.start_step
        self.waited = 0.0
        """Seconds that the last step waited for its images."""
        began = time.perf_counter()
        dataset.compile()
        if (took := time.perf_counter() - began) > 2:
            log.info(f"compiled the augmentation in {took:.0f} s (cached for later runs if possible)")
        num_workers = fit_shared_memory(num_workers, sampler.batch_size, dataset.sides)
        others = multiprocessing.active_children()
        self._batches: Iterator[BatchT | UndecodableImage] = iter(
            DataLoader(
                dataset,  # type: ignore[arg-type]
                batch_sampler=sampler,
                num_workers=num_workers,
                prefetch_factor=PREFETCHED if num_workers else None,
                collate_fn=_as_it_is,  # type: ignore[arg-type]
                pin_memory=device.type == "cuda",
                worker_init_fn=worker_init() if num_workers else None,
            )
        )
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._processes = [process for process in multiprocessing.active_children() if process not in others]

    def close(self) -> None:
        """Stop the workers and the iteration."""
        self._batches = iter(())  # PyTorch stops the workers and waits some seconds
        for process in self._processes:
            process.kill()  # Python would wait for a worker that is blocked by a disk

    def steps(self, passes: int) -> Iterator[list[BatchT]]:
        """Yield the ``passes`` batches of each step, and set :attr:`waited`."""
        for step in itertools.count(self._start_step):
            watchdog.phase("waiting for images", step)
            began = time.perf_counter()
            batches = list(itertools.islice(self, passes))
            self.waited = time.perf_counter() - began
            if not batches:
                return
            yield batches

    def __iter__(self) -> Iterator[BatchT]:
        return self

    def __next__(self) -> BatchT:
        """Return the next batch.

        Raises:
            UndecodableImage: An image and all its replacements are unreadable.
        """
        batch = next(self._batches)
        if isinstance(batch, UndecodableImage):
            self.close()
            raise batch
        if self._stream is None:
            return batch.to(self._device)
        with torch.cuda.stream(self._stream):
            batch = batch.to(self._device)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in batch.tensors():
            tensor.record_stream(current)  # keeps the other stream from reusing memory that this one reads
        return batch


def build_loader(
    source: Source,
    augmentation: MultiCropAugmentation,
    sampler: StepSampler,
    seed: int,
    num_workers: int,
    device: torch.device,
    format: PixelFormat = RGB,
) -> Loader[Batch]:
    """Build a loader of views of ``source``."""
    return Loader(MultiCropDataset(source, augmentation, seed, format), sampler, num_workers, device)


def _plan(rows: NDArray[np.float64]) -> Tensor:
    """Return the plan of the views of a crop size; their parameters are [views, B, columns]."""
    return torch.from_numpy(device_plan(rows.reshape(-1, COLUMNS)))


def _as_it_is(batch: BatchT | UndecodableImage) -> BatchT | UndecodableImage:
    """Return the batch unchanged, as the dataset makes whole batches."""
    return batch
