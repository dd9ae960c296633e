"""Training images of the linear probe: RandomResizedCrop and flip, in an order that (seed, epoch) alone decides.

They are looked at as they come (:func:`live_features`), or the features of a few epochs are kept and come again
(``--cached``): epoch e then learns from kept epoch e mod E, in an order of its own. The views of a kept epoch are those
that the full protocol sees in that epoch.

B batch, E kept epochs, W features of a row, n images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dino_xcit.data import Source, decode
from dino_xcit.data.loader import Key, StepSampler
from dino_xcit.data.source import hash_lines
from dino_xcit.data.workers import worker_init
from dino_xcit.errors import InputError
from dino_xcit.transform import EvalTransform, normalise
from eval.features import refuse_not_finite

CROP_ATTEMPTS = 10
LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
_NUMBERS = 2 * CROP_ATTEMPTS + 3

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels."""


@dataclass(frozen=True)
class Views(Dataset[Any]):
    """Cropped training images. A batch is made whole in one loader process: for pictures of a few dozen pixels, handing
    them over one by one would take longer than cutting them."""

    source: Source
    transform: EvalTransform
    """For the crop's size, mean and standard deviation."""
    scale: tuple[float, float]
    """Share of the image's area that a crop covers: least, most."""
    seed: int

    def __getitem__(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor] | InputError:
        """Images [B, 3, crop, crop] uint8 and which these are [B]; an image that cannot be read makes it that error."""
        pixels = np.empty((len(keys), self.transform.crop, self.transform.crop, 3), dtype=np.uint8)
        try:
            for row, (epoch, index) in enumerate(keys):
                pixels[row] = self.pixels(epoch, index)
        except InputError as error:
            # Handed over rather than raised: a loader process would bury the sentence in a traceback.
            return error
        return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor([index for _, index in keys])

    def pixels(self, epoch: int, index: int) -> NDArray[np.uint8]:
        """[crop, crop, 3]."""
        image = decode(self.source.read(index)[0], self.source.name(index), self.transform.white_level)
        return np.asarray(random_view(image, self.transform.crop, self.scale, self.seed, epoch, index))


class AugmentedEpoch:
    """The views of one epoch as a data source, so that their features are kept like any others."""

    def __init__(self, views: Views, epoch: int, fingerprint: str) -> None:
        """``fingerprint``: of ``views.source``."""
        self._views, self._epoch, self._fingerprint = views, epoch, fingerprint
        self.url = f"{views.source.url}, augmented epoch {epoch + 1}"
        self.labels, self.classes, self.name = views.source.labels, views.source.classes, views.source.name

    def __len__(self) -> int:
        return len(self._views.source)

    def read(self, index: int) -> tuple[NDArray[np.uint8], None]:
        return self._views.pixels(self._epoch, index), None

    def fingerprint(self) -> str:
        views = self._views
        return hash_lines([self._fingerprint, f"{views.transform.crop} {views.scale} {views.seed} {self._epoch}"])


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
            left, top = int(numbers[-3] * (width - wide + 1)), int(numbers[-2] * (height - tall + 1))
            return left, top, left + wide, top + tall
    wide, tall = min(width, round(height * math.exp(high))), min(height, round(width / math.exp(low)))
    left, top = (width - wide) // 2, (height - tall) // 2
    return left, top, left + wide, top + tall


def live_features(
    backbone: nn.Module, views: Views, sampler: StepSampler, num_workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each step its features [B, W] in float32, without gradient, and which images these are [B], on ``device``.

    Args:
        backbone: on ``device``, in eval mode; its class token is the row.

    Raises:
        InputError: an image cannot be read, or its features are not finite; it is named.
    """
    loader: DataLoader[Any] = DataLoader(
        views, None, sampler=sampler, num_workers=num_workers, worker_init_fn=worker_init() if num_workers else None,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        pixels, indices = (part.to(device, non_blocking=True) for part in batch)
        with torch.no_grad():
            features = backbone(normalise(pixels, views.transform.mean, views.transform.std)).cls_token.float()
        refuse_not_finite(features, views.source, indices.tolist())
        yield features, indices


def kept_features(
    epochs: Sequence[NDArray[Any]], sampler: StepSampler, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """As :func:`live_features`, from what was kept: ``epochs`` are E arrays [n, W]."""
    for keys in sampler:
        chosen = np.array([index for _, index in keys], dtype=np.int64)
        rows = epochs[keys[0][0] % len(epochs)][chosen].astype(np.float32)
        yield torch.from_numpy(rows).to(device), torch.from_numpy(chosen).to(device)


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
