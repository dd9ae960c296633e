"""Setup of a linear probe: backbone, data, settings, and the files that store its progress.

W features of a row (:mod:`eval.linear.pooled`), n images.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dino_xcit import safe_load
from dino_xcit.data import Source, Subset
from dino_xcit.data.loader import StepSampler
from dino_xcit.errors import InputError
from dino_xcit.runtime import atomic, distributed
from eval.config import PAPER_CROP_SCALE, PAPER_EPOCHS, SMALL_CROP, SMALL_CROP_SCALE, SMALL_EPOCHS, LinearConfig
from eval.features import Features, cached
from eval.linear.imagenet_variants import open_variant
from eval.linear.pooled import PooledBackbone, Rows
from eval.linear.views import hold_out
from eval.setup import beside_weights, cache_folder, demand_writable, labelled_parts, open_backbone

FORMAT = "dino-xcit-linear-2"
FILE_NAME = "linear.pth"
LOGREG_NAME = "logreg.pth"
GAP = 1e-3
"""Maximum relative excess of a logistic regression's objective over its minimum."""

SGD = (
    "linear probe on the frozen class token, SGD with momentum 0.9, no weight decay, cosine by epoch, "
    "RandomResizedCrop (bilinear) and flip (DINO, arXiv 2104.14294)"
)
GRID = "; beside it a grid of learning rates on standardised features, chosen on held-out training images"
LOGREG = "multinomial logistic regression with an L2 penalty, by L-BFGS on features of unaugmented images"

Record = dict[str, Any]
Settings = dict[str, Any]
"""Plain values that determine the training; two probes are the same if these are equal."""


