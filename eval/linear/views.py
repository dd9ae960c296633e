"""Training images of the linear probe: RandomResizedCrop and flip, in an order that (seed, epoch) alone decides.

B batch. A batch is made whole in one loader process: for pictures of a few dozen pixels, handing them over one by one
would take longer than cutting them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dino_xcit.data import Source, UndecodableImage, decode
from dino_xcit.data.loader import Key, StepSampler
from dino_xcit.errors import InputError
from dino_xcit.transform import EvalTransform, normalise

CROP_ATTEMPTS = 10
LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
_NUMBERS = 2 * CROP_ATTEMPTS + 3

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels, right and bottom excluded."""


@dataclass
class ProbeBatch:
    """Cropped training images."""

    images: Tensor
    """[B, 3, crop, crop] uint8."""
    indices: Tensor
    """[B] int64, which images of the source these are."""

    def pin_memory(self) -> ProbeBatch:
        """Called by the loader where batches go to a GPU."""
        return ProbeBatch(self.images.pin_memory(), self.indices.pin_memory())


class CroppedImages(Dataset[ProbeBatch]):
    """A list of (epoch, index) to that batch; an image that cannot be read makes the whole batch that error."""

    def __init__(self, source: Source, crop: int, scale: tuple[float, float], seed: int) -> None:
        """``crop`` pixels a side; ``scale``: share of the image's area that a crop covers, (least, most)."""
        self.source, self.crop, self.scale, self.seed = source, crop, scale, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, keys: Sequence[Key]) -> ProbeBatch | UndecodableImage:  # type: ignore[override]
        pixels = np.empty((len(keys), self.crop, self.crop, 3), dtype=np.uint8)
        for row, (epoch, index) in enumerate(keys):
            try:
                image = decode(self.source.read(index)[0], self.source.name(index))
            except InputError as error:
                # Handed over rather than raised: a loader process would bury the sentence in a traceback.
                return UndecodableImage(str(error))
            pixels[row] = np.asarray(random_view(image, self.crop, self.scale, self.seed, epoch, index))
        indices = torch.tensor([index for _, index in keys], dtype=torch.int64)
        return ProbeBatch(torch.from_numpy(pixels).permute(0, 3, 1, 2), indices)


def random_view(
    image: Image.Image, size: int, scale: tuple[float, float], seed: int, epoch: int, index: int
) -> Image.Image:
    """RandomResizedCrop (bilinear), then a flip in half of the cases; decided by (seed, epoch, index) alone."""
    rng = np.random.Generator(np.random.Philox(key=[seed & 0xFFFFFFFFFFFFFFFF, (epoch << 40) | index]))
    numbers: list[float] = rng.random(_NUMBERS).tolist()
    box = draw_crop(image.width, image.height, scale, numbers)
    # Cropped first, as torchvision does: resize(box=...) would let the filter look beyond the crop.
    view = image.crop(box).resize((size, size), Image.Resampling.BILINEAR)
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if numbers[-1] < 0.5 else view


def draw_crop(width: int, height: int, scale: tuple[float, float], numbers: Sequence[float]) -> Box:
    """torchvision's RandomResizedCrop: the first of ten tries that fits in the picture.

    A try draws an area uniformly and an aspect ratio between 3/4 and 4/3 log-uniformly; where none fits, the largest
    centred crop whose ratio is allowed.

    Args:
        scale: share of the picture's area, (least, most).
        numbers: 23 numbers uniform in [0, 1): two a try, then the crop's place, then one that is not used here.
    """
    low, high = LOG_RATIO
    for attempt in range(CROP_ATTEMPTS):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * numbers[2 * attempt])
        ratio = math.exp(low + (high - low) * numbers[2 * attempt + 1])
        wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < tall <= height:
            left = int(numbers[-3] * (width - wide + 1))
            top = int(numbers[-2] * (height - tall + 1))
            return left, top, left + wide, top + tall
    wide, tall = width, height
    if width / height < math.exp(low):
        tall = round(width / math.exp(low))
    elif width / height > math.exp(high):
        wide = round(height * math.exp(high))
    left, top = (width - wide) // 2, (height - tall) // 2
    return left, top, left + wide, top + tall


class EachOnce:
    """Every image of one epoch once, in the order of the source, in rounds that are dealt to the processes.

    :class:`StepSampler` shuffles, and leaves a last incomplete batch out.
    """

    def __init__(self, length: int, batch_size: int, epoch: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.seed = seed
        round_size = batch_size * world_size
        rounds = [range(start, min(start + round_size, length)) for start in range(0, length, round_size)]
        self.batches = [
            [(epoch, index) for index in whole[rank * batch_size : (rank + 1) * batch_size]] for whole in rounds
        ]
        """One a round; those of the last round may be short or empty."""

    def __iter__(self) -> Iterator[list[Key]]:
        return iter([batch for batch in self.batches if batch])


def probe_batches(
    source: Source,
    crop: int,
    scale: tuple[float, float],
    sampler: StepSampler | EachOnce,
    num_workers: int,
    device: torch.device,
) -> Iterator[ProbeBatch]:
    """Batches for every list of ``sampler``, in order.

    Raises:
        UndecodableImage: while iterating, for an image that cannot be read.
    """
    loader: DataLoader[ProbeBatch] = DataLoader(
        CroppedImages(source, crop, scale, sampler.seed),
        sampler=sampler,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_as_it_is,  # type: ignore[arg-type]
        pin_memory=device.type == "cuda",
    )
    for batch in loader:
        if isinstance(batch, UndecodableImage):
            raise batch
        yield batch


def frozen_features(
    backbone: nn.Module, batches: Iterable[ProbeBatch], transform: EvalTransform, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each batch its features [B, W] in float32, without gradient, and which images these are [B], on ``device``.

    Args:
        backbone: on ``device``, in eval mode.
        transform: for its mean and deviation.
    """
    for batch in batches:
        indices = batch.indices.to(device, non_blocking=True)
        pixels = batch.images.to(device, non_blocking=True)
        with torch.no_grad():
            features = backbone(normalise(pixels, transform.mean, transform.std)).cls_token.float()
        yield features, indices


def _as_it_is(batch: ProbeBatch) -> ProbeBatch:
    return batch


def hold_out(labels: NDArray[np.int64], share: float, seed: int) -> NDArray[np.int64]:
    """Indices, ascending, of a share of each class's images, drawn by ``seed``.

    A class keeps at least one image to learn from.

    Args:
        labels: [images].
        share: of each class, 0 <= share < 1, rounded to whole images.
    """
    rng = np.random.default_rng([seed, 2])
    chosen = [
        rng.permutation(members)[: min(round(share * len(members)), len(members) - 1)]
        for members in (np.flatnonzero(labels == label) for label in np.unique(labels))
    ]
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)
