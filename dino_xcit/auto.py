"""Recipe ``auto``: settings that follow from the number and the size of the images, the batch and the length of a run.

From :data:`IMAGENET` images on they are DINO's, except for the crops of small images. Measured with benchmarks/auto.py;
docs/log.md has the figures.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

from dino_xcit.bounds import shown
from dino_xcit.config import PretrainConfig
from dino_xcit.data import Source
from dino_xcit.data.decode import UndecodableImage, image_size
from dino_xcit.data.source import evenly_spaced
from dino_xcit.errors import InputError
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.transform import RGB, PixelFormat

IMAGENET = 1_000_000
"""Number of images from which on DINO's own settings apply."""
IMAGES_SEEN = 1_000_000
"""Least length of a run in images, up to :data:`MAX_EPOCHS`."""
MAX_EPOCHS = 1000
ADAPTED = (
    "global_crops_size", "local_crops_size", "local_crops_number", "epochs", "warmup_epochs", "freeze_last_layer",
    "saveckp_freq", "out_dim", "centering", "koleo_weight", "momentum_teacher", "lr",
)  # fmt: skip
"""All settings of the rule."""


class Choice(NamedTuple):
    """Settings of one subject, and the reason for them."""

    subject: str
    settings: dict[str, Any]
    why: str


def adapt(
    config: PretrainConfig, source: Source, given: Collection[str], stored: Mapping[str, Any]
) -> tuple[PretrainConfig, dict[str, Any]]:
    """Fit all settings but those in ``given`` to the images, and log them. Must be called on every rank.

    Args:
        stored: settings of the run that resumes, which keeps them; empty for a new run.

    Returns:
        The settings of the run, and those of the rule.
    """
    if stored:
        rule = {name: stored[name] for name in ADAPTED if name in stored}
        log.info("the settings that recipe auto adapts are those of the checkpoint")
    else:
        side = distributed.on_main(partial(median_side, source, config.pixel_format))
        global_batch = config.batch_size_per_gpu * config.accumulation_steps * distributed.world_size()
        found = choices(config, len(source), side, global_batch, given)
        rule = {name: value for choice in found for name, value in choice.settings.items()}
        log.info("\n".join(_line(choice, config, given) for choice in found))
    return dataclasses.replace(config, **{name: value for name, value in rule.items() if name not in given}), rule


def _line(choice: Choice, config: PretrainConfig, given: Collection[str]) -> str:
    values = [
        f"{name} {shown(getattr(config, name))} as given" if name in given else f"{name} {shown(value)}"
        for name, value in choice.settings.items()
    ]
    return f"  {choice.subject:11}{', '.join(values)}" + (
        "" if set(choice.settings) <= set(given) else f": {choice.why}"
    )


def median_side(source: Source, format: PixelFormat = RGB) -> int:
    """Return the median of the shorter sides of 15 images in pixels; all ranks must get the same.

    Raises:
        InputError: none of them can be read.
    """
    sides, problems, chosen = [], [], evenly_spaced(len(source), 15)
    for index in chosen:
        try:
            sides.append(min(image_size(source, index, format)))
        except UndecodableImage as error:  # reported where it is used
            problems.append(f"{source.name(index)} ({error.cause})")
    if not sides:
        raise InputError(f"none of {len(chosen)} images of {source.url} can be read, such as {problems[0]}")
    return int(statistics.median(sides))


def choices(config: PretrainConfig, images: int, side: int, batch: int, given: Collection[str] = ()) -> list[Choice]:
    """Return the rule's settings.

    Args:
        images: number of training images.
        side: their median shorter side in pixels.
        batch: images per step.
        given: settings that stay; ``epochs`` and ``global_crops_size`` in it determine others.
    """
    large = config.global_crops_size if "global_crops_size" in given else _large_crop(side)
    sizes: dict[str, Any] = {
        "global_crops_size": large,
        "local_crops_size": min(large, max(16, round(large * 3 / 7 / 16) * 16)),
        "local_crops_number": 8 if large >= 64 else 2,
    }
    crops = Choice("crops", sizes, f"the shorter side of the images is about {side} pixels")
    if images >= IMAGENET:
        return [crops]
    epochs = min(MAX_EPOCHS, max(config.epochs, math.ceil(IMAGES_SEEN / images)))
    if config.init_weights:
        epochs = math.ceil(epochs / 4)
    if "epochs" in given:
        epochs = config.epochs
    steps = epochs * max(1, images // batch)
    length = {
        "epochs": epochs,
        "warmup_epochs": min(config.warmup_epochs, epochs / 10),
        "freeze_last_layer": min(config.freeze_last_layer, epochs // 10),
        "saveckp_freq": max(config.saveckp_freq, epochs // 5),
    }
    found = [crops, Choice("length", length, f"{images:,} images, {steps:,} steps")]
    if config.method == "dino":
        prototypes = {
            "out_dim": _prototypes(images),
            "centering": "sinkhorn_knopp",
            "koleo_weight": 0.1 if config.batch_size_per_gpu > 1 else 0.0,
        }
        found.append(Choice("prototypes", prototypes, "about a sixteenth of the images, evenly used"))
    momentum = min(0.996, max(0.98, 1 - 0.2 * steps ** (-1 / 3)), max(0.5, 1 - 10 / steps))
    found.append(Choice("teacher", {"momentum_teacher": round(momentum, 4)}, "short runs need a teacher that follows"))
    if config.optimizer != "adamw":  # not measured
        return found
    peak = 2e-3 * math.sqrt(min(1.0, batch / 1024))  # 2e-3 is DINO's at 1,024 images
    lr = peak * (config.lr_reference_batch / batch if config.lr_reference_batch else 1)
    found.append(Choice("rate", {"lr": float(f"{lr:.3g}")}, f"a peak of {peak:.2g} for a batch of {batch:,}"))
    return found


def _large_crop(side: int) -> int:
    """Return DINO's 224, or less for smaller images: a multiple of 16 from 32 pixels on."""
    return min(PretrainConfig.global_crops_size, side // 16 * 16 if side >= 32 else side)


def _prototypes(images: int) -> int:
    """Return a power of two: images / 16, up to DINO's 65,536, but at least 1,024 if there are as many images."""
    least = min(1024, 2 ** int(math.log2(max(2, images))))
    return int(min(65536, max(least, 2 ** round(math.log2(images / 16)))))