class Probe:
    """Backbone, images, settings and files of a linear probe. All ranks must call its methods in the same order."""

    def __init__(self, config: LinearConfig) -> None:
        """Open backbone and data, and check the settings before any image is read.

        Raises:
            InputError: a setting, the weights or the data are invalid.
        """
        self.started = time.perf_counter()
        self.loaded, self.device = open_backbone(config, rgb=False)
        self.transform = self.loaded.transform
        self.train, self.val = labelled_parts(config, self.loaded)
        self.variants = [open_variant(word, self.train, self.val) for word in config.also]
        self.config = config = for_image_size(config, self.transform.crop)
        self.labels = np.asarray(self.train.labels)
        self.classes = len(self.train.classes) if self.train.classes else int(self.labels.max()) + 1
        rank, world = distributed.rank(), distributed.world_size()
        batch = config.batch_size_per_gpu if config.sgd else 1  # logistic regression has no batches
        self.sampler = StepSampler(len(self.train), batch, 1, rank, world, config.seed)
        share = config.holdout if config.lrs or config.logreg else 0.0
        self.held = hold_out(self.labels, share, config.seed)
        """Indices of the held-out training images."""
        if share and not len(self.held):
            raise InputError(
                f"holdout is {share:g}, which is less than one image of any class of {self.train.url}: raise it, "
                "or give --holdout 0 for the paper's learning rate only"
            )
        self.held_source = Subset(self.train, self.held)
        self.lrs = sorted(config.lrs) if len(self.held) else []
        self.pooled = PooledBackbone(
            self.loaded.backbone, config.features, self.transform.crop, self.device, config.precision,
            self.transform.channels,
        ).eval()  # fmt: skip
        self.row_hash = self.loaded.hash + self.pooled.identity
        self.folder = beside_weights(config, config.output_dir, "linear")
        self.cache = cache_folder(config)
        if config.cached and self.cache is None:
            raise InputError("cached needs a writable feature cache: give --cache-dir DIR")
        self.identity = self._identity()
        self._features: dict[int, Features] = {}

    def _identity(self) -> Settings:
        """Return the settings that determine the classifiers trained by SGD and their evaluation."""
        config = self.config
        train, val = (distributed.on_main(part.fingerprint) for part in (self.train, self.val))
        transform = {name: list(v) if isinstance(v, tuple) else v for name, v in self.transform.to_dict().items()}
        identity = {
            "weights": self.loaded.hash, "train": train, "val": val, "transform": transform, "epochs": config.epochs,
            "batch": self.sampler.global_batch, "lr": config.lr, "lrs": sorted(config.lrs), "holdout": config.holdout,
            "crop_scale": list(config.crop_scale), "seed": config.seed,
        }  # fmt: skip
        # Defaults are omitted, so that probes from before these settings existed remain comparable.
        if config.features != ("cls",):
            identity["features"] = list(config.features)
        if config.precision != "fp32":
            identity["precision"] = config.precision
        if config.cached:
            identity["cached"] = f"{min(config.cached_epochs, config.epochs)} epochs, {config.cached_precision}"
        return identity

    def identity_of_logreg(self) -> Settings:
        """Return the settings that determine the logistic regression."""
        names = ("weights", "train", "transform", "holdout", "seed", "precision")
        shared = {name: self.identity[name] for name in names if name in self.identity}
        cs, iterations = sorted(self.config.logreg_cs), self.config.logreg_iterations
        return shared | {"features": list(self.config.features), "cs": cs, "iterations": iterations, "gap": GAP}

    def protocol(self) -> Settings:
        """Return name and settings of the trained classifiers for the result file."""
        of_sgd = ("epochs", "batch", "lr", "lrs", "crop_scale", "cached") if self.config.sgd else ()
        names = (*of_sgd, "holdout", "seed", "features", "precision")
        chosen = {name: self.identity[name] for name in names if name in self.identity}
        regression = {name: self.identity_of_logreg()[name] for name in ("cs", "iterations", "gap")}
        if not self.config.sgd:
            return {"name": LOGREG, **chosen, **regression}
        published = {"epochs": PAPER_EPOCHS, "crop_scale": list(PAPER_CROP_SCALE)}
        protocol = {"name": SGD + (GRID if self.lrs else ""), "published": published, **chosen}
        return protocol | ({"logreg": {"name": LOGREG, **regression}} if self.config.logreg else {})

    def features(self, source: Source) -> Features:
        """Extract the features [n, W] of a source of this probe, once."""
        config = self.config
        if id(source) not in self._features:  # ids are unique, as the probe keeps its sources alive
            self._features[id(source)] = cached(
                self.pooled, self.row_hash, source, self.transform, self.device, self.cache,
                config.batch_size_per_gpu, config.num_workers,
            )  # fmt: skip
        return self._features[id(source)]

    def rows(self, source: Source) -> dict[str, Rows]:
        """Return :meth:`features` by choice of features."""
        matrix = self.features(source).features
        return {name: Rows(matrix, columns) for name, columns in self.pooled.columns.items()}

    def stored(self, name: str, identity: Settings) -> Record | None:
        """Read the file ``name`` in the probe's folder, on rank 0 for all ranks; None if absent.

        Raises:
            InputError: the file holds another probe, or it is absent and not writable.
        """
        path, content = self.folder / name, None
        if self.config.resume == "auto":
            content = distributed.on_main(partial(read_probe, path, identity))
        if content is None:
            demand_writable({"output_dir": str(path)})
        return content

    def write(self, name: str, content: Mapping[str, Any], identity: Settings) -> None:
        """Write the file ``name`` atomically on rank 0."""
        if distributed.is_main():
            atomic.write_torch(self.folder / name, {"format": FORMAT, "settings": identity, **content})


def for_image_size(config: LinearConfig, crop: int) -> LinearConfig:
    """Resolve defaults: the published protocol, or a shorter one for small images on a CPU."""
    small = crop <= SMALL_CROP
    epochs = config.epochs or (SMALL_EPOCHS if small else PAPER_EPOCHS)
    scale = config.crop_scale if any(config.crop_scale) else (SMALL_CROP_SCALE if small else PAPER_CROP_SCALE)
    return dataclasses.replace(config, epochs=epochs, crop_scale=scale)


def read_probe(path: Path, identity: Settings) -> Record | None:
    """Read the probe in a file; None if absent.

    Raises:
        InputError: the file holds another probe or is no probe.
    """
    if not path.exists():
        return None
    remedy = "choose another --output-dir, or --resume never to overwrite it"
    try:
        content = safe_load.read(path)
    except InputError as error:
        raise InputError(f"{error}; {remedy}") from error
    then = content.get("settings")
    if content.get("format") != FORMAT or not isinstance(then, Mapping):
        raise InputError(f"{path} is no linear probe: {remedy}")
    names = sorted(name for name in then.keys() | identity.keys() if then.get(name) != identity.get(name))
    if names:
        changed = "; ".join(f"{name} {then.get(name)!s:.40} -> {identity.get(name)!s:.40}" for name in names[:4])
        raise InputError(f"{path} holds another probe ({changed}): {remedy}")
    return content
