"""Augmented training images of the linear probe: RandomResizedCrop and flip, in an order given by (seed, epoch).

Features are extracted in each epoch (:func:`live_features`), or those of the first E epochs are cached and repeated
(``--cached``): epoch e uses cached epoch e mod E in its own order. Cached epochs have the same crops as in the full
protocol.

B batch size, E cached epochs, W features of a row, n images.
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

from dino_xcit.data import Source
from dino_xcit.data.decode import read_image
from dino_xcit.data.loader import Key, StepSampler
from dino_xcit.data.source import hash_lines
from dino_xcit.data.workers import PREFETCHED, fit_shared_memory, worker_init
from dino_xcit.errors import InputError
from dino_xcit.transform import Channels, EvalTransform, normalise, to_tensor
from eval.features import refuse_not_finite

CROP_ATTEMPTS = 10
LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
_NUMBERS = 2 * CROP_ATTEMPTS + 3

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels."""


@dataclass(frozen=True)
class Views(Dataset[Any]):
    """Cropped training images as whole batches: transferring small images from a worker one by one is slower than
    cropping them."""

    source: Source
    transform: EvalTransform
    """Transform with crop size, mean and std."""
    scale: tuple[float, float]
    """Minimum and maximum share of the image's area in a crop."""
    seed: int

    def __getitem__(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor] | InputError:
        """Return images [B, channels, crop, crop] and their indices [B], or the error of an unreadable image."""
        try:
            pixels = np.stack([self.pixels(epoch, index) for epoch, index in keys])
        except InputError as error:
            return error  # a raised error would come out of a worker inside a traceback
        return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor([index for _, index in keys])

    def pixels(self, epoch: int, index: int) -> NDArray[Any]:
        """Return an augmented image [crop, crop, channels]: uint8 for three channels, else float32 from 0 to 1."""
        image = read_image(self.source, index, self.transform.pixel_format)
        return np.asarray(random_view(image, self.transform.crop, self.scale, self.seed, epoch, index))


class AugmentedEpoch:
    """Augmented images of one epoch as a source, so that their features can be cached."""

    def __init__(self, views: Views, epoch: int, fingerprint: str) -> None:
        """``fingerprint`` is that of ``views.source``."""
        self._views, self._epoch, self._fingerprint = views, epoch, fingerprint
        self.url = f"{views.source.url}, augmented epoch {epoch + 1}"
        self.labels, self.classes, self.name = views.source.labels, views.source.classes, views.source.name

    def __len__(self) -> int:
        return len(self._views.source)

    def read(self, index: int) -> tuple[NDArray[Any], None]:
        return self._views.pixels(self._epoch, index), None

    def fingerprint(self) -> str:
        views = self._views
        return hash_lines([self._fingerprint, f"{views.transform.crop} {views.scale} {views.seed} {self._epoch}"])


def random_view(
    image: Image.Image | Channels, size: int, scale: tuple[float, float], seed: int, epoch: int, index: int
) -> Image.Image | Channels:
    """Apply RandomResizedCrop (bilinear) and a random flip, both determined by (seed, epoch, index)."""
    rng = np.random.Generator(np.random.Philox(key=[seed & 0xFFFFFFFFFFFFFFFF, (epoch << 40) | index]))
    numbers: list[float] = rng.random(_NUMBERS).tolist()
    if isinstance(image, np.ndarray):
        left, top, right, bottom = draw_crop(image.shape[1], image.shape[0], scale, numbers)
        crop = to_tensor(image[top:bottom, left:right])[None]
        resized = nn.functional.interpolate(crop, (size, size), mode="bilinear", antialias=True)
        array: Channels = resized[0].permute(1, 2, 0).numpy()
        return array[:, ::-1] if numbers[-1] < 0.5 else array
    box = draw_crop(image.width, image.height, scale, numbers)
    # Crop before resizing, as torchvision does: the filter of resize(box=...) extends beyond the crop.
    view = image.crop(box).resize((size, size), Image.Resampling.BILINEAR)
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if numbers[-1] < 0.5 else view


def draw_crop(width: int, height: int, scale: tuple[float, float], numbers: Sequence[float]) -> Box:
    """Draw a crop like torchvision's RandomResizedCrop: the first of ten attempts that fits into the image.

    Each attempt draws an area uniformly and an aspect ratio between 3/4 and 4/3 log-uniformly. If none fits, return the
    largest centred crop with an allowed ratio.

    Args:
        scale: minimum and maximum share of the image's area.
        numbers: 23 uniform numbers in [0, 1): two per attempt, two for the position, and one unused here.
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
    """Yield features [B, W] in float32, without gradient, and image indices [B] on ``device`` for each step.

    Args:
        backbone: module on ``device``, in eval mode; its class token is the row of features.

    Raises:
        InputError: an image is unreadable or its features are not finite; the message names it.
    """
    num_workers = fit_shared_memory(
        num_workers, sampler.batch_size, [views.transform.pixel_format.rgb_side(views.transform.crop)]
    )
    loader: DataLoader[Any] = DataLoader(
        views, None, sampler=sampler, num_workers=num_workers, prefetch_factor=PREFETCHED if num_workers else None,
        worker_init_fn=worker_init() if num_workers else None,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        pixels, indices = (part.to(device, non_blocking=True) for part in batch)
        with torch.no_grad():
            features = backbone(normalise(pixels, views.transform.mean, views.transform.std)).cls_token.float()
        refuse_not_finite(features.cpu().numpy(), views.source, batch[1].tolist())
        yield features, indices


def kept_features(
    epochs: Sequence[NDArray[Any]], sampler: StepSampler, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the same as :func:`live_features` from E cached ``epochs`` [n, W]."""
    for keys in sampler:
        chosen = np.array([index for _, index in keys], dtype=np.int64)
        rows = epochs[keys[0][0] % len(epochs)][chosen].astype(np.float32)
        parts = torch.from_numpy(rows), torch.from_numpy(chosen)
        if device.type == "cuda":  # a copy from pageable memory would wait for the device
            parts = parts[0].pin_memory(), parts[1].pin_memory()
        yield parts[0].to(device, non_blocking=True), parts[1].to(device, non_blocking=True)


def hold_out(labels: NDArray[np.int64], share: float, seed: int) -> NDArray[np.int64]:
    """Draw a share of each class's images and return their indices in ascending order.

    Each class keeps at least one image for training.

    Args:
        labels: [images].
        share: share of each class, 0 <= share < 1, rounded to whole images.
    """
    rng = np.random.default_rng([seed, 2])
    chosen = [
        rng.permutation(members)[: min(round(share * len(members)), len(members) - 1)]
        for members in (np.flatnonzero(labels == label) for label in np.unique(labels))
    ]
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)
