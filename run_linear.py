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

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_xcit import distributed
from dino_xcit.console import progress_bar
from dino_xcit.data.loader import StepSampler, choose_workers
from dino_xcit.errors import InputError
from eval.config import LinearConfig, settings
from eval.figures import figure
from eval.linear.cached import AugmentedEpochs, stored_features
from eval.linear.fixed_features import FixedFeatures
from eval.linear.heads import LinearHeads, cosine_factor, scaled
from eval.linear.imagenet_variants import measure, open_variant
from eval.linear.logistic_search import logistic_results, search
from eval.linear.pooled import Labelled, PooledBackbone
from eval.linear.probe_file import FILE_NAME, LOGREG_NAME, write_probe
from eval.linear.report import (
    Record,
    final_results,
    percentages,
    recommended,
    results_table,
    variants_table,
)
from eval.linear.setup import (
    Probe,
    for_image_size,
    identity_of,
    identity_of_logreg,
    labels_of,
    protocol_of,
    say_what_is_measured,
    stored_probe,
)
from eval.linear.views import frozen_features, hold_out, probe_batches
from eval.protocol import data_card, images_card, result_card, write_json
from eval.setup import beside_weights, cache_folder, labelled_parts, open_backbone


def main() -> None:
    """The whole measurement."""
    # ---- settings, backbone, data
    started = time.perf_counter()
    config = settings(LinearConfig, sys.argv[1:], "run_linear.py")
    loaded, device = open_backbone(config)
    transform, batch = loaded.transform, config.batch_size_per_gpu
    train, val = labelled_parts(config, loaded)
    variants = [open_variant(word, train, val) for word in config.also]
    config = for_image_size(config, transform.crop)
    sampler = StepSampler(
        len(train), batch, rank=distributed.rank(), world_size=distributed.world_size(), seed=config.seed
    )
    held = np.empty(0, dtype=np.int64)
    if config.lrs or config.logreg:
        held = hold_out(labels_of(train), config.holdout, config.seed)
        if config.holdout and not len(held):
            raise InputError(
                f"holdout is {config.holdout:g}, which is less than one image of any class of {train.url}: raise it, "
                "or --holdout 0 for the paper's learning rate alone"
            )
    pooled = PooledBackbone(loaded.backbone, config.features, transform.crop, device).eval()

    # ---- this probe, if it was begun before
    folder = beside_weights(config, config.output_dir, "linear")
    identity = identity_of(config, loaded, (train, val), sampler.global_batch)
    kept = cache_folder(config)
    if config.cached and kept is None:
        raise InputError("cached needs a folder to keep features in: give --cache-dir DIR, and no --no-cache")
    probe = Probe(config, loaded, pooled, device, train, val, held, sampler, folder, identity, kept, started)
    say_what_is_measured(probe)
    for notice in filter(None, (variant.notice() for variant in variants)):
        distributed.say(f"notice: {notice}")
    content = stored_probe(folder, identity, config.resume) if config.sgd else None
    of_logreg = identity_of_logreg(probe)
    stored_logreg = stored_probe(folder, of_logreg, config.resume, LOGREG_NAME) if config.logreg else None
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
        logreg = search(on_train, probe, of_logreg, stored_logreg)
        results["logreg"], hits = logistic_results(logreg, on_val, device)
        asked = {"classifier": "logreg", "features": " ".join(config.features), "cs": str(sorted(config.logreg_cs))}
        figures.append(figure("logreg, top-1", asked, hits).to_card())

    # ---- the recommended one on ImageNet's variants
    best = recommended(results, content, logreg) if distributed.is_main() else None
    also: Record = {}
    for variant in variants:
        found = fixed.rows(variant.source or val)
        if best:
            rows = pooled.seen_by(best.features, found.features)
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
        write_json(
            Path(config.json).expanduser(),
            _card(probe, results, figures, seconds) | {"history": content.get("history", [])},
        )
        distributed.say(f"written: {config.json}")
    distributed.say(f"classifier: {folder / (LOGREG_NAME if best.name == 'logreg' else FILE_NAME)} ({best.name})")


