"""Pretrain an XCiT without labels: DINO, from the first image to the last checkpoint.

    python run_pretrain.py                                              the embedded sample, minutes on a CPU
    torchrun --nproc-per-node 8 run_pretrain.py --data-path /data/imagenet/train --arch xcit_small_12_p16

Read it from top to bottom: settings, data, networks, resume, loop.
"""

from __future__ import annotations

# Before torch: it decides how threads wait for each other.
import dino_xcit  # noqa: F401  # isort: skip

import dataclasses
import itertools
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from dino_xcit import verify_resume
from dino_xcit.checkpoint import state as checkpoint
from dino_xcit.checkpoint.folder import CheckpointFolder
from dino_xcit.checkpoint.resume import find_stored, keep_global_batch, output_folder, prepare, refuse_another_run
from dino_xcit.checkpoint.saver import Saver
from dino_xcit.cli import parse_pretrain
from dino_xcit.config import PretrainConfig
from dino_xcit.data import open_source
from dino_xcit.data.loader import StepSampler, build_loader, choose_workers
from dino_xcit.data.source import identity
from dino_xcit.data.starvation import Starvation
from dino_xcit.errors import PREEMPTED, InputError, RunStopped
from dino_xcit.init_weights import initialise
from dino_xcit.nonfinite import HostCopy
from dino_xcit.nonfinite import keep as keep_rejected_step
from dino_xcit.runtime import distributed
from dino_xcit.runtime.agreement import Agreement
from dino_xcit.runtime.ledger import Ledger
from dino_xcit.runtime.logging import counted
from dino_xcit.runtime.memory import keep_freed_memory
from dino_xcit.runtime.metrics import EpochAverages, MetricsWriter, Progress, WandB, require_wandb
from dino_xcit.runtime.preemption import Preemption
from dino_xcit.runtime.watchdog import Watchdog, guarded
from dino_xcit.train import Schedules, build_state, choose_precision, train_step
from eval.knn.online import online_knn


def main() -> None:
    """The whole run."""
    # ---- settings and processes
    config, first_line = parse_pretrain(sys.argv[1:])
    require_wandb(config.wandb)
    device = distributed.choose_device(config.device)
    if config.augment_device == "cuda" and device.type != "cuda":
        raise InputError("augment_device is cuda, but training is on the CPU: expected --augment-device auto or cpu")
    distributed.start(device, config.hang_timeout + 30)  # the watchdog, which says more, comes first
    distributed.say(first_line)
    _choose_kernels(config)
    if device.type == "cpu":
        keep_freed_memory()
    folder = Path(config.output_dir)
    checkpoints = CheckpointFolder(folder, config.keep_last)
    saver = Saver(checkpoints, config.max_failed_saves) if distributed.is_main() else None
    with output_folder(folder), Watchdog(config.hang_timeout) as watchdog, saver or nullcontext():
        train(config, device, checkpoints, saver, watchdog)


