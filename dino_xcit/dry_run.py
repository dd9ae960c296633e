"""``--dry-run``: try the settings of a run on its data and this machine. Writes nothing into the output directory."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dino_xcit.checkpoint.state import Run, content_of
from dino_xcit.config import PretrainConfig
from dino_xcit.data.loader import Batch, Loader, StepSampler
from dino_xcit.data.workers import choose_workers
from dino_xcit.loop import Job, describe
from dino_xcit.optim import Schedules
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import counted
from dino_xcit.runtime.memory import SPARE, peak_memory, reset_peak_memory, total_memory
from dino_xcit.train import TrainState, train_step

SECONDS = 5.0
"""Time for measuring the loader, and for measuring the step."""


def dry_run(job: Job[PretrainConfig], device: torch.device) -> None:
    """Read images, train a few steps, and log memory, speed, duration, disk space and doubtful settings.

    Must be called on every rank.
    """
    config, state, source = job.config, job.state, job.dataset.source
    world = distributed.world_size()
    workers = choose_workers(config.num_workers, distributed.processes_here(), on_gpu=device.type == "cuda")
    sampler = StepSampler(
        len(source), config.batch_size_per_gpu, config.accumulation_steps, distributed.rank(), world, config.seed
    )
    schedules = job.schedules(config, sampler.steps_per_epoch, sampler.global_batch)
    sampler.stop_step = schedules.total_steps
    describe(job, sampler, schedules, device)

    # ---- loader, then memory, then the step; rank 0 decides how often, because the step has collectives
    loader = Loader(job.dataset, sampler, workers, device)
    batch, unreadable, seconds = _read(loader)
    loader.close()
    loader_speed = config.batch_size_per_gpu * world / seconds
    memory = _memory(state, batch, schedules, config, device)
    largest = memory.largest if memory else config.batch_size_per_gpu
    images = distributed.broadcast_from_main(min(config.batch_size_per_gpu, largest))
    step = partial(train_step, state, [first_images(batch, images)] * config.accumulation_steps, schedules, config)
    step()  # allocates and compiles
    count = distributed.broadcast_from_main(max(1, int(SECONDS / _seconds(step, 1, device))))
    step_speed = count * images * config.accumulation_steps * world / _seconds(step, count, device)

    # ---- report
    speed, limit = min((loader_speed, "the loader"), (step_speed, "the step"))
    steps = min(schedules.total_steps, config.max_steps or schedules.total_steps)
    duration = steps * sampler.global_batch / speed
    run = Run(config, sampler.steps_per_epoch, transform=job.transform)
    size, backbone = _stored_bytes(content_of(state, run)), _stored_bytes(state.method.eval_backbone.state_dict())
    permanent = config.epochs // config.saveckp_freq if config.saveckp_freq else 0
    files = config.keep_last + permanent + 3  # the two best ones, and the one being written
    disk, free = files * size + backbone, _free_space(Path(config.output_dir))
    hours = duration * world / 3600
    log.info(
        "\n".join(
            [
                _memory_line(memory, config.batch_size_per_gpu),
                f"loader      {loader_speed:,.0f} images/s with {counted(workers, 'worker')} per process",
                f"step        {step_speed:,.0f} images/s, {sampler.global_batch / step_speed:.3g} s per step",
                f"duration    {timedelta(seconds=round(duration))} without evaluations, at {speed:,.0f} images/s: "
                f"{limit} is the limit; {hours:.3g} {'GPU' if device.type == 'cuda' else 'process'} hours",
                f"disk        {size / 1e6:,.1f} MB per checkpoint, at most {disk / 1e9:.3g} GB for {files} of them; "
                f"{free / 1e9:,.1f} GB are free",
            ]
        )
    )
    if unreadable:
        log.warning(
            f"{counted(len(unreadable), 'image')} cannot be read, such as {unreadable[0]}; a run ends above "
            f"{config.max_unreadable:.0%} of its images (--max-unreadable): python -m dino_xcit.data check lists them"
        )
    if disk > free:
        log.warning("the disk is too small: choose another --output-dir, or lower --keep-last or raise --saveckp-freq")
    if images < config.batch_size_per_gpu:
        fits = max(size for size in range(1, largest + 1) if config.batch_size_per_gpu % size == 0)
        log.warning(
            f"a batch of {config.batch_size_per_gpu} does not fit into memory: --batch-size-per-gpu {fits} "
            f"--accumulation-steps {config.accumulation_steps * config.batch_size_per_gpu // fits}"
        )
    for doubt in doubtful_settings(config, len(source), steps):
        log.warning(doubt)


def doubtful_settings(config: PretrainConfig, images: int, steps: int) -> list[str]:
    """Return a sentence on each setting that is known to fail."""
    found = []
    prototypes = config.method == "dino"
    if prototypes and config.teacher_temp > 0.07:
        found.append(f"teacher_temp is {config.teacher_temp:g}: above 0.07 the teacher tends to a uniform output")
    if prototypes and config.teacher_temp >= config.student_temp:
        found.append("teacher_temp is not below student_temp: without sharpening the output becomes uniform")
    if prototypes and config.out_dim > images:
        fewer = 2 ** max(1, int(math.log2(images)) - 1)
        found.append(f"out_dim is {config.out_dim}, more prototypes than the {images:,} images: try --out-dim {fewer}")
    momentum = max(0.5, round(1 - 10 / max(1, steps), 3))
    if (1 - config.momentum_teacher) * steps < 4 and momentum < config.momentum_teacher:
        found.append(
            f"momentum_teacher is {config.momentum_teacher:g}: in {counted(steps, 'step')} the teacher hardly leaves "
            f"its initial weights; try --momentum-teacher {momentum:g}"
        )
    return found


def first_images(batch: Batch, images: int) -> Batch:
    """Return the first images of a batch on the device, with all views."""
    groups = zip(batch.crops, batch.views, strict=True)
    crops = [one.unflatten(0, (views, -1))[:, :images].flatten(0, 1) for one, views in groups]
    labels = None if batch.labels is None else batch.labels[:images]
    return dataclasses.replace(batch, crops=crops, indices=batch.indices[:images], labels=labels)


class Memory(NamedTuple):
    """Bytes of a training process."""

    total: int
    base: int
    """Without images."""
    each: int
    """For each image of a batch."""

    @property
    def largest(self) -> int:
        """The largest batch that leaves :data:`SPARE` free."""
        return max(1, int(((1 - SPARE) * self.total - self.base) // self.each))


def _memory(
    state: TrainState, batch: Batch, schedules: Schedules, config: PretrainConfig, device: torch.device
) -> Memory | None:
    """Return the memory by the peaks of two small batches; None if the second peak is not higher."""
    reset_peak_memory(device)
    total = total_memory(device)
    small, peaks = max(1, config.batch_size_per_gpu // 8), []
    for images in (small, small, 2 * small):  # the first step allocates the optimizer's state
        reset_peak_memory(device)
        train_step(state, [first_images(batch, images)], schedules, config)
        peaks.append(peak_memory(device))
    each = (peaks[2] - peaks[1]) // small
    return Memory(total, peaks[1] - small * each, each) if each > 0 and 2 * small <= len(batch.indices) else None


def _memory_line(memory: Memory | None, images: int) -> str:
    if memory is None:
        return "memory      not measurable: the batch is too small"
    needed = memory.base + images * memory.each
    return (
        f"memory      about {needed / 1e9:.3g} GB for {counted(images, 'image')} per process; the largest batch is "
        f"about {memory.largest:,} ({memory.total / 1e9:.3g} GB, {SPARE:.0%} spare)"
    )


def _read(loader: Loader[Batch]) -> tuple[Batch, list[str], float]:
    """Read batches for :data:`SECONDS` or to the end: the first one, names of unreadable images, seconds per batch.

    The time excludes the first batch, for which the workers start, unless there is no other.
    """
    started = time.perf_counter()
    first = next(loader)
    began, count = time.perf_counter(), 0
    unreadable = {one.name: None for one in first.unreadable}
    for batch in loader:
        count += 1
        unreadable |= {one.name: None for one in batch.unreadable}
        if time.perf_counter() - began > SECONDS:
            break
    ended = time.perf_counter()
    return first, list(unreadable), (ended - began) / count if count else ended - started


def _seconds(step: Callable[[], object], count: int, device: torch.device) -> float:
    """Return the seconds of ``count`` steps."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    for _ in range(count):
        step()
    wait()
    return time.perf_counter() - began


def _stored_bytes(content: object) -> int:
    """Return the bytes of the tensors of a checkpoint, which stores a tensor with several names once."""
    tensors = [leaf for leaf in tree_leaves(content) if isinstance(leaf, Tensor)]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def _free_space(folder: Path) -> int:
    """Return the free bytes of the disk of a folder, which need not exist."""
    return shutil.disk_usage(next(one for one in [folder.absolute(), *folder.absolute().parents] if one.exists())).free
