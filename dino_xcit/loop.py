"""The loop of every training run: resume, then step, log, save and evaluate until the run ends."""

from __future__ import annotations

import dataclasses
import shlex
import socket
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, Generic, TypeVar

import torch

import dino_xcit
from dino_xcit.checkpoint.checkpoints import Checkpoints
from dino_xcit.checkpoint.resume import keep_global_batch
from dino_xcit.checkpoint.state import Run
from dino_xcit.config import TrainConfig
from dino_xcit.data.load_monitor import DataLoadMonitor
from dino_xcit.data.loader import BatchDataset, Loader, StepSampler
from dino_xcit.data.source import identity
from dino_xcit.data.workers import choose_workers
from dino_xcit.errors import RunStopped
from dino_xcit.health import Health
from dino_xcit.methods import Method
from dino_xcit.methods.student_teacher import choose_precision
from dino_xcit.metrics import MetricLogger
from dino_xcit.observers import Evaluator, Observer, Observers, evaluate
from dino_xcit.optim import Schedules
from dino_xcit.runtime import distributed, watchdog
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import counted
from dino_xcit.train import TrainState, train_step
from dino_xcit.transform import EvalTransform
from dino_xcit.verdict import Judge

Config = TypeVar("Config", bound=TrainConfig)
NO_EPOCH = -1
"""Epoch of a report of a run that stops."""


@dataclass(kw_only=True)
class Job(Generic[Config]):
    """What a run trains, and on what."""

    config: Config
    """May contain values measured on the data."""
    state: TrainState
    dataset: BatchDataset
    """Maps keys of :class:`dino_xcit.data.loader.StepSampler` to batches of ``state.method``."""
    evaluators: Sequence[Evaluator] = ()
    """Run at epoch ends."""
    observers: Sequence[Observer] = ()
    """Called after each accepted step."""
    schedules: Callable[[Config, int, int], Schedules]
    """Maps settings, steps per epoch and global batch to the schedules and the length of the run."""
    transform: EvalTransform
    """The transform for evaluating the backbone, stored in checkpoints."""
    title: str
    """The method and the network, for the first message."""
    initialise: Callable[[], str] | None = None
    """Sets the initial weights of a new run and returns a message; not called when a run resumes."""
    on_divergence: Callable[[TrainState, Config, StepSampler], RunStopped]
    """Called on every rank after too many consecutive skipped steps; returns what ends the run."""
    next_command: str = ""
    """What a user runs after the run; empty: not printed."""
    report: Callable[[Method, int, bool], None] | None = None
    """Called on every rank at epoch ends, with the 0-based epoch and whether the run ends, after the metrics are
    written."""
    details: Collection[str] = ()
    """Metrics of the evaluators that are recorded, but not printed at epoch ends."""
    recipe: Mapping[str, object] = field(default_factory=dict)
    """Settings of the recipe, for the report."""
    judge: Judge | None = None
    """Judges the logged steps."""
    repeats: int = 1
    """Augmented copies of an image in a step: see :class:`dino_xcit.data.loader.StepSampler`."""


