"""Measure a frozen backbone by a linear probe: DINO's published protocol, and a grid of learning rates beside it.

    python run_linear.py --weights runs/sample-xcit_pico_4_p4/checkpoint.pth
    torchrun --nproc-per-node 8 run_linear.py --weights ckpt.pth --data-path /data/imagenet

All classifiers learn from the same forward pass. The one with the paper's learning rate learns from every training
image. Those of the grid get standardised features and leave out a held-out part of the training images, on which the
best of them is chosen, so that the validation images choose nothing.

Read top to bottom: settings, data, fixed features, classifiers, loop, report.
"""

from __future__ import annotations

# Before torch: it decides how threads wait for each other.
import dino_xcit  # noqa: F401  # isort: skip

import dataclasses
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from dino_xcit import distributed
from dino_xcit.console import progress_bar
from dino_xcit.data import Source, Subset
from dino_xcit.data.loader import StepSampler, choose_workers
from dino_xcit.errors import InputError
from dino_xcit.transform import normalise
from dino_xcit.weights import LoadedBackbone
from eval.config import (
    PAPER_CROP_SCALE,
    PAPER_EPOCHS,
    SMALL_CROP,
    SMALL_CROP_SCALE,
    SMALL_EPOCHS,
    LinearConfig,
    settings,
)
from eval.features import cached, find_kept, width_of
from eval.linear import LinearHeads, cosine_factor, scaled
from eval.linear_report import PROTOCOL, Record, final_results, percentages, results_table
from eval.probe_data import hold_out, probe_batches
from eval.probe_file import FILE_NAME, Settings, read_probe, write_probe
from eval.protocol import data_card, images_card, result_card, write_json
from eval.setup import beside_weights, cache_folder, labelled_parts, open_backbone


