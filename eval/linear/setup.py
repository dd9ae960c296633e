"""What one linear probe measures, and how it is told from others.

W features of a row (:mod:`eval.linear.pooled`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dino_xcit import distributed
from dino_xcit.data import Source
from dino_xcit.data.loader import StepSampler
from dino_xcit.errors import InputError
from dino_xcit.weights import LoadedBackbone
from eval.config import PAPER_CROP_SCALE, PAPER_EPOCHS, SMALL_CROP, SMALL_CROP_SCALE, SMALL_EPOCHS, LinearConfig
from eval.linear.heads import bytes_of_heads
from eval.linear.logistic import GAP
from eval.linear.pooled import PooledBackbone
from eval.linear.probe_file import FILE_NAME, Settings, read_probe
from eval.linear.report import GRID, LOGREG, SGD, Record


@dataclass(frozen=True)
class Probe:
    """What is measured, on what, and where it is kept."""

    config: LinearConfig
    loaded: LoadedBackbone
    pooled: PooledBackbone
    """``loaded``'s backbone, giving a row of all that the choices of features need."""
    device: torch.device
    train: Source
    val: Source
    held: NDArray[np.int64]
    """Indices of the training images on which classifiers are chosen."""
    sampler: StepSampler
    folder: Path
    identity: Settings
    kept: Path | None
    """Where features are kept."""
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


def for_image_size(config: LinearConfig, crop: int) -> LinearConfig:
    """The settings with what was left open filled in: as published, or what suits small pictures and a CPU."""
    small = crop <= SMALL_CROP
    epochs = config.epochs or (SMALL_EPOCHS if small else PAPER_EPOCHS)
    scale = config.crop_scale if any(config.crop_scale) else (SMALL_CROP_SCALE if small else PAPER_CROP_SCALE)
    chosen = dataclasses.replace(config, epochs=epochs, crop_scale=scale)
    if chosen != config and config.sgd:
        why = f"suits images of {crop} pixels; published: {PAPER_EPOCHS}, 0.08 1" if small else "as published"
        distributed.say(f"epochs {epochs}, crop scale {scale[0]:g} {scale[1]:g} ({why}; --epochs, --crop-scale)")
    return chosen


def identity_of(
    config: LinearConfig, loaded: LoadedBackbone, parts: tuple[Source, Source], global_batch: int
) -> Settings:
    """All that decides what the classifiers learn."""
    # Only one process looks at every file.
    train, val = (distributed.main_decides(p.fingerprint() if distributed.is_main() else None) or "" for p in parts)
    transform = {name: list(v) if isinstance(v, tuple) else v for name, v in loaded.transform.to_dict().items()}
    identity = {
        "weights": loaded.hash,
        "train": train,
        "val": val,
        "transform": transform,
        "epochs": config.epochs,
        "batch": global_batch,
        "lr": config.lr,
        "lrs": sorted(config.lrs),
        "holdout": config.holdout,
        "crop_scale": list(config.crop_scale),
        "seed": config.seed,
    }
    # Not named where they are as they were before there was a choice: what was measured then stays comparable.
    if config.features != ("cls",):
        identity["features"] = list(config.features)
    if config.cached:
        identity["cached"] = f"{min(config.cached_epochs, config.epochs)} epochs, {config.cached_precision}"
    return identity


def identity_of_logreg(probe: Probe) -> Settings:
    """All that decides a logistic regression: neither augmentation nor validation images."""
    config = probe.config
    shared = {name: probe.identity[name] for name in ("weights", "train", "transform", "holdout", "seed")}
    cs, features = sorted(config.logreg_cs), list(config.features)
    # Those from before there was a bound on the gap called some converged that were not: they are told from these.
    return shared | {"features": features, "cs": cs, "iterations": config.logreg_iterations, "gap": GAP}


def protocol_of(probe: Probe) -> Settings:
    """For the result file: name and settings of the classifiers that were trained, and of no others."""
    config, identity = probe.config, probe.identity
    shared = ["holdout", "seed", "features"]
    of_sgd = ["epochs", "batch", "lr", "lrs", "crop_scale", "cached"]
    regression = {"cs": sorted(config.logreg_cs), "iterations": config.logreg_iterations, "gap": GAP}
    chosen = {name: identity[name] for name in (of_sgd if config.sgd else []) + shared if name in identity}
    if not config.sgd:
        return {"name": LOGREG, **chosen, **regression}
    published = {"epochs": PAPER_EPOCHS, "crop_scale": list(PAPER_CROP_SCALE)}
    protocol = {"name": SGD + (GRID if probe.lrs else ""), "published": published, **chosen}
    return protocol | ({"logreg": {"name": LOGREG, **regression}} if config.logreg else {})


def stored_probe(folder: Path, identity: Settings, resume: str, name: str = FILE_NAME) -> Record | None:
    """What ``folder`` holds of this probe, on every process alike.

    Raises:
        InputError: it holds another one.
    """
    if resume == "never":
        return None
    refusal, content = None, None
    try:
        content = read_probe(folder, identity, name)
    except InputError as error:
        refusal = str(error)
    refusal = distributed.main_decides(refusal)
    if refusal:
        raise InputError(refusal)
    return content


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
    distributed.say(text)


def labels_of(source: Source) -> NDArray[np.int64]:
    """[n] of a source that has labels."""
    assert source.labels is not None
    return np.asarray(source.labels)