def train_heads(probe: Probe, stored: Record | None, on_held: Labelled, on_val: Labelled) -> Record:
    """The paper's classifier and the grid, from the start or from where this probe stopped.

    Returns:
        What linear.pth holds in the end; on other processes than the main one, nothing.
    """
    # ---- classifiers, new or from where this probe stopped
    config, sampler, device, epochs = probe.config, probe.sampler, probe.device, probe.config.epochs
    widths, columns = probe.pooled.widths, probe.pooled.columns
    own = [scaled(config.lr, sampler.global_batch)]
    paper = LinearHeads(own, probe.classes, widths["cls"], config.seed, device)
    rates = [scaled(lr, sampler.global_batch) for lr in probe.lrs]
    grids = {
        name: LinearHeads(rates, probe.classes, widths[name], config.seed, device, standardise=on_held.rows[name])
        for name in config.features
        if rates
    }
    history: list[Record] = []
    best: NDArray[np.bool_] | None = None  # [validation images]: was the paper's classifier right in its best epoch?
    done, spent = 0, 0.0
    if stored:
        paper.load_state_dict(stored["paper"])
        for name, heads in grids.items():
            heads.load_state_dict((stored["grid"] or {}).get(name, {}))
        done, history, spent = int(stored["epoch"]), list(stored["history"]), float(stored["seconds"])
        kept = stored.get("best_hits")  # a probe of before they were kept has none
        best = None if kept is None else kept.numpy()
        distributed.say(f"resuming {probe.folder} after epoch {done}")

    # ---- the loop
    sampler.start_step, sampler.stop_step = done * sampler.steps_per_epoch, epochs * sampler.steps_per_epoch
    batches = _batches(probe)
    labels = torch.from_numpy(labels_of(probe.train)).to(device)
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
                own_loss = paper.step(features[:, columns["cls"]], labels[chosen], everything, factor)
                loss += own_loss / sampler.steps_per_epoch
                for name, heads in grids.items():
                    heads.step(features[:, columns[name]], labels[chosen], for_grid[chosen], factor)
                bar.update(sampler.global_batch)
            if not distributed.is_main():
                continue
            mean = loss.item()
            if not math.isfinite(mean):
                raise InputError(f"lr {config.lr:g} is too high: the loss is {mean} in epoch {epoch + 1}; lower it")
            hits = paper.hits(on_val.rows["cls"], on_val.labels, [0])
            top1, top5 = percentages(hits)[0]
            if top1 > max((float(record["top1"]) for record in history), default=-1.0):  # the first of equals stays
                best = hits[0, 0]
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
                "best_hits": None if best is None else torch.from_numpy(best),
                "classes": list(probe.train.classes) if probe.train.classes else None,
                "seconds": spent + time.perf_counter() - probe.started,
            }
            if epoch + 1 == epochs:
                content |= final_results(config.lr, paper, probe.lrs, grids, history, on_held, on_val, best)
            write_probe(probe.folder, content, probe.identity)
    return content


def _batches(probe: Probe) -> Iterator[tuple[Tensor, Tensor]]:
    """Features [B, W] and indices [B] of the training images of each step, as they come or from those kept."""
    config, sampler, device, transform = probe.config, probe.sampler, probe.device, probe.loaded.transform
    if not config.cached:
        workers = choose_workers(config.num_workers, distributed.processes_here())
        views = probe_batches(probe.train, transform.crop, config.crop_scale, sampler, workers, device)
        return frozen_features(probe.pooled, views, transform, device)
    assert probe.kept is not None
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


def _card(probe: Probe, results: Record, figures: list[dict[str, object]], seconds: float) -> dict[str, object]:
    """The result file's content, but for the history."""
    data = {
        name: data_card(part, probe.identity[name]) | images_card(part)
        for name, part in (("train", probe.train), ("val", probe.val))
    }
    loaded = probe.loaded
    protocol = protocol_of(probe)
    return result_card("linear", protocol, results, loaded, data, loaded.transform, probe.device, seconds, figures)


def command() -> None:
    """The console entry."""
    distributed.run_command(main)


if __name__ == "__main__":
    command()