def main() -> None:
    """The whole measurement."""
    # ---- settings, backbone, data
    started = time.perf_counter()
    config = settings(LinearConfig, sys.argv[1:], "run_linear.py")
    loaded, device = open_backbone(config)
    backbone, transform = loaded.backbone, loaded.transform
    train, val = labelled_parts(config, loaded)
    assert train.labels is not None
    assert val.labels is not None
    config = _for_image_size(config, transform.crop)
    epochs = config.epochs
    batch, rank, world = config.batch_size_per_gpu, distributed.rank(), distributed.world_size()
    sampler = StepSampler(len(train), batch, rank=rank, world_size=world, seed=config.seed)
    held = hold_out(train.labels, config.holdout, config.seed) if config.lrs else np.empty(0, dtype=np.int64)
    lrs = sorted(config.lrs) if len(held) else []
    if config.holdout and config.lrs and not len(held):
        raise InputError(
            f"holdout is {config.holdout:g}, which is less than one image of any class of {train.url}: raise it, or "
            "--holdout 0 for the paper's learning rate alone"
        )
    distributed.say(
        f"linear probe: {len(train):,} training images of {train.url}, {len(val):,} validation images of {val.url}; "
        f"{epochs} epochs of {sampler.steps_per_epoch} steps at batch {sampler.global_batch}; the paper's learning "
        f"rate and a grid of {len(lrs)}"
    )

    # ---- this probe, if it was begun before
    folder = beside_weights(config, config.output_dir, "linear")
    identity = _identity(config, loaded, (train, val), sampler.global_batch)
    stored = _stored_probe(folder, identity, config.resume)
    if stored and stored.get("results"):
        distributed.say(f"already complete: {folder / FILE_NAME} holds this probe (--resume never repeats it)")
        _report(config, loaded, (train, val), identity, stored, device)
        return

    # ---- fixed features: validation images, and the held-out ones as they are prepared for evaluation
    kept = cache_folder(config)
    val_features = cached(backbone, loaded.hash, val, transform, device, kept, batch, config.num_workers).features
    held_features = np.empty((0, width_of(backbone)), dtype=np.float32)
    if len(held):
        whole = find_kept(loaded.hash, identity["train"], (len(train), width_of(backbone)), transform, kept)
        part = Subset(train, held)
        held_features = (
            cached(backbone, loaded.hash, part, transform, device, kept, batch, config.num_workers).features
            if distributed.main_decides("no" if whole is None else None)
            else np.asarray(whole)[held]
        )

    # ---- classifiers, new or from where this probe stopped
    classes = len(train.classes) if train.classes else int(np.max(train.labels)) + 1
    shape = (classes, width_of(backbone))
    paper = LinearHeads([scaled(config.lr, sampler.global_batch)], *shape, config.seed, device)
    grid = None
    if lrs:
        rates = [scaled(lr, sampler.global_batch) for lr in lrs]
        grid = LinearHeads(rates, *shape, config.seed, device, standardise=held_features)
    history: list[Record] = []
    done, spent = 0, 0.0
    if stored:
        paper.load_state_dict(stored["paper"])
        if grid:
            grid.load_state_dict(stored["grid"])
        done, history, spent = int(stored["epoch"]), list(stored["history"]), float(stored["seconds"])
        distributed.say(f"resuming {folder} after epoch {done}")

    # ---- the loop
    sampler.start_step, sampler.stop_step = done * sampler.steps_per_epoch, epochs * sampler.steps_per_epoch
    workers = choose_workers(config.num_workers, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    loader = probe_batches(train, transform.crop, config.crop_scale, sampler, workers, device)
    labels = torch.from_numpy(np.asarray(train.labels)).to(device)
    for_grid = torch.ones(len(train), device=device)
    for_grid[torch.from_numpy(held).to(device)] = 0
    everything = torch.ones(batch, device=device)
    images = sampler.steps_per_epoch * sampler.global_batch
    with progress_bar(epochs * images, "probe", shown=distributed.is_main(), done=done * images) as bar:
        for epoch in range(done, epochs):
            loss = torch.zeros(1, device=device)
            factor = cosine_factor(epoch, epochs)
            for _ in range(sampler.steps_per_epoch):
                cropped = next(loader)
                chosen = cropped.indices.to(device, non_blocking=True)
                pixels = cropped.images.to(device, non_blocking=True)
                with torch.no_grad():
                    features = backbone(normalise(pixels, transform.mean, transform.std)).cls_token.float()
                loss += paper.step(features, labels[chosen], everything, factor) / sampler.steps_per_epoch
                if grid:
                    grid.step(features, labels[chosen], for_grid[chosen], factor)
                bar.update(sampler.global_batch)
            if not distributed.is_main():
                continue
            if not torch.isfinite(loss):
                raise InputError(
                    f"lr {config.lr:g} is too high: the loss is {loss.item()} in epoch {epoch + 1}; lower it"
                )
            top1, top5 = percentages(paper.hits(val_features, val.labels, [0]))[0]
            history.append(
                {"epoch": epoch + 1, "loss": loss.item(), "top1": top1, "top5": top5 if classes > 5 else None}
            )
            bar.clear()
            distributed.say(f"epoch {epoch + 1}/{epochs}: loss {loss.item():.4f}, top-1 {top1:.2f} with the paper's lr")
            content: Record = {
                "epoch": epoch + 1,
                "paper": paper.state_dict(),
                "grid": grid.state_dict() if grid else None,
                "history": history,
                "classes": list(train.classes) if train.classes else None,
                "seconds": spent + time.perf_counter() - started,
            }
            if epoch + 1 == epochs:
                held_out, validation = (held_features, train.labels[held]), (val_features, val.labels)
                content |= final_results(config.lr, paper, lrs, grid, history, held_out, validation)
            write_probe(folder, content, identity)

    # ---- report
    if distributed.is_main():
        _report(config, loaded, (train, val), identity, content, device)
        distributed.say(f"classifier: {folder / FILE_NAME}")


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
    return {
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


def _stored_probe(folder: Path, identity: Settings, resume: str) -> Record | None:
    """What ``folder`` holds of this probe, on every process alike."""
    if resume == "never":
        return None
    refusal, content = None, None
    try:
        content = read_probe(folder, identity)
    except InputError as error:
        refusal = str(error)
    refusal = distributed.main_decides(refusal)
    if refusal:
        raise InputError(refusal)
    return content


def _report(
    config: LinearConfig,
    loaded: LoadedBackbone,
    parts: tuple[Source, Source],
    identity: Settings,
    content: Record,
    device: torch.device,
) -> None:
    """The figures on the screen and in a file."""
    if not distributed.is_main():
        return
    distributed.say(results_table(content["results"], config.lrs))
    if config.json:
        protocol = {
            "name": PROTOCOL,
            "published": {"epochs": PAPER_EPOCHS, "crop_scale": list(PAPER_CROP_SCALE)},
            **{name: identity[name] for name in ("epochs", "batch", "lr", "lrs", "holdout", "crop_scale", "seed")},
        }
        data = {
            name: data_card(part, identity[name]) | images_card(part)
            for name, part in zip(("train", "val"), parts, strict=True)
        }
        results, figures, seconds = content["results"], content.get("figures", ()), float(content["seconds"])
        card = result_card("linear", protocol, results, loaded, data, loaded.transform, device, seconds, figures)
        write_json(Path(config.json), card | {"history": content["history"]})
        distributed.say(f"written: {config.json}")


def command() -> None:
    """The console entry."""
    distributed.run_command(main)


if __name__ == "__main__":
    command()