def train(
    config: Config, device: torch.device, build: Callable[[Config, Mapping[str, Any]], Job[Config]]
) -> TrainState:
    """Start or resume a run in ``config.output_dir`` and return its final state.

    Args:
        build: opens the data and builds the networks, once the output directory is locked. Its arguments are ``config``
            with the accumulation that keeps the global batch of the run, and the settings in the checkpoint from which
            the run resumes (empty for a new run).
    """
    with Health(config, device) as health, Checkpoints(config) as checkpoints:
        stored = checkpoints.find()  # empty for a new run
        job = build(keep_global_batch(config, stored), stored.content.get("args", {}))
        config, state = job.config, job.state

        # The order of the images depends on the seed only.
        rank, world, source = distributed.rank(), distributed.world_size(), job.dataset.source
        workers = choose_workers(config.num_workers, distributed.processes_here(), on_gpu=device.type == "cuda")
        sampler = StepSampler(
            len(source), config.batch_size_per_gpu, config.accumulation_steps, rank, world, config.seed,
            repeats=job.repeats,
        )  # fmt: skip
        schedules = job.schedules(config, sampler.steps_per_epoch, sampler.global_batch)
        if job.initialise and not stored:
            log.info(job.initialise())
        watching = Observers(job.observers)
        checkpoints.begin(
            stored, state, watching, Run(config, sampler.steps_per_epoch, identity(source), job.transform)
        )
        del stored  # free the memory of the checkpoint
        total = schedules.total_steps
        sampler.start_step, sampler.stop_step = state.step, min(total, config.max_steps or total)
        describe(job, sampler, schedules, device, f"; writing {config.output_dir}")
        then = f"; next: {job.next_command}" if job.next_command else ""
        if state.step >= sampler.stop_step:
            log.info(
                f"already complete: {config.output_dir} is at step {state.step}, and this run ends after step "
                f"{sampler.stop_step}{then}"
            )
            return state

        loader = Loader(job.dataset, sampler, workers, device)
        monitor = DataLoadMonitor(workers)
        health.start(config, sampler, monitor, partial(job.on_divergence, state, config, sampler), job.judge)
        start = describe_start(job, sampler, total, device)
        with MetricLogger(config, sampler, monitor, schedules.epochs, job.judge, start, job.details) as metrics:
            for batches in loader.steps(config.accumulation_steps):
                try:
                    health.check(state, batches, checkpoints)  # all ranks leave here together, after saving
                except RunStopped:
                    if job.report:
                        job.report(state.method, NO_EPOCH, False)
                    raise
                result = train_step(state, batches, schedules, config)
                watching.on_step(result, batches[-1])
                metrics.step(state.step, loader.waited, partial(watching.metrics, result, state.method))
                run_ends = sampler.ends_run(state.step)
                if checkpoints.maybe_save(run_ends):
                    metrics.restart_clock()
                if run_ends or sampler.ends_epoch(state.step):
                    checkpoints.wait()  # the step is on disk before the evaluation starts
                    evaluated = evaluate(job.evaluators, sampler.epochs(state.step), run_ends, state.method)
                    checkpoints.note(evaluated, run_ends)
                    metrics.epoch(state.step, evaluated)
                    if job.report:
                        watchdog.phase("writing the report", state.step)
                        job.report(state.method, sampler.epochs(state.step), run_ends)
                        metrics.restart_clock()
            checkpoints.finish()
        health.finish(state)
        report = f" (report: {checkpoints.folder.output_dir / 'report.html'})" if job.report else ""
        verdict = f"; verdict: {job.judge.verdict.state}" if job.judge else ""
        log.info(f"done: {checkpoints.folder.latest}{report}{verdict}{then}")
        return state


def describe_start(job: Job, sampler: StepSampler, total_steps: int, device: torch.device) -> dict[str, object]:
    """Return what ``metrics.jsonl`` says about a start of the run; ``changed`` has (value of the recipe, own value)."""
    config = job.config
    settings = {one.name: getattr(config, one.name) for one in dataclasses.fields(config)}
    usual = {name: job.recipe.get(name, getattr(type(config), name)) for name in settings}
    names = settings.keys() - {"recipe", "data_path", "weights", "output_dir", "resume"}
    return {
        "settings": settings,
        "changed": {name: (usual[name], settings[name]) for name in sorted(names) if usual[name] != settings[name]},
        "arch": settings.get("arch", ""),
        "images": sampler.length,
        "total_steps": total_steps,
        "started": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        "host": socket.gethostname(),
        "device": distributed.device_name(device),
        "processes": distributed.world_size(),
        "torch": torch.__version__,
        "dino_xcit": dino_xcit.__version__,
        "command": shlex.join(sys.argv),
    }


def describe(job: Job, sampler: StepSampler, schedules: Schedules, device: torch.device, more: str = "") -> None:
    """Log the data, the model, the device and the first step."""
    config, state, source = job.config, job.state, job.dataset.source
    parameters = sum(p.numel() for p in state.method.eval_backbone.parameters()) / 1e6
    precision = str(choose_precision(config.precision, device)).removeprefix("torch.")
    length = f"{counted(schedules.epochs, 'epoch')} of {counted(sampler.steps_per_epoch, 'step')}"
    if schedules.total_steps % sampler.steps_per_epoch:
        length = f"{counted(schedules.total_steps, 'step')}, {sampler.steps_per_epoch} per epoch"
    log.info(
        f"{counted(len(source), 'image')} from {source.url}; {job.title} ({parameters:.2f} M parameters); "
        f"{counted(distributed.world_size(), 'process')} on {device.type} in {precision}; global batch "
        f"{sampler.global_batch}; {length}{more}"
    )
    if schedules.warning:
        log.warning(schedules.warning)
    if 0 < state.step < sampler.stop_step:
        began = "; the initial weights are not loaded again" if job.initialise else ""
        log.info(f"resuming after step {state.step} of {sampler.stop_step}{began}")
