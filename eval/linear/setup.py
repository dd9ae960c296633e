"""What one linear probe measures, on what, and what there is of it already: everything before the first image.

W features of a row (:mod:`eval.linear.pooled`).
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dino_xcit.data import Source
from dino_xcit.data.loader import StepSampler
from dino_xcit.errors import InputError
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.weights import LoadedBackbone
from eval.config import PAPER_CROP_SCALE, PAPER_EPOCHS, SMALL_CROP, SMALL_CROP_SCALE, SMALL_EPOCHS, LinearConfig
from eval.linear.heads import bytes_of_heads
from eval.linear.identity import identity_of
from eval.linear.imagenet_variants import Variant, open_variant
from eval.linear.pooled import PooledBackbone
from eval.linear.probe_file import Settings, demand_folder, read_probe
from eval.linear.report import Record
from eval.linear.views import hold_out
from eval.setup import beside_weights, cache_folder, labelled_parts, open_backbone


@dataclass(frozen=True)
class Probe:
    """What is measured, on what, and where it is kept."""

    config: LinearConfig
    """With nothing left open."""
    loaded: LoadedBackbone
    pooled: PooledBackbone
    """``loaded``'s backbone, giving a row of all that the choices of features need."""
    device: torch.device
    train: Source
    val: Source
    variants: list[Variant]
    """Of ImageNet's validation images, on which the recommended classifier is measured too."""
    held: NDArray[np.int64]
    """Indices of the training images on which classifiers are chosen."""
    sampler: StepSampler
    folder: Path
    """Of linear.pth and logreg.pth."""
    identity: Settings
    kept: Path | None
    """Where features are kept; None: nowhere."""
    started: float
    """When, by time.perf_counter."""

    @property
    def classes(self) -> int:
        """How many there are."""
        return len(self.train.classes) if self.train.classes else int(np.max(labels_of(self.train))) + 1

    @property
    def lrs(self) -> list[float]:
        """The grid, ascending; empty where nothing is held out to choose on."""
        return sorted(self.config.lrs) if len(self.held) else []

    @property
    def row(self) -> str:
        """Identifies what makes a row of an image."""
        return self.loaded.hash + self.pooled.identity


def open_probe(config: LinearConfig) -> Probe:
    """Open the backbone and all images, and see that they fit each other.

    Raises:
        InputError: something that was given cannot be used; before any image is looked at.
    """
    started = time.perf_counter()
    loaded, device = open_backbone(config)
    train, val = labelled_parts(config, loaded)
    variants = [open_variant(word, train, val) for word in config.also]
    config = for_image_size(config, loaded.transform.crop)
    rank, world = distributed.rank(), distributed.world_size()
    sampler = StepSampler(len(train), config.batch_size_per_gpu, rank=rank, world_size=world, seed=config.seed)
    held = _held_out(config, train)
    pooled = PooledBackbone(loaded.backbone, config.features, loaded.transform.crop, device).eval()
    folder = beside_weights(config, config.output_dir, "linear")
    kept = cache_folder(config)
    if config.cached and kept is None:
        raise InputError("cached needs a folder to keep features in: give --cache-dir DIR")
    identity = identity_of(config, loaded, (train, val), sampler.global_batch)
    return Probe(
        config, loaded, pooled, device, train, val, variants, held, sampler, folder, identity, kept, started
    )  # fmt: skip


def for_image_size(config: LinearConfig, crop: int) -> LinearConfig:
    """The settings with what was left open filled in: as published, or what suits small pictures and a CPU."""
    small = crop <= SMALL_CROP
    epochs = config.epochs or (SMALL_EPOCHS if small else PAPER_EPOCHS)
    scale = config.crop_scale if any(config.crop_scale) else (SMALL_CROP_SCALE if small else PAPER_CROP_SCALE)
    chosen = dataclasses.replace(config, epochs=epochs, crop_scale=scale)
    if chosen != config and config.sgd:
        why = f"suits images of {crop} pixels; published: {PAPER_EPOCHS}, 0.08 1" if small else "as published"
        log.info(f"epochs {epochs}, crop scale {scale[0]:g} {scale[1]:g} ({why}; --epochs, --crop-scale)")
    return chosen


def _held_out(config: LinearConfig, train: Source) -> NDArray[np.int64]:
    """Indices of the training images on which classifiers are chosen; none where there is no choice."""
    if not config.holdout or not (config.lrs or config.logreg):
        return np.empty(0, dtype=np.int64)
    held = hold_out(labels_of(train), config.holdout, config.seed)
    if not len(held):
        raise InputError(
            f"holdout is {config.holdout:g}, which is less than one image of any class of {train.url}: raise it, "
            "or --holdout 0 for the paper's learning rate alone"
        )
    return held


def say_what_is_measured(probe: Probe) -> None:
    """On which images, by how many classifiers, and what those take."""
    config, widths, steps = probe.config, probe.pooled.widths, probe.sampler.steps_per_epoch
    kind = "linear probe" if config.sgd else "logistic regression"
    text = (
        f"{kind}: {len(probe.train):,} training images of {probe.train.url}, {len(probe.val):,} validation "
        f"images of {probe.val.url}"
    )
    if config.sgd:
        text += (
            f"; {config.epochs} epochs of {steps} steps at batch {probe.sampler.global_batch}; the paper's learning "
            f"rate and a grid of {len(probe.lrs)}"
        )
    if config.features != ("cls",):
        sizes = [bytes_of_heads(len(probe.lrs), probe.classes, widths[name]) for name in config.features]
        text += " x {" + ", ".join(f"{name} ({widths[name]:,} features)" for name in config.features) + "}"
        text += f", {sum(sizes) / 2**20:,.1f} MiB while they learn" if config.sgd else ""
    log.info(text)
    for variant in probe.variants:
        if notice := variant.notice():
            log.warning(notice)


def stored_probe(probe: Probe, identity: Settings, name: str) -> Record | None:
    """What the probe's folder holds of it, on every process alike; and where that is nothing, a folder to write to.

    Args:
        identity: of what is kept under ``name``.

    Raises:
        InputError: it holds another one, it cannot be written to, or not all processes see the same.
    """
    refusal, content = None, None
    try:
        if probe.config.resume == "auto":
            content = read_probe(probe.folder, identity, name)
        if content is None and distributed.is_main():
            demand_folder(probe.folder)
    except InputError as error:
        refusal = str(error)
    refusal = distributed.broadcast_from_main(refusal)
    if refusal:
        raise InputError(refusal)
    # One that starts anew beside one that goes on would wait for it for ever.
    if len(set(distributed.gather_objects(content is None))) > 1:
        raise InputError(f"not all processes see {probe.folder / name}: name an --output-dir that all can see")
    return content


def labels_of(source: Source) -> NDArray[np.int64]:
    """[n] of a source that has labels."""
    assert source.labels is not None
    return np.asarray(source.labels)
