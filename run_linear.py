"""Measure a frozen backbone by linear classifiers: DINO's published protocol, and a grid of learning rates beside it.

    python run_linear.py --weights runs/sample-xcit_pico_4_p4/checkpoint.pth
    torchrun --nproc-per-node 8 run_linear.py --weights ckpt.pth --data-path /data/imagenet
    python run_linear.py --weights ckpt.pth --features cls cls+mean last4 --cached --logreg

All classifiers learn from the same forward pass. The one with the paper's learning rate learns from every training
image. Those of the grid get standardised features and leave out a held-out part of the training images, on which the
best of them is chosen, so that the validation images choose nothing. So is the logistic regression's C.

Read top to bottom: settings, data, fixed features, classifiers, report; then the loop that trains them.
"""

from __future__ import annotations

# Before torch: it decides how threads wait for each other.
import dino_xcit  # noqa: F401  # isort: skip

import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_xcit import distributed
from dino_xcit.console import progress_bar
from dino_xcit.data import Source
from dino_xcit.data.loader import StepSampler, choose_workers
from dino_xcit.errors import InputError
from dino_xcit.weights import LoadedBackbone
from eval.cached_probe import AugmentedEpochs, stored_features
from eval.config import (
    PAPER_CROP_SCALE,
    PAPER_EPOCHS,
    SMALL_CROP,
    SMALL_CROP_SCALE,
    SMALL_EPOCHS,
    LinearConfig,
    settings,
)
from eval.figures import figure
from eval.fixed_features import FixedFeatures
from eval.imagenet_variants import measure, open_variant
from eval.linear import LinearHeads, bytes_of_heads, cosine_factor, scaled
from eval.linear_report import (
    PROTOCOL,
    Record,
    final_results,
    percentages,
    recommended,
    results_table,
    variants_table,
)
from eval.logistic_search import logistic_results, search
from eval.pooled import Labelled, PooledBackbone, Rows
from eval.probe_data import frozen_features, hold_out, probe_batches
from eval.probe_file import FILE_NAME, LOGREG_NAME, Settings, read_probe, write_probe
from eval.protocol import data_card, images_card, result_card, write_json
from eval.setup import beside_weights, cache_folder, labelled_parts, open_backbone


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
        return len(self.train.classes) if self.train.classes else int(np.max(_labels(self.train))) + 1

    @property
    def lrs(self) -> list[float]:
        """The grid, ascending; empty where nothing is held out to choose on."""
        return sorted(self.config.lrs) if len(self.held) else []


def main() -> None:
    """The whole measurement."""
    # ---- settings, backbone, data
    started = time.perf_counter()
    config = settings(LinearConfig, sys.argv[1:], "run_linear.py")
    loaded, device = open_backbone(config)
    transform, batch = loaded.transform, config.batch_size_per_gpu
    train, val = labelled_parts(config, loaded)
    variants = [open_variant(word, train, val) for word in config.also]
    config = _for_image_size(config, transform.crop)
    sampler = StepSampler(
        len(train), batch, rank=distributed.rank(), world_size=distributed.world_size(), seed=config.seed
    )
    held = np.empty(0, dtype=np.int64)
    if config.lrs or config.logreg:
        held = hold_out(_labels(train), config.holdout, config.seed)
        if config.holdout and not len(held):
            raise InputError(
                f"holdout is {config.holdout:g}, which is less than one image of any class of {train.url}: raise it, "
                "or --holdout 0 for the paper's learning rate alone"
            )
    pooled = PooledBackbone(loaded.backbone, config.features, transform.crop, device).eval()

    # ---- this probe, if it was begun before
    folder = beside_weights(config, config.output_dir, "linear")
    identity = _identity(config, loaded, (train, val), sampler.global_batch)
    kept = cache_folder(config)
    probe = Probe(config, loaded, pooled, device, train, val, held, sampler, folder, identity, kept, started)
    _say_what_is_measured(probe)
    for notice in filter(None, (variant.notice() for variant in variants)):
        distributed.say(f"notice: {notice}")
    content = _stored_probe(folder, identity, config.resume) if config.sgd else None
    complete = not config.sgd or bool(content and content.get("results"))
    if complete and config.sgd:
        distributed.say(f"already complete: {folder / FILE_NAME} holds this probe (--resume never repeats it)")

    # ---- fixed features: validation images, and the held-out ones as they are prepared for evaluation
    row = loaded.hash + pooled.identity
    fixed = FixedFeatures(pooled, row, transform, device, probe.kept, batch, config.num_workers)
    on_val = None if complete and not config.logreg else fixed.labelled(val)
    on_train = fixed.labelled(train) if config.logreg else None
    on_held = None if complete else fixed.some(train, held, identity["train"])

    # ---- classifiers: by SGD on augmented images, then logistic regressions
    if on_val and on_held:
        content = train_heads(probe, content, on_held, on_val)
    content = content or {}
    results, figures = dict(content.get("results", {})), list(content.get("figures", ()))
    logreg = None
    if on_val and on_train:
        identity = _identity_of_logreg(probe)
        stored = _stored_probe(folder, identity, config.resume, LOGREG_NAME)
        logreg = search(
            on_train, held, probe.classes, config.logreg_cs, config.logreg_iterations, device, folder, identity, stored
        )
        results["logreg"], hits = logistic_results(logreg, on_val, device)
        asked = {"classifier": "logreg", "features": " ".join(config.features), "cs": str(sorted(config.logreg_cs))}
        figures.append(figure("logreg, top-1", asked, hits).to_card())

    # ---- the recommended one on ImageNet's variants
    best = recommended(results, content, logreg) if distributed.is_main() else None
    also: Record = {}
    for variant in variants:
        found = fixed.rows(variant.source or val)
        if best:
            rows = Rows(found.features, pooled.widths[best.features])
            data = {"labels": variant.fingerprint} | data_card(variant.source or val, found.fingerprint)
            also[variant.name] = measure(variant, rows, best.weight, best.bias, device) | {"data": data}

    # ---- report
    if best is None:
        return
    distributed.say(results_table(results, config.lrs, config.logreg_cs))
    if also:
        distributed.say(variants_table(also, best))
        results["also"] = {"classifier": best.name, "features": best.features, **also}
    if config.json:
        seconds = sum(float(part["seconds"]) for part in (content, logreg or {}) if part)
        write_json(Path(config.json), _card(probe, results, figures, seconds) | {"history": content.get("history", [])})
        distributed.say(f"written: {config.json}")
    distributed.say(f"classifier: {folder / (LOGREG_NAME if best.name == 'logreg' else FILE_NAME)} ({best.name})")


