"""Batches of augmented views, in an order that depends on (seed, step) alone. B batch, V views."""

from __future__ import annotations

import itertools
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dino_xcit.augment import MultiCropAugmentation, ViewMaker, group_by_size
from dino_xcit.augment.on_device import finish_views
from dino_xcit.augment.parameters import COLUMNS
from dino_xcit.data.decode import UndecodableImage, decode_pixels
from dino_xcit.data.source import Source
from dino_xcit.data.workers import worker_init
from dino_xcit.errors import InputError
from dino_xcit.runtime import logging as log
from dino_xcit.runtime import watchdog
from dino_xcit.transform import WHITE

Key = tuple[int, int]
"""(epoch, index in the source)."""

Seconds = tuple[float, float, float]
"""Time for reading, decoding and augmenting, in the process that does it."""

# PyTorch's advice, said twice, where there are more loader processes than cores: dino_xcit.data.load_monitor measures
# whether they are too few, and many wait for a slow disk better than few.
warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)

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
    labels: Tensor | None = None
    """[B] int64, where the source has labels. Methods do not read them; observers may."""
    unreadable: list[Unreadable] = field(default_factory=list)
    """Images that should have been in this batch, and that others stand in for."""
    seconds: Seconds = (0.0, 0.0, 0.0)
    """What this batch's images took."""
    unfinished: list[Tensor] | None = None
    """Where the photometric part is left to the device: what was drawn for each of the crops, a tensor a crop size,
    [views of that size * B, columns] float64, on the host."""

    def pin_memory(self) -> Batch:
        """Called by the loader where batches go to a GPU."""
        labels = None if self.labels is None else self.labels.pin_memory()
        crops = [crop.pin_memory() for crop in self.crops]
        return replace(self, crops=crops, indices=self.indices.pin_memory(), labels=labels)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device, its views finished; from pinned memory without waiting."""
        crops = [crop.to(device, non_blocking=True) for crop in self.crops]
        if self.unfinished is not None:
            crops = [finish_views(crop, rows) for crop, rows in zip(crops, self.unfinished, strict=True)]
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        indices = self.indices.to(device, non_blocking=True)
        return replace(self, crops=crops, indices=indices, labels=labels, unfinished=None)


class MultiCropDataset(Dataset[Batch]):
    """A list of (epoch, index) to a batch of these images' views.

    An image that cannot be read is replaced by another one that follows from (seed, epoch, index) alone, so that the
    views do not depend on who reads them, or when.
    """

    def __init__(
        self, source: Source, augmentation: MultiCropAugmentation, seed: int, white_level: int = WHITE
    ) -> None:
        self.source, self.white_level = source, white_level
        self.augmentation = augmentation
        self.seed = seed
        self.groups = group_by_size([view.size for view in augmentation.views])
        self.finish_on_device = torch.zeros(1, dtype=torch.bool).share_memory_()
        """Set: the photometric part of the views is left to the device. The loader's processes see it at once."""
        self._maker = ViewMaker()

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: list[Key]) -> Batch | UndecodableImage:
        """What the loader calls: the views are made in their place in the batch."""
        views = self.augmentation.views
        sizes = [views[group[0]].size for group in self.groups]
        crops = [
            torch.empty(len(group), len(keys), 3, size, size, dtype=torch.uint8)
            for group, size in zip(self.groups, sizes, strict=True)
        ]
        rows = [torch.empty(len(group), len(keys), COLUMNS, dtype=torch.float64) for group in self.groups]
        places = [group.numpy() for group in crops]
        leave = bool(self.finish_on_device)
        indices: list[int] = []
        labels: list[int | None] = []
        unreadable: list[Unreadable] = []
        spent = np.zeros(3)
        for place, (epoch, index) in enumerate(keys):
            found = self._read(epoch, index, unreadable, spent)
            if isinstance(found, UndecodableImage):
                return found
            candidate, label, picture = found
            began = time.perf_counter()
            self._maker.load(picture)
            # Keyed by the place in the order, not by the image: a substitute's own turn gives it other views.
            drawn = self.augmentation.draw_rows(picture.shape[1], picture.shape[0], self.seed, epoch, index)
            for group, group_places, group_rows in zip(self.groups, places, rows, strict=True):
                if leave:
                    group_rows[:, place] = torch.from_numpy(drawn[group])
                for number, view in enumerate(group):
                    self._maker.make(drawn[view], group_places[number, place], photometric=not leave)
            self._maker.release()
            del picture, found  # before the next one is decoded: they may be large
            indices.append(candidate)
            labels.append(label)
            spent[2] += time.perf_counter() - began
        return Batch(
            [group.flatten(0, 1) for group in crops],
            [len(group) for group in self.groups],
            keys[0][0],
            torch.tensor(indices),
            None if None in labels else torch.tensor(labels),
            unreadable,
            (float(spent[0]), float(spent[1]), float(spent[2])),
            [group.flatten(0, 1) for group in rows] if leave else None,
        )

    def _read(
        self, epoch: int, index: int, unreadable: list[Unreadable], spent: NDArray[np.float64]
    ) -> tuple[int, int | None, NDArray[np.uint8]] | UndecodableImage:
        """Which image, or which one in its place, its label, and its pixels."""
        bad: list[Unreadable] = []
        for candidate in self._candidates(epoch, index):
            began = time.perf_counter()
            try:
                item, label = self.source.read(candidate)
                read = time.perf_counter()
                picture = decode_pixels(item, self.source.name(candidate), self.white_level)
            except InputError as error:
                cause = error.cause if isinstance(error, UndecodableImage) else str(error)
                bad.append(Unreadable(candidate, self.source.name(candidate), cause, epoch))
                continue
            spent[:2] += (read - began, time.perf_counter() - read)
            unreadable += bad
            return candidate, label, picture
        # Handed over rather than raised: a loader process would bury the sentence in a traceback.
        return UndecodableImage(
            f"{bad[0].name} cannot be read ({bad[0].cause}), and neither can {SUBSTITUTES} other images "
            "drawn in its place: are these images, and is the disk there?"
        )

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        yield index
        generator = np.random.default_rng([self.seed, epoch, index, 1])
        yield from generator.integers(len(self.source), size=SUBSTITUTES).tolist()


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
                f"{length} training images make less than one global batch of {self.global_batch}: lower "
                f"--batch-size-per-gpu to at most {max(1, length // (accumulation_steps * world_size))}"
            )

    def epochs(self, step: int) -> int:
        """The 0-based epoch of the last of ``step`` steps done."""
        return (step - 1) // self.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch is over after ``step`` steps."""
        return step % self.steps_per_epoch == 0

    def ends_run(self, step: int) -> bool:
        """Whether the run is over after ``step`` steps."""
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
                yield [(epoch, int(index)) for index in order[start : start + self.batch_size]]