def train(
    config: PretrainConfig,
    device: torch.device,
    checkpoints: CheckpointFolder,
    saver: Saver | None,
    watchdog: Watchdog,
) -> None:
    """From the data to the last checkpoint, in an output directory that is ours alone."""
    # ---- new, or from where this run stopped, perhaps with another number of processes
    stored, stored_in = find_stored(config, checkpoints)
    config = keep_global_batch(config, stored)

    # ---- data: which process sees which images in which step follows from the seed alone
    watchdog.phase("opening the data", 0, limit=False)  # a million images are indexed the first time
    source = open_source(config.data_path, "train")
    images = identity(source)
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

    # ---- student and teacher
    # With several processes, kernels are compiled in there already.
    watchdog.phase("building the networks", 0, limit=not config.compile)
    state = build_state(config, device)
    if stored:
        refuse_another_run(stored, stored_in, config, sampler.steps_per_epoch, images)
        checkpoint.restore(state, stored, stored_in)
        if config.resume == "changed":  # other settings deserve their own patience
            state.rejected_in_a_row.zero_()
    elif config.init_weights:
        distributed.say(initialise(state, config))
    prepare(config, checkpoints, stored_in, stored)
    del stored
    sampler.start_step = state.step
    sampler.stop_step = min(total_steps, config.max_steps or total_steps)
    distributed.say(
        f"{counted(len(source), 'image')} from {source.url}; {config.arch} "
        f"({sum(p.numel() for p in state.student.backbone.parameters()) / 1e6:.2f} M parameters); "
        f"{counted(distributed.world_size(), 'process')} on {device.type} in "
        f"{str(choose_precision(config.precision, device)).removeprefix('torch.')}; global batch "
        f"{sampler.global_batch}; {counted(config.epochs, 'epoch')} of "
        f"{counted(sampler.steps_per_epoch, 'step')}; "
        f"writing {config.output_dir}"
    )
    if schedules.notice:
        distributed.say(f"notice: {schedules.notice}")
    if state.step >= sampler.stop_step:
        end = f"--max-steps {config.max_steps}" if sampler.stop_step < total_steps else f"--epochs {config.epochs}"
        distributed.say(
            f"already complete: {config.output_dir} holds step {state.step}, and this run ends after step "
            f"{sampler.stop_step} ({end}); next: {_what_is_next(config, source.labels is not None, checkpoints)}"
        )
        return
    if state.step:
        began = f"; it began from {config.init_weights}, which is not read again" if config.init_weights else ""
        distributed.say(f"carrying on after step {state.step} of {sampler.stop_step}{began}")

    # ---- what a run needs besides
    folder, main_process = checkpoints.output_dir, distributed.is_main()
    workers = choose_workers(config.num_workers, distributed.processes_here())
    watchdog.phase("compiling the augmentation", state.step, limit=False)
    loader = build_loader(source, config.augmentation(), sampler, config.seed, workers, device)
    watchdog.phase("getting ready", state.step)
    if config.augment_device == "cuda":
        loader.finish_on_device()
    if loader.compile_seconds > 2:
        distributed.say(
            f"compiled the augmentation in {loader.compile_seconds:.0f} s (kept for later runs where it can be)"
        )
    progress = Progress(sampler.stop_step, state.step, sampler.global_batch, shown=main_process)
    metrics = None
    if main_process:
        settings = dataclasses.asdict(config)
        besides = [WandB(config.wandb, folder, state.step, settings)] if config.wandb else []
        metrics = MetricsWriter(folder, state.step, besides)
    averages = EpochAverages()
    can_move = config.augment_device == "auto" and device.type == "cuda"
    starvation = Starvation(
        workers, os.cpu_count() or 1, progress.say, relieve=loader.finish_on_device if can_move else None
    )
    if saver:
        saver.begin(state.step, progress.say)
    ledger = Ledger(folder, len(source), config.max_unreadable, start_anew=state.step == 0, say=progress.say)
    rejected_in_a_row = HostCopy(device)
    agreement = Agreement(device, config.hang_timeout + 30)
    preemption = Preemption()

    def content() -> dict[str, Any]:
        return checkpoint.content_of(state, config, sampler.steps_per_epoch, images)

    def together(**values: int) -> None:
        """Tell the other processes, and stop if one of them, or this one, has to."""
        watchdog.phase("agreeing with the others", state.step)
        agreed = agreement.exchange(stop=preemption.signal_name is not None, **values)
        if agreed["unreadable"]:
            ledger.write()
        if agreed["too_many_unreadable"]:
            raise ledger.refusal(state.step * sampler.global_batch) if main_process else RunStopped(2, "")
        if agreed["cannot_save"]:
            raise saver.refusal() if saver else RunStopped(2, "")
        # On a GPU the count is some steps old, and the run may have recovered since.
        if agreed["diverged"] and int(state.rejected_in_a_row) >= config.max_rejected:
            raise keep_rejected_step(state, config, sampler, device)
        if agreed["stop"]:
            save_last()
            if metrics:
                metrics.close()
            raise RunStopped(PREEMPTED, preemption.sentence(state.step) if main_process else "")

    def save_last() -> None:
        """The state is on the disk before any process leaves, and takes the run along."""
        watchdog.phase("saving", state.step)
        refusal = None
        try:
            if saver:
                saver.ensure(state.step, content)
        except InputError as error:
            refusal = str(error)
        refusal = distributed.main_decides(refusal)
        if refusal:
            raise InputError(refusal)

    def while_measuring() -> None:
        together()
        watchdog.phase("measuring k-NN", state.step)

    # ---- the loop
    preemption.watch()  # before it there is nothing to save
    while state.step < sampler.stop_step:
        epoch = state.step // sampler.steps_per_epoch
        watchdog.phase("waiting for images", state.step)
        asked = time.perf_counter()
        batches = list(itertools.islice(loader, config.accumulation_steps))
        waited = time.perf_counter() - asked
        starvation.note(batches)
        together(
            unreadable=ledger.note(batches),
            too_many_unreadable=ledger.too_many(state.step * sampler.global_batch),
            diverged=rejected_in_a_row.read(state.rejected_in_a_row) >= config.max_rejected,
            cannot_save=saver is not None and saver.gave_up,
        )
        compiling = config.compile and state.step == sampler.start_step
        watchdog.phase("compiling the networks" if compiling else "training step", state.step, limit=not compiling)
        result = train_step(state, batches, schedules, config)
        progress.step(waited)
        epoch_ends = state.step % sampler.steps_per_epoch == 0
        run_ends = state.step == sampler.stop_step

        if state.step % config.log_every == 0 or state.step == 1 or epoch_ends or run_ends:
            figures = result.figures(state, schedules)  # this is a CPU-GPU sync point
            averages.add({name: figures[name] for name in ("loss", "teacher_entropy", "kl", "feature_std")})
            figures |= progress.rates()
            figures |= starvation.figures(figures["data_wait"])
            progress.show(epoch, figures)
            if metrics:
                metrics.write("step", state.step, {"epoch": epoch, **figures})

        save_now = epoch_ends or run_ends or (config.save_every and state.step % config.save_every == 0)
        if saver:
            saver.look()
        # While steps are rejected nothing changes, and what came before them should not be pruned.
        if save_now and saver and not int(state.rejected_in_a_row):
            watchdog.phase("saving", state.step)
            saver.save(content(), keep=_stays(epoch + 1, config) and epoch_ends)

        if epoch_ends or run_ends:
            summary = averages.take()
            if evaluate and ((epoch + 1) % config.knn_every == 0 or run_ends):
                summary |= evaluate(state.teacher.backbone, while_measuring)
                if saver and math.isfinite(summary["knn_top1"]):
                    saver.note_knn(state.step, summary["knn_top1"])
            shown = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in summary.items())
            cut_short = "" if epoch_ends else f", up to step {state.step}"
            progress.say(f"epoch {epoch + 1}/{config.epochs}{cut_short}: {shown}")
            if metrics:
                metrics.write("epoch" if epoch_ends else "end", state.step, {"epoch": epoch, **summary})
                metrics.draw(folder / "curves.png")
        if save_now:
            progress.restart_clock()  # copying and measuring are no training time

    # ---- the end: on the disk before anybody leaves
    ledger.write()
    save_last()
    if metrics:
        metrics.close()
    progress.close()
    watchdog.phase("leaving", state.step)
    distributed.barrier()
    if rejected := int(state.rejected):
        last = int(state.rejected_in_a_row)
        distributed.say(
            f"notice: {counted(rejected, 'step')} of {state.step} were not finite and changed nothing"
            + (f", the last {last} among them: lower --lr, or --clip-grad" if last else "")
        )
    then = _what_is_next(config, source.labels is not None, checkpoints)
    distributed.say(f"done: {checkpoints.latest} (curves: {folder / 'curves.png'}); next: {then}")