def train_heads(probe: Probe, stored: Record | None, on_held: Labelled, on_val: Labelled) -> Record:
    """The paper's classifier and the grid, from the start or from where this probe stopped.

    Returns:
        What linear.pth holds in the end; on other processes than the main one, nothing.
    """
    # ---- classifiers, new or from where this probe stopped
    config, sampler, device, epochs = probe.config, probe.sampler, probe.device, probe.config.epochs
    widths = probe.pooled.widths
    own = [scaled(config.lr, sampler.global_batch)]
    paper = LinearHeads(own, probe.classes, widths["cls"], config.seed, device)
    rates = [scaled(lr, sampler.global_batch) for lr in probe.lrs]
    grids = {
        name: LinearHeads(rates, probe.classes, widths[name], config.seed, device, standardise=on_held.rows[name])
        for name in config.features
        if rates
    }
    history: list[Record] = []
    done, spent = 0, 0.0
    if stored:
        paper.load_state_dict(stored["paper"])
        for name, heads in grids.items():
            heads.load_state_dict(stored["grid"][name])
        done, history, spent = int(stored["epoch"]), list(stored["history"]), float(stored["seconds"])
        distributed.say(f"resuming {probe.folder} after epoch {done}")

    # ---- the loop
    sampler.start_step, sampler.stop_step = done * sampler.steps_per_epoch, epochs * sampler.steps_per_epoch
    batches = _batches(probe)
    labels = torch.from_numpy(_labels(probe.train)).to(device)
    for_grid = torch.ones(len(probe.train), device=device)
    for_grid[torch.from_numpy(probe.held).to(device)] = 0
    everything = torch.ones(config.batch_size_per_gpu, device=device)
    content: Record = {}
    images = sampler.steps_per_epoch * sampler.global_batch
    with progress_bar(epochs * images, "probe", shown=distributed.is_main(), done=done * images) as bar:
        for epoch in range(done, epochs):
            loss = torch.zeros(1, device=device)
            factor = cosine_factor(epoch, epochs)
            for _ in range(sampler.steps_per_epoch):
                features, chosen = next(batches)
                own_loss = paper.step(features[:, : widths["cls"]], labels[chosen], everything, factor)
                loss += own_loss / sampler.steps_per_epoch
                for name, heads in grids.items():
                    heads.step(features[:, : widths[name]], labels[chosen], for_grid[chosen], factor)
                bar.update(sampler.global_batch)
            if not distributed.is_main():
                continue
            mean = loss.item()
            if not math.isfinite(mean):
                raise InputError(f"lr {config.lr:g} is too high: the loss is {mean} in epoch {epoch + 1}; lower it")
            top1, top5 = percentages(paper.hits(on_val.rows["cls"], on_val.labels, [0]))[0]
            history.append(
                {"epoch": epoch + 1, "loss": mean, "top1": top1, "top5": top5 if probe.classes > 5 else None}
            )
            bar.clear()
            distributed.say(f"epoch {epoch + 1}/{epochs}: loss {mean:.4f}, top-1 {top1:.2f} with the paper's lr")
            content = {
                "epoch": epoch + 1,
                "paper": paper.state_dict(),
                "grid": {name: heads.state_dict() for name, heads in grids.items()},
                "history": history,
                "classes": list(probe.train.classes) if probe.train.classes else None,
                "seconds": spent + time.perf_counter() - probe.started,
            }
            if epoch + 1 == epochs:
                content |= final_results(config.lr, paper, probe.lrs, grids, history, on_held, on_val)
            write_probe(probe.folder, content, probe.identity)
    return content


