"""Pretrain an XCiT without labels: DINO, from the first image to the last checkpoint.

    python run_pretrain.py                                              the embedded sample, minutes on a CPU
    torchrun --nproc-per-node 8 run_pretrain.py --data-path /data/imagenet/train --arch xcit_small_12_p16

Read it from top to bottom: settings, data, networks, resume, loop.
"""

from __future__ import annotations

# Before torch: it decides how threads wait for each other.
import dino_xcit  # noqa: F401  # isort: skip

import itertools
import os
import sys
import time
from pathlib import Path

import torch

from dino_xcit import checkpoint, distributed
from dino_xcit.cli import parse_pretrain
from dino_xcit.config import PretrainConfig, differences
from dino_xcit.data import open_source
from dino_xcit.data.loader import StepSampler, build_loader, choose_workers
from dino_xcit.errors import InputError
from dino_xcit.metrics import EpochAverages, MetricsWriter, Progress, draw_curves
from dino_xcit.train import Schedules, TrainState, build_state, choose_precision, train_step
from eval.online import online_knn


def main() -> None:
    """The whole run."""
    # ---- settings and processes
    config, first_line = parse_pretrain(sys.argv[1:])
    device = distributed.choose_device(config.device)
    distributed.start(device)
    distributed.say(first_line)
    _choose_kernels(config)

    # ---- data: which process sees which images in which step follows from the seed alone
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
    evaluate = online_knn(config, source, device)

    # ---- student and teacher, new or from where this run stopped
    state = build_state(config, device)
    _resume(state, config, sampler.steps_per_epoch)
    sampler.start_step = state.step
    sampler.stop_step = min(total_steps, config.max_steps or total_steps)
    distributed.say(
        f"{len(source):,} images from {source.url}; {config.arch} "
        f"({sum(p.numel() for p in state.student.backbone.parameters()) / 1e6:.2f} M parameters); "
        f"{distributed.world_size()} process(es) on {device.type} in "
        f"{str(choose_precision(config.precision, device)).removeprefix('torch.')}; global batch "
        f"{sampler.global_batch}; {config.epochs} epochs of {sampler.steps_per_epoch} steps; "
        f"writing {config.output_dir}"
    )
    if schedules.notice:
        distributed.say(f"notice: {schedules.notice}")
    if state.step >= sampler.stop_step:
        distributed.say(f"already complete: {state.step} of {sampler.stop_step} steps are done in {config.output_dir}")
        return
    if state.step:
        distributed.say(f"carrying on after step {state.step} of {sampler.stop_step}")

    # ---- the loop
    folder = Path(config.output_dir)
    workers = choose_workers(config.num_workers, distributed.processes_here())
    loader = build_loader(source, config.augmentation(), sampler, config.seed, workers, device)
    metrics = MetricsWriter(folder, state.step) if distributed.is_main() else None
    progress = Progress(sampler.stop_step, state.step, sampler.global_batch, shown=distributed.is_main())
    averages = EpochAverages()
    while state.step < sampler.stop_step:
        epoch = state.step // sampler.steps_per_epoch
        asked = time.perf_counter()
        batches = list(itertools.islice(loader, config.accumulation_steps))
        waited = time.perf_counter() - asked
        result = train_step(state, batches, schedules, config)
        progress.step(waited)
        epoch_ends = state.step % sampler.steps_per_epoch == 0
        run_ends = state.step == sampler.stop_step

        if state.step % config.log_every == 0 or state.step == 1 or epoch_ends or run_ends:
            figures = result.figures(state, schedules)  # this is a CPU-GPU sync point
            averages.add({name: figures[name] for name in ("loss", "teacher_entropy", "kl", "feature_std")})
            figures |= progress.rates()
            progress.show(epoch, figures)
            if metrics:
                metrics.write("step", state.step, {"epoch": epoch, **figures})

        save_now = epoch_ends or run_ends or (config.save_every and state.step % config.save_every == 0)
        if save_now and distributed.is_main():
            numbered = epoch_ends and config.saveckp_freq > 0 and (epoch + 1) % config.saveckp_freq == 0
            checkpoint.save(state, config, sampler.steps_per_epoch, numbered)

        if epoch_ends or run_ends:
            summary = averages.take()
            if evaluate and ((epoch + 1) % config.knn_every == 0 or run_ends):
                summary |= evaluate(state.teacher.backbone)
            shown = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in summary.items())
            progress.say(f"epoch {epoch + 1}/{config.epochs}: {shown}")
            if metrics:
                metrics.write("epoch" if epoch_ends else "end", state.step, {"epoch": epoch, **summary})
                draw_curves(metrics.path, folder / "curves.png")
        if save_now:
            progress.restart_clock()  # saving and measuring are no training time
    progress.close()
    if metrics:
        metrics.close()
    latest = folder / checkpoint.LATEST
    then = (
        f"python run_extract.py --weights {latest} --data-path {config.data_path} --output-dir {folder / 'vectors'}"
        if source.labels is None
        else f"python run_knn.py --weights {latest}"
    )
    distributed.say(f"done: {latest} (curves: {folder / 'curves.png'}); next: {then}")


def _choose_kernels(config: PretrainConfig) -> None:
    """Repeatable kernels where asked for; else the fast ones."""
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
    else:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")


def _resume(state: TrainState, config: PretrainConfig, steps_per_epoch: int) -> None:
    """Load this run's checkpoint if there is one; refuse to carry on, or to overwrite, another run."""
    folder = Path(config.output_dir)
    path = folder / checkpoint.LATEST
    refusal = None
    if distributed.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            refusal = f"cannot create the output directory {folder}: {error.strerror}"
        if refusal is None and not os.access(folder, os.W_OK | os.X_OK):
            refusal = f"cannot write to the output directory {folder}: permission denied; choose another --output-dir"
    if config.resume != "never" and path.exists():
        content = checkpoint.read(path)
        changed = differences(dict(content.get("args", {})), config)
        for key, now in (("global_batch", checkpoint.global_batch(config)), ("steps_per_epoch", steps_per_epoch)):
            if content.get(key) != now:
                changed.append(f"{key} {content.get(key)} -> {now} (--accumulation-steps makes up for fewer processes)")
        if "args" not in content:
            refusal = f"{path} is not a checkpoint of run_pretrain.py: choose another --output-dir"
        elif changed and config.resume == "auto":
            listed = "; ".join(changed[:4]) + ("; ..." if len(changed) > 4 else "")
            refusal = (
                f"{folder} holds another run ({listed}): choose another --output-dir, or --resume changed to carry on "
                "with the new settings, or --resume never to overwrite it"
            )
        else:
            checkpoint.restore(state, content, path)
    refusal = distributed.main_decides(refusal)
    if refusal:
        raise InputError(refusal)


def command() -> None:
    """The console entry."""
    distributed.run_command(main)


if __name__ == "__main__":
    command()