def _what_is_next(config: PretrainConfig, labelled: bool, checkpoints: CheckpointFolder) -> str:
    """The command that a finished run is made for."""
    if labelled and not config.data_path.startswith(("tar:", "parquet:")):  # the others have both parts
        return f"python run_knn.py --weights {checkpoints.latest}"
    return (
        f"python run_extract.py --weights {checkpoints.latest} --data-path '{config.data_path}' "
        f"--output-dir {checkpoints.output_dir / 'vectors'}"
    )


def _stays(epoch: int, config: PretrainConfig) -> bool:
    """Whether the checkpoint at the end of this epoch (from 1) is kept for good."""
    return config.saveckp_freq > 0 and epoch % config.saveckp_freq == 0


def _choose_kernels(config: PretrainConfig) -> None:
    """Repeatable kernels where asked for; else the fast ones."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(True)
    else:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")


def command() -> None:
    """The console entry."""
    if verify_resume.asked(sys.argv[1:]):
        distributed.run_command(lambda: verify_resume.main(sys.argv[1:], Path(__file__).resolve()))
    else:
        less_memory = (
            "lower --batch-size-per-gpu (--accumulation-steps makes up for it), the crop sizes or --out-dim, or give "
            "--activation-checkpointing"
        )
        distributed.run_command(guarded(main), less_memory)


if __name__ == "__main__":
    command()