def _batches(probe: Probe) -> Iterator[tuple[Tensor, Tensor]]:
    """Features [B, W] and indices [B] of the training images of each step, as they come or from those kept."""
    config, sampler, device, transform = probe.config, probe.sampler, probe.device, probe.loaded.transform
    if not config.cached:
        workers = choose_workers(config.num_workers, distributed.processes_here())
        views = probe_batches(probe.train, transform.crop, config.crop_scale, sampler, workers, device)
        return frozen_features(probe.pooled, views, transform, device)
    if probe.kept is None:
        raise InputError("cached needs a folder to keep features in: give --cache-dir DIR, and no --no-cache")
    epochs = AugmentedEpochs(
        probe.kept,
        probe.train,
        probe.identity["train"],
        probe.loaded.hash + probe.pooled.identity,
        transform,
        config.crop_scale,
        config.seed,
        probe.pooled.embed_dim,
        config.cached_precision,
    )
    count = min(config.cached_epochs, config.epochs)
    kept = epochs.make(count, probe.pooled, device, config.batch_size_per_gpu, config.num_workers)
    return stored_features(kept, sampler, device)


def _labels(source: Source) -> NDArray[np.int64]:
    assert source.labels is not None
    return np.asarray(source.labels)


def _say_what_is_measured(probe: Probe) -> None:
    config, widths, steps = probe.config, probe.pooled.widths, probe.sampler.steps_per_epoch
    text = (
        f"linear probe: {len(probe.train):,} training images of {probe.train.url}, {len(probe.val):,} validation "
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
        text += f", {sum(sizes) / 2**30:.2f} GiB while they learn" if config.sgd else ""
    distributed.say(text)


def _for_image_size(config: LinearConfig, crop: int) -> LinearConfig:
    """The settings with what was left open filled in: as published, or what suits small pictures and a CPU."""
    small = crop <= SMALL_CROP
    epochs = config.epochs or (SMALL_EPOCHS if small else PAPER_EPOCHS)
    scale = config.crop_scale if any(config.crop_scale) else (SMALL_CROP_SCALE if small else PAPER_CROP_SCALE)
    chosen = dataclasses.replace(config, epochs=epochs, crop_scale=scale)
    if chosen != config:
        why = f"suits images of {crop} pixels; published: {PAPER_EPOCHS}, 0.08 1" if small else "as published"
        distributed.say(f"epochs {epochs}, crop scale {scale[0]:g} {scale[1]:g} ({why}; --epochs, --crop-scale)")
    return chosen


def _identity(
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


def _identity_of_logreg(probe: Probe) -> Settings:
    """All that decides a logistic regression: neither augmentation nor validation images."""
    config = probe.config
    shared = {name: probe.identity[name] for name in ("weights", "train", "transform", "holdout", "seed")}
    cs, features = sorted(config.logreg_cs), list(config.features)
    return shared | {"features": features, "cs": cs, "iterations": config.logreg_iterations}


def _stored_probe(folder: Path, identity: Settings, resume: str, name: str = FILE_NAME) -> Record | None:
    """What ``folder`` holds of this probe, on every process alike."""
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


def _card(probe: Probe, results: Record, figures: list[dict[str, object]], seconds: float) -> dict[str, object]:
    """The result file's content, but for the history."""
    not_protocol = ("weights", "train", "val", "transform")
    protocol = {
        "name": PROTOCOL,
        "published": {"epochs": PAPER_EPOCHS, "crop_scale": list(PAPER_CROP_SCALE)},
        **{name: value for name, value in probe.identity.items() if name not in not_protocol},
    }
    data = {
        name: data_card(part, probe.identity[name]) | images_card(part)
        for name, part in (("train", probe.train), ("val", probe.val))
    }
    loaded = probe.loaded
    return result_card("linear", protocol, results, loaded, data, loaded.transform, probe.device, seconds, figures)


def command() -> None:
    """The console entry."""
    distributed.run_command(main)


if __name__ == "__main__":
    command()
