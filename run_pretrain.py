"""Pretrain an image encoder without labels.

    python run_pretrain.py                                              the embedded sample, minutes on a CPU
    torchrun --nproc-per-node 8 run_pretrain.py --data-path /data/imagenet/train --arch xcit_small_12_p16

Read it from top to bottom: settings, data, networks, loop.
"""

from __future__ import annotations

from dino_xcit.cli import check_flags  # before torch: dino_xcit configures the idle behaviour of OpenMP threads
from dino_xcit.config import PretrainConfig
from dino_xcit.recipes import parse_pretrain

if __name__ == "__main__":
    check_flags(PretrainConfig, "run_pretrain.py")

import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from shlex import quote

import torch

from dino_xcit import nonfinite
from dino_xcit.checkpoint.checkpoints import Checkpoints
from dino_xcit.checkpoint.resume import keep_global_batch
from dino_xcit.checkpoint.state import Run
from dino_xcit.data import Source, open_source
from dino_xcit.data.decode import choose_white_level
from dino_xcit.data.load_monitor import DataLoadMonitor
from dino_xcit.data.loader import StepSampler, build_loader, check_augment_device
from dino_xcit.data.open import has_validation
from dino_xcit.data.source import identity
from dino_xcit.data.workers import choose_workers
from dino_xcit.health import Health
from dino_xcit.init_weights import initialise
from dino_xcit.methods.student_teacher import choose_precision
from dino_xcit.metrics import MetricLogger, require_wandb
from dino_xcit.observers import Evaluator, Observer, Observers, evaluate
from dino_xcit.optim import Schedules
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import counted
from dino_xcit.train import TrainState, build_state, choose_kernels, train_step
from eval.knn.online import build_evaluators


def main() -> None:
    """Parse the command line, join the other ranks and train."""
    config, first_line = parse_pretrain(sys.argv[1:])
    require_wandb(config.wandb)
    device = distributed.choose_device(config.device)
    check_augment_device(config.augment_device, device)
    distributed.start(device, config.hang_timeout + 30)  # the watchdog fires first: its report has more detail
    log.info(first_line)
    choose_kernels(config, device)
    train(config, device)


def train(
    config: PretrainConfig,
    device: torch.device,
    evaluators: Sequence[Evaluator] | None = None,
    observers: Sequence[Observer] | None = None,
) -> None:
    """Start or resume a run in ``config.output_dir``.

    Args:
        evaluators: called at epoch ends; None: k-NN if ``knn_every`` is set.
        observers: called after each accepted step.
    """
    with Health(config, device) as health, Checkpoints(config) as checkpoints:
        stored = checkpoints.find()  # empty for a new run
        config = keep_global_batch(config, stored)
        state = build_state(config, device)  # before the data, which can take minutes to index
        source = open_source(config.data_path, "train")
        config = dataclasses.replace(config, white_level=choose_white_level(source, config.white_level))
        workers = choose_workers(config.num_workers, distributed.processes_here(), on_gpu=device.type == "cuda")
        if evaluators is None:
            evaluators = build_evaluators(config, source, device)

        # The order of the images depends on the seed only.
        rank, world = distributed.rank(), distributed.world_size()
        sampler = StepSampler(
            len(source), config.batch_size_per_gpu, config.accumulation_steps, rank, world, config.seed
        )
        schedules = Schedules.of(config, sampler.steps_per_epoch, sampler.global_batch)
        if config.init_weights and not stored:
            log.info(initialise(state.method, config))
        watching = Observers(observers or ())
        run = Run(config, sampler.steps_per_epoch, identity(source))
        checkpoints.begin(stored, state, watching, run)
        del stored  # free the memory of the checkpoint
        total_steps = config.epochs * sampler.steps_per_epoch
        sampler.start_step, sampler.stop_step = state.step, min(total_steps, config.max_steps or total_steps)
        describe(config, source, sampler, schedules, state)
        if state.step >= sampler.stop_step:
            log.info(
                f"already complete: {config.output_dir} is at step {state.step}, and this run ends after step "
                f"{sampler.stop_step}; next: {next_command(config, source, checkpoints)}"
            )
            return

        loader = build_loader(
            source, config.augmentation(), sampler, config.seed, workers, device, config.augment_device,
            config.white_level,
        )  # fmt: skip
        monitor = DataLoadMonitor(workers)
        health.start(sampler, monitor, on_divergence=partial(nonfinite.keep, state, config, sampler, device))
        with MetricLogger(config, sampler, monitor) as metrics:
            for batches in loader.steps(config.accumulation_steps):
                health.check(state, batches, checkpoints)  # all ranks leave here together, after saving
                result = train_step(state, batches, schedules, config)
                watching.on_step(result, batches[-1])
                metrics.step(state.step, loader.waited, partial(watching.metrics, result, state.method))
                run_ends = sampler.ends_run(state.step)
                if checkpoints.maybe_save(run_ends):
                    metrics.restart_clock()
                if run_ends or sampler.ends_epoch(state.step):
                    checkpoints.wait()  # the step is on disk before the evaluation starts
                    evaluated = evaluate(evaluators, sampler.epochs(state.step), run_ends, state.method)
                    checkpoints.note(evaluated, run_ends)
                    metrics.epoch(state.step, evaluated)
            checkpoints.finish()
        health.finish(state)
        curves, then = checkpoints.folder.output_dir / "curves.png", next_command(config, source, checkpoints)
        log.info(f"done: {checkpoints.folder.latest} (curves: {curves}); next: {then}")


def describe(
    config: PretrainConfig, source: Source, sampler: StepSampler, schedules: Schedules, state: TrainState
) -> None:
    """Log the data, the model, the device and the first step."""
    parameters = sum(p.numel() for p in state.method.eval_backbone.parameters()) / 1e6
    device = state.skipped_steps.device
    precision = str(choose_precision(config.precision, device)).removeprefix("torch.")
    log.info(
        f"{counted(len(source), 'image')} from {source.url}; {config.method} with {config.arch} ({parameters:.2f} M "
        f"parameters); {counted(distributed.world_size(), 'process')} on {device.type} in {precision}; global batch "
        f"{sampler.global_batch}; {counted(config.epochs, 'epoch')} of {counted(sampler.steps_per_epoch, 'step')}; "
        f"writing {config.output_dir}"
    )
    if schedules.warning:
        log.warning(schedules.warning)
    if 0 < state.step < sampler.stop_step:
        began = f"; --init-weights {config.init_weights} is not read again" if config.init_weights else ""
        log.info(f"resuming after step {state.step} of {sampler.stop_step}{began}")


def next_command(config: PretrainConfig, source: Source, checkpoints: Checkpoints) -> str:
    """Return the command that a user runs after a finished run."""
    weights = quote(str(checkpoints.folder.latest))
    if source.labels is not None and has_validation(config.data_path):
        return f"python run_knn.py --weights {weights}"
    vectors = quote(str(checkpoints.folder.output_dir / "vectors"))
    return f"python run_extract.py --weights {weights} --data-path {quote(config.data_path)} --output-dir {vectors}"


def command() -> None:
    """Run :func:`main` with the exit codes of docs/reliability.md."""
    less_memory = (
        "lower --batch-size-per-gpu (and raise --accumulation-steps), the crop sizes or --out-dim, or use "
        "--activation-checkpointing"
    )
    distributed.run_command(main, less_memory)


if __name__ == "__main__":
    command()
