"""The classifiers of a probe that learn by SGD on augmented images: the paper's, and the grid beside it.

Resumable: linear.pth is written after each epoch, and the order of the images, their views and the steps follow from
the settings and the epoch alone.

B batch, W features of a row (:mod:`eval.linear.pooled`), n training images.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_xcit.data.workers import choose_workers
from dino_xcit.errors import InputError
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import progress_bar
from eval.linear.cached import AugmentedEpochs, stored_features
from eval.linear.heads import LinearHeads, cosine_factor, scaled
from eval.linear.pooled import Labelled
from eval.linear.probe_file import write_probe
from eval.linear.report import Record, final_results, percentages
from eval.linear.setup import Probe, labels_of
from eval.linear.views import frozen_features, probe_batches


def train_heads(probe: Probe, stored: Record | None, held: Labelled, val: Labelled) -> Record:
    """Train from the start, or from where this probe stopped, to the last epoch.

    Args:
        stored: what linear.pth holds of an earlier run.
        held: the training images on which the grid is chosen.
        val: the validation images.

    Returns:
        What linear.pth holds in the end; on other processes than the main one, nothing.
    """
    sampler, epochs = probe.sampler, probe.config.epochs
    heads, progress = _Heads(probe, held), _Progress(probe, val)
    done = 0
    if stored:
        heads.load(stored)
        progress.load(stored)
        done = int(stored["epoch"])
        log.info(f"resuming {probe.folder} after epoch {done}")
    sampler.start_step, sampler.stop_step = done * sampler.steps_per_epoch, epochs * sampler.steps_per_epoch
    batches = _batches(probe)
    images = sampler.steps_per_epoch * sampler.global_batch
    content: Record = {}
    with progress_bar(epochs * images, "probe", shown=distributed.is_main(), done=done * images) as bar:
        for epoch in range(done, epochs):
            loss = torch.zeros(1, device=probe.device)
            for _ in range(sampler.steps_per_epoch):
                loss += heads.step(*next(batches), cosine_factor(epoch, epochs)) / sampler.steps_per_epoch
                bar.update(sampler.global_batch)
            if distributed.is_main():
                bar.clear()
                progress.measure(epoch, loss.item(), heads.paper)
                content = heads.state_dict() | progress.to_record(epoch)
                if epoch + 1 == epochs:
                    content |= final_results(
                        probe.config.lr, heads.paper, probe.lrs, heads.grids, progress.history, held, val,
                        progress.best_hits,
                    )  # fmt: skip
                write_probe(probe.folder, content, probe.identity)
    return content


class _Heads:
    """All classifiers, which learn from the same rows."""

    def __init__(self, probe: Probe, held: Labelled) -> None:
        """New ones. The grid's input is standardised as the held-out images' features are."""
        config, device, batch = probe.config, probe.device, probe.sampler.global_batch
        widths, self._columns = probe.pooled.widths, probe.pooled.columns
        self.paper = LinearHeads([scaled(config.lr, batch)], probe.classes, widths["cls"], config.seed, device)
        rates = [scaled(lr, batch) for lr in probe.lrs]
        self.grids = {
            name: LinearHeads(rates, probe.classes, widths[name], config.seed, device, standardise=held.rows[name])
            for name in config.features
            if rates
        }
        """For each choice of features, a classifier a learning rate."""
        self._labels = torch.from_numpy(labels_of(probe.train)).to(device)
        self._for_grid = torch.ones(len(probe.train), device=device)  # [n] of 0 and 1
        self._for_grid[torch.from_numpy(probe.held).to(device)] = 0
        self._for_paper = torch.ones(config.batch_size_per_gpu, device=device)

    def step(self, features: Tensor, chosen: Tensor, lr_factor: float) -> Tensor:
        """One step of each on the rows [B, W] of the training images ``chosen`` [B]; the paper's loss [1]."""
        labels = self._labels[chosen]
        loss = self.paper.step(features[:, self._columns["cls"]], labels, self._for_paper, lr_factor)
        for name, heads in self.grids.items():
            heads.step(features[:, self._columns[name]], labels, self._for_grid[chosen], lr_factor)
        return loss

    def state_dict(self) -> Record:
        """For linear.pth."""
        return {
            "paper": self.paper.state_dict(),
            "grid": {name: heads.state_dict() for name, heads in self.grids.items()},
        }

    def load(self, stored: Record) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            InputError: parts are missing or have other shapes.
        """
        self.paper.load_state_dict(stored["paper"])
        for name, heads in self.grids.items():
            heads.load_state_dict((stored["grid"] or {}).get(name, {}))


class _Progress:
    """What became of the paper's classifier, epoch by epoch."""

    def __init__(self, probe: Probe, val: Labelled) -> None:
        self._probe, self._val = probe, val
        self._spent = 0.0
        self.history: list[Record] = []
        """A record an epoch: ``epoch`` (from 1), ``loss``, ``top1``, ``top5``."""
        self.best_hits: NDArray[np.bool_] | None = None
        """[validation images]: was it right in its best epoch? None where that epoch was trained before they were
        kept."""

    def measure(self, epoch: int, loss: float, paper: LinearHeads) -> None:
        """Measure the classifier after a 0-based epoch, and say so.

        Raises:
            InputError: its loss is not finite.
        """
        config, five = self._probe.config, self._probe.classes > 5
        if not math.isfinite(loss):
            raise InputError(f"lr {config.lr:g} is too high: the loss is {loss} in epoch {epoch + 1}; lower it")
        hits = paper.hits(self._val.rows["cls"], self._val.labels, [0])
        top1, top5 = percentages(hits)[0]
        if top1 > max((float(record["top1"]) for record in self.history), default=-1.0):  # the first of equals stays
            self.best_hits = hits[0, 0]
        self.history.append({"epoch": epoch + 1, "loss": loss, "top1": top1, "top5": top5 if five else None})
        log.info(f"epoch {epoch + 1}/{config.epochs}: loss {loss:.4f}, top-1 {top1:.2f} with the paper's lr")

    def to_record(self, epoch: int) -> Record:
        """For linear.pth, after a 0-based epoch."""
        classes = self._probe.train.classes
        return {
            "epoch": epoch + 1,
            "history": self.history,
            "best_hits": None if self.best_hits is None else torch.from_numpy(self.best_hits),
            "classes": list(classes) if classes else None,
            "seconds": self._spent + time.perf_counter() - self._probe.started,
        }

    def load(self, stored: Record) -> None:
        """The inverse of :meth:`to_record`."""
        self.history, self._spent = list(stored["history"]), float(stored["seconds"])
        hits = stored.get("best_hits")  # a probe of before they were kept has none
        self.best_hits = None if hits is None else hits.numpy()


def _batches(probe: Probe) -> Iterator[tuple[Tensor, Tensor]]:
    """Features [B, W] and indices [B] of the training images of each step, as they come or from those kept."""
    config, transform, device = probe.config, probe.loaded.transform, probe.device
    if not config.cached:
        workers = choose_workers(config.num_workers, distributed.processes_here())
        views = probe_batches(probe.train, transform.crop, config.crop_scale, probe.sampler, workers, device)
        return frozen_features(probe.pooled, views, transform, device)
    assert probe.kept is not None  # open_probe sees to that
    kept = AugmentedEpochs(
        probe.kept,
        probe.train,
        probe.identity["train"],
        probe.row,
        transform,
        config.crop_scale,
        config.seed,
        probe.pooled.embed_dim,
        config.cached_precision,
    )
    count = min(config.cached_epochs, config.epochs)
    epochs = kept.make(count, probe.pooled, device, config.batch_size_per_gpu, config.num_workers)
    return stored_features(epochs, probe.sampler, device)
