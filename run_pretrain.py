"""Pretrain an XCiT without labels: DINO, from the first image to the last checkpoint.

    python run_pretrain.py                                              the embedded sample, minutes on a CPU
    torchrun --nproc-per-node 8 run_pretrain.py --data-path /data/imagenet/train --arch xcit_small_12_p16

Read top to bottom: settings, data, networks, resume, loop.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dino_xcit import checkpoint, distributed
from dino_xcit.cli import parse_pretrain
from dino_xcit.config import PretrainConfig, differences
from dino_xcit.data import Source, open_parts, open_source
from dino_xcit.data.loader import StepSampler, build_loader, choose_workers
from dino_xcit.errors import InputError, run_main
from dino_xcit.metrics import MetricsWriter, Progress, draw_curves
from dino_xcit.train import Schedules, TrainState, build_state, choose_precision, train_step

Evaluate = Callable[[TrainState], dict[str, float]]


def main() -> None:
    """The whole run."""
    # ---- settings, processes
    config, first_line = parse_pretrain(sys.argv[1:])
    device = distributed.choose_device(config.device)
    distributed.start(device)
    say = print if distributed.is_main() else _silent
    say(first_line, flush=True)
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    else:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")

    # ---- data: in which order which process sees which images follows from (seed, step) alone
    source = open_source(config.data_path, "train")
    sampler = StepSampler(
        len(source),
        config.batch_size_per_gpu,
        config.accumulation_steps,
        distributed.rank(),
        distributed.world_size(),
        config.seed,
    )
    schedules = Schedules.of(config, sampler.steps_per_epoch, sampler.global_batch)
    total_steps = config.epochs * sampler.steps_per_epoch
    stop_step = min(total_steps, config.max_steps or total_steps)
    evaluate = _online_knn(config, source, device)

    # ---- student and teacher, new or from where this run stopped
    state = build_state(config, device)
    _resume(state, config)
    say(
        f"{len(source):,} images from {source.url}; {config.arch}, "
        f"{sum(p.numel() for p in state.student.backbone.parameters()) / 1e6:.2f} M parameters; {distributed.world_size()} "
        f"process(es) on {device.type}, {str(choose_precision(config.precision, device)).removeprefix('torch.')}; "
        f"global batch {sampler.global_batch}; {config.epochs} epochs of {sampler.steps_per_epoch} steps"
    )
    if schedules.notice:
        say(f"notice: {schedules.notice}")
    if state.step >= stop_step:
        say(f"already complete: step {state.step} of {stop_step} in {config.output_dir}; nothing to do")
        return
    if state.step:
        say(f"resuming {config.output_dir} after step {state.step}")

    # ---- the loop
    sampler.start_step, sampler.stop_step = state.step, stop_step
    workers = choose_workers(config.num_workers, _processes_here())
    loader = build_loader(source, config.augmentation(), sampler, config.seed, workers, device)
    folder = Path(config.output_dir)
    metrics = MetricsWriter(folder, state.step) if distributed.is_main() else None
    progress = Progress(stop_step, state.step, sampler.global_batch, shown=distributed.is_main())
    epoch_sums: dict[str, float] = {}
    logged = 0
    while state.step < stop_step:
        epoch = state.step // sampler.steps_per_epoch
        waiting = time.perf_counter()
        batches = list(itertools.islice(loader, config.accumulation_steps))
        waited = time.perf_counter() - waiting
        result = train_step(state, batches, schedules, config)
        progress.step(waited)
        epoch_ends = state.step % sampler.steps_per_epoch == 0
        run_ends = state.step == stop_step

        if state.step % config.log_every == 0 or state.step == 1 or epoch_ends or run_ends:
            teacher_temp = schedules.teacher_temp.at(epoch)
            figures = {"loss": result.loss, **result.statistics(state.loss, teacher_temp)}
            values = {name: float(value) for name, value in figures.items()}  # this is a CPU-GPU sync point
            for name, value in values.items():
                epoch_sums[name] = epoch_sums.get(name, 0.0) + value
            logged += 1
            values |= progress.rates()
            progress.show(epoch, values)
            values |= {
                "gradient_norm": float(result.gradient_norm),
                "lr": schedules.lr.at(state.step - 1),
                "weight_decay": schedules.weight_decay.at(state.step - 1),
                "momentum": schedules.momentum.at(state.step - 1),
                "teacher_temp": teacher_temp,
                "rejected_steps": float(state.rejected),
            }
            if metrics:
                metrics.write("step", state.step, {"epoch": epoch, **_finite_or_text(values)})

        save_now = epoch_ends or run_ends or (config.save_every and state.step % config.save_every == 0)
        if save_now and distributed.is_main():
            numbered = epoch_ends and config.saveckp_freq > 0 and (epoch + 1) % config.saveckp_freq == 0
            checkpoint.save(state, config, sampler.steps_per_epoch, numbered)

        if epoch_ends or run_ends:
            summary = {name: total / logged for name, total in epoch_sums.items()}
            if evaluate and config.knn_every and ((epoch + 1) % config.knn_every == 0 or run_ends):
                summary |= evaluate(state)
            line = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in summary.items())
            progress.say(f"epoch {epoch + 1}/{config.epochs}: {line}")
            if metrics:
                metrics.write("epoch", state.step, {"epoch": epoch, **_finite_or_text(summary)})
                draw_curves(metrics.path, folder / "curves.png")
            epoch_sums, logged = {}, 0
        if save_now:
            progress.pause()
    progress.close()
    if metrics:
        metrics.close()
    say(f"done: {folder / checkpoint.LATEST}; measure it with: python run_knn.py --weights {folder / checkpoint.LATEST}")


def _resume(state: TrainState, config: PretrainConfig) -> None:
    """Load the checkpoint of this run if there is one; refuse to carry on, or to overwrite, another run."""
    path = Path(config.output_dir) / checkpoint.LATEST
    refusal = None
    if distributed.is_main():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            refusal = f"cannot create the output directory {path.parent}: {error.strerror}"
    if config.resume != "never" and path.exists():
        content = checkpoint.read(path)
        changed = differences(dict(content.get("args", {})), config)
        if "args" not in content:
            refusal = f"{path} is not a checkpoint of run_pretrain.py: choose another --output-dir"
        elif changed and config.resume == "auto":
            refusal = (
                f"{path.parent} holds another run ({'; '.join(changed[:4])}{'; ...' if len(changed) > 4 else ''}): choose "
                "another --output-dir, or --resume changed to carry on with the new settings, or --resume never to "
                "overwrite it"
            )
        else:
            checkpoint.restore(state, content, path)
    refusal = distributed.main_decides(refusal)
    if refusal:
        raise InputError(refusal)


def _online_knn(config: PretrainConfig, source: Source, device: torch.device) -> Evaluate | None:
    """The k-NN while training, as a plain function, so that dino_xcit need not know how anything is measured."""
    if not config.knn_every:
        return None
    from eval.features import extract
    from eval.knn import accuracy, knn_predict

    if config.knn_holdout:
        if source.labels is None:
            raise InputError(f"knn_holdout is {config.knn_holdout}, but {source.url} has no labels")
        train, val = _hold_out(source, config.knn_holdout, config.seed)
    else:
        train, val = open_parts(config.data_path, config.train_data or None, config.val_data or None)
    if len(train) > config.knn_max_images:
        train = _evenly(train, config.knn_max_images)
    transform = config.eval_transform()

    def evaluate(state: TrainState) -> dict[str, float]:
        backbone = state.teacher.backbone
        parts = [extract(backbone, part, transform, device, progress=False) for part in (train, val)]
        backbone.train()
        k = min(20, len(train))
        predicted = knn_predict(parts[0].features, parts[0].labels, parts[1].features, [k], [0.07])[k, 0.07]
        return {"knn_top1": accuracy(predicted, parts[1].labels, 1)}

    return evaluate


def _evenly(source: Source, count: int) -> Source:
    from dino_xcit.data import Subset

    return Subset(source, np.linspace(0, len(source) - 1, count).astype(np.int64))


def _hold_out(source: Source, count: int, seed: int) -> tuple[Source, Source]:
    from dino_xcit.data import Subset

    order = np.random.default_rng([seed, 1]).permutation(len(source))
    return Subset(source, np.sort(order[count:])), Subset(source, np.sort(order[:count]))


def _processes_here() -> int:
    import os

    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _finite_or_text(values: dict[str, float]) -> dict[str, float | str]:
    """JSON has no NaN: write it as a word."""
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}


def _silent(*_: object, **__: object) -> None:
    """What the other processes print."""


if __name__ == "__main__":
    try:
        run_main(main)
    finally:
        distributed.stop()
