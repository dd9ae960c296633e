"""Small data sets, a synthetic backbone and a small checkpoint for the tests of the evaluators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tiny_run import CPU, save, tiny_config
from torch import Tensor, nn

from dino_xcit.data import ArraySource
from dino_xcit.models import BackboneOutput
from dino_xcit.train import build_state
from dino_xcit.transform import EvalTransform

CLASSES = ("bars", "dots", "waves")
SMALL = EvalTransform(resize=8, crop=8, interpolation="bilinear")


class MeanColours(nn.Module):
    """Backbone with simple features: the mean of each channel, and of the left and right half of the image.

    ``seen`` counts the images that it received.
    """

    embed_dim = 5

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, images: Tensor) -> BackboneOutput:
        assert not self.training
        self.seen += len(images)
        half = images.shape[3] // 2
        halves = torch.stack([images[..., :half].mean(dim=(1, 2, 3)), images[..., half:].mean(dim=(1, 2, 3))], dim=1)
        features = torch.cat([images.mean(dim=(2, 3)), halves], dim=1)
        return BackboneOutput(features, images.flatten(2).transpose(1, 2), (images.shape[2], images.shape[3]))


def noise_source(
    count: int, seed: int = 0, size: int = 8, classes: int = 3, kind: type[ArraySource] = ArraySource
) -> ArraySource:
    """Make noise images whose brightness determines the class, in random order of classes."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % classes).astype(np.int64)
    base = (40 + 170 * labels / max(1, classes - 1))[:, None, None, None]
    pixels = base + rng.normal(0, 12, (count, size, size, 3))
    names = tuple(f"class {number}" for number in range(classes))
    return kind(f"made-up:{count}/{seed}", pixels.clip(0, 255).astype(np.uint8), labels, names)


def unit(rows: NDArray[np.floating]) -> NDArray[np.float64]:
    wide = np.asarray(rows, dtype=np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


def _picture(name: str, rng: np.random.Generator) -> Image.Image:
    """Draw the pattern of a class on 40 x 32 pixels, with random colours and a random offset."""
    rows, columns = np.mgrid[0:32, 0:40]
    place = rng.integers(0, 8)
    pattern = {
        "bars": ((columns + place) // 5) % 2,
        "dots": (((columns + place) % 10 - 5) ** 2 + ((rows + place) % 10 - 5) ** 2 < 10) * 1,
        "waves": (np.sin((rows + columns + place) / 4) + 1) / 2,
    }[name]
    low, high = rng.uniform(0, 90, 3), rng.uniform(150, 255, 3)
    return Image.fromarray((low + pattern[..., None] * (high - low)).astype(np.uint8))


def image_tree(folder: Path, train: int = 8, val: int = 3) -> Path:
    """Write ``train`` and ``val`` JPEG and PNG images per class to ``folder``/{train,val}/{bars,dots,waves}."""
    rng = np.random.default_rng(7)
    for part, count in (("train", train), ("val", val)):
        for name in CLASSES:
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                suffix = "png" if number % 2 else "jpg"
                _picture(name, rng).save(folder / part / name / f"{name} {number:02d}.{suffix}")
    return folder


def tiny_checkpoint(folder: Path, data: Path | str, seed: int = 0) -> Path:
    """Save checkpoint.pth and backbone.pth of a run at step 0."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(data_path=str(data), output_dir=str(folder), out_dim=16, seed=seed)
    return save(build_state(config, CPU), config, steps_per_epoch=1)
