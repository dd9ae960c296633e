"""The crops of a step: the same bytes for every pipeline. B batch, V views."""

from __future__ import annotations

import numpy as np
import torch
from step_settings import Settings
from torch import Tensor

from dino_xcit.transform import IMAGENET_MEAN, IMAGENET_STD, normalise


def draw_crops(settings: Settings, number: int) -> list[Tensor]:
    """Noise: what the loader would hand over for step ``number``.

    Returns:
        One tensor a crop size, [views of that size * B, 3, size, size] uint8, view-major, on the CPU; pinned where a
        GPU waits for them.
    """
    rng = np.random.default_rng([number, settings.batch])
    crops = [
        torch.from_numpy(rng.integers(0, 256, (views * settings.batch, 3, size, size), dtype=np.uint8))
        for views, size in settings.groups
    ]
    return [crop.pin_memory() for crop in crops] if settings.device == "cuda" else crops


def normalised(crops: list[Tensor]) -> list[Tensor]:
    """The same in float32, as the loaders of the reference and of most others hand crops over; pinned alike."""
    floats = [normalise(crop, IMAGENET_MEAN, IMAGENET_STD) for crop in crops]
    return [new.pin_memory() if old.is_pinned() else new for new, old in zip(floats, crops, strict=True)]


def view_by_view(crops: list[Tensor], settings: Settings) -> list[Tensor]:
    """V tensors [B, 3, size, size], as the reference wants them."""
    views = [view for crop in crops for view in crop.split(settings.batch)]
    return [view.contiguous() for view in views]