class Loader:
    """Batches for every forward pass of a sampler, in order, on the device.

    On a GPU they are copied, and finished, on a stream of their own: the step before is still under way there when the
    next batch is asked for.
    """

    def __init__(self, dataset: MultiCropDataset, sampler: StepSampler, num_workers: int, device: torch.device) -> None:
        self._dataset, self._device, self._start_step = dataset, device, sampler.start_step
        self.waited = 0.0
        """Seconds that the last step waited for its images."""
        began = time.perf_counter()
        dataset.augmentation.compile()  # here, rather than in every process
        if (took := time.perf_counter() - began) > 2:
            log.info(f"compiled the augmentation in {took:.0f} s (kept for later runs where it can be)")
        self.relieve: Callable[[], None] | None = None
        """Moves work of the loader's processes to the device, where that is possible."""
        others = multiprocessing.active_children()
        self._batches: Iterator[Batch | UndecodableImage] = iter(
            DataLoader(
                dataset,  # type: ignore[arg-type]
                batch_sampler=sampler,
                num_workers=num_workers,
                collate_fn=_as_it_is,  # type: ignore[arg-type]
                pin_memory=device.type == "cuda",
                worker_init_fn=worker_init() if num_workers else None,
            )
        )
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._processes = [process for process in multiprocessing.active_children() if process not in others]

    def finish_on_device(self) -> None:
        """From the next images on, leave the photometric part of the views to the device. The views stay the same."""
        self._dataset.finish_on_device.fill_(True)

    def close(self) -> None:
        """End the loader's processes; there are no more batches."""
        self._batches = iter(())  # PyTorch asks them to end, and waits some seconds
        for process in self._processes:
            process.kill()  # one that waits for a disk does not hear, and Python would wait for it

    def steps(self, passes: int) -> Iterator[list[Batch]]:
        """The forward passes of each step, ``passes`` at a time; :attr:`waited` is the time that a step waited."""
        for step in itertools.count(self._start_step):
            watchdog.phase("waiting for images", step)
            began = time.perf_counter()
            batches = list(itertools.islice(self, passes))
            self.waited = time.perf_counter() - began
            if not batches:
                return
            yield batches

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            UndecodableImage: neither an image nor what would stand in for it can be read.
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
        for tensor in (*batch.crops, batch.indices, *([] if batch.labels is None else [batch.labels])):
            tensor.record_stream(current)  # its memory is not for the other stream while this one reads it
        return batch


def build_loader(
    source: Source,
    augmentation: MultiCropAugmentation,
    sampler: StepSampler,
    seed: int,
    num_workers: int,
    device: torch.device,
    augment_device: str = "cpu",
    white_level: int = WHITE,
) -> Loader:
    """A loader of ``source``'s views; the last two are settings of :class:`dino_xcit.config.PretrainConfig`."""
    check_augment_device(augment_device, device)
    loader = Loader(MultiCropDataset(source, augmentation, seed, white_level), sampler, num_workers, device)
    if augment_device == "cuda":
        loader.finish_on_device()
    elif augment_device == "auto" and device.type == "cuda":
        loader.relieve = loader.finish_on_device
    return loader


def check_augment_device(augment_device: str, device: torch.device) -> None:
    """Raise InputError if views are to be finished on a GPU, but training is on the CPU."""
    if augment_device == "cuda" and device.type != "cuda":
        raise InputError("augment_device is cuda, but training is on the CPU: expected --augment-device auto or cpu")


def _as_it_is(batch: Batch | UndecodableImage) -> Batch | UndecodableImage:
    """The dataset makes whole batches: nothing to collate."""
    return batch
