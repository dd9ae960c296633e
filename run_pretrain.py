"""Pretrain an image encoder without labels.

    python run_pretrain.py                                              the embedded sample, minutes on a CPU
    torchrun --nproc-per-node 8 run_pretrain.py --data-path /data/imagenet/train --arch xcit_small_12_p16

The loop is in dino_xcit/loop.py, the step in dino_xcit/train.py, the loss in dino_xcit/methods/dino.py.
"""

from __future__ import annotations

from dino_xcit.bounds import shown
from dino_xcit.cli import (  # before torch: dino_xcit configures the idle behaviour of OpenMP threads
    check_flags,
    flags_of,
)
from dino_xcit.config import PretrainConfig
from dino_xcit.recipes import AUTO, PretrainSettings, parse_pretrain, recipe_settings

if __name__ == "__main__":
    check_flags(PretrainConfig, "run_pretrain.py")

import dataclasses
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from dino_xcit import auto, kernel_choice, loop, nonfinite, representation
from dino_xcit.checkpoint.folder import LATEST
from dino_xcit.checkpoint.resume import refuse_file
from dino_xcit.data import Source, open_source
from dino_xcit.data.loader import MultiCropDataset
from dino_xcit.data.measure import choose_white_level, measure_channels
from dino_xcit.data.open import has_validation
from dino_xcit.dry_run import dry_run
from dino_xcit.errors import InputError
from dino_xcit.init_weights import initialise
from dino_xcit.loop import Job
from dino_xcit.metrics import METRICS_FILE, read_metrics, require_wandb
from dino_xcit.models import build_empty
from dino_xcit.monitors import StepMonitors
from dino_xcit.observers import Evaluator, Observer
from dino_xcit.optim import Schedules
from dino_xcit.recompute import fit_into_memory
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.require_triton import require_triton
from dino_xcit.train import TrainState, build_state, set_numerics
from dino_xcit.transform import IMAGENET_MEAN, IMAGENET_STD
from dino_xcit.verdict import TOO_EARLY, Judge, Verdict
from dino_xcit.weights import LoadedBackbone, load_backbone
from eval.knn.online import build_evaluators, build_probe
from eval.report.pictures import Pictures
from eval.report.reporter import REPORT, Reporter


def main() -> None:
    """Parse the command line, join the other ranks and train."""
    run(parse_pretrain(sys.argv[1:]))


@dataclasses.dataclass(frozen=True)
class PretrainedRun:
    """What :func:`pretrain` returns."""

    folder: Path
    metrics: list[dict[str, Any]]
    """Rows of metrics.jsonl."""
    verdict: Verdict
    """The last one."""
    report: Path
    """report.html."""
    backbone: LoadedBackbone
    """The teacher's backbone; ``backbone.embed(images)`` returns vectors."""


def pretrain(data: str | Path = "", **settings: Any) -> PretrainedRun:
    """Pretrain as ``run_pretrain.py --data-path DATA`` does, or continue an interrupted run.

    Args:
        data: images in any form that ``--data-path`` accepts; empty: the embedded sample.
        settings: flags by name, such as ``arch="xcit_nano_12_p16", epochs=20, global_crops_scale=(0.4, 1)``.

    Raises:
        InputError: a setting or the data are invalid.
        RunStopped: the run diverged, or was stopped.
    """
    parsed = parse_pretrain(flags_of(({"data_path": data} if str(data) else {}) | settings))
    config = parsed.config
    if config.dry_run:
        raise InputError("dry_run has no trained network to return: use python run_pretrain.py --dry-run")
    level = log.logger.level
    try:
        run(parsed)
    finally:
        log.logger.setLevel(level)  # which quiet=True changes
    folder = Path(config.output_dir)
    rows = read_metrics(folder / METRICS_FILE)
    judged = [Verdict(row["state"], row["reason"], row["remedy"]) for row in rows if row["kind"] == "verdict"]
    verdict = judged[-1] if judged else Verdict(TOO_EARLY)
    return PretrainedRun(folder, rows, verdict, folder / REPORT, load_backbone(str(folder / LATEST)))


def run(settings: PretrainSettings) -> None:
    """Join the other ranks and train, or try the settings."""
    config = settings.config
    if config.quiet and not config.dry_run:
        log.only_warnings()
    require_wandb(config.wandb)
    device = distributed.choose_device(config.device)
    if config.augment_device == "cuda":
        require_triton(device, "augment_device cuda", "--augment-device cpu")
    distributed.start(device, config.hang_timeout + 30)  # the watchdog fires first: its report has more detail
    log.info(settings.explanation)
    set_numerics(config, device)
    if config.dry_run:
        distributed.on_main(partial(refuse_file, Path(config.output_dir)))
        final = dataclasses.replace(config, resolution_schedule="")  # the largest crops
        dry_run(build_job(final, {}, device, evaluators=(), given=settings.given), device)
    else:
        train(config, device, given=settings.given)


def train(
    config: PretrainConfig,
    device: torch.device,
    evaluators: Sequence[Evaluator] | None = None,
    observers: Sequence[Observer] = (),
    given: Collection[str] | None = None,
) -> TrainState:
    """Start or resume a run in ``config.output_dir`` and return its final state.

    Args:
        evaluators: called at epoch ends; None: metrics of the representation, and k-NN if ``knn_every`` is set.
        observers: called after each accepted step, besides the monitors and the online probe.
        given: settings that recipe ``auto`` leaves alone: ``parse_pretrain(argv).given``.

    Raises:
        InputError: a setting or the data are invalid, or the recipe is ``auto`` and ``given`` is None.
    """

    def build(config: PretrainConfig, stored: Mapping[str, Any]) -> Job[PretrainConfig]:
        return build_job(config, stored, device, evaluators, observers, given)

    return loop.train(config, device, build)


def build_job(
    config: PretrainConfig,
    stored: Mapping[str, Any],
    device: torch.device,
    evaluators: Sequence[Evaluator] | None = None,
    observers: Sequence[Observer] = (),
    given: Collection[str] | None = None,
) -> Job[PretrainConfig]:
    """Build the networks and open the data.

    Args:
        stored: settings in the checkpoint from which the run resumes.
        evaluators, observers, given: as of :func:`train`.
    """
    build_empty(
        config.arch, config.channels
    )  # refuses an unknown name before the data, which can take minutes to index
    source = open_source(config.data_path, "train")
    recipe = recipe_settings(config.recipe, config.arch) if config.recipe else {}
    if config.recipe == AUTO.name:
        if given is None:
            raise InputError("recipe auto needs to know which settings are given: give train(..., given=[...])")
        config, recipe = auto.adapt(config, source, given, stored)
    config = dataclasses.replace(config, white_level=choose_white_level(source, config.white_level, config.channels))
    config = with_statistics(config, source, stored)
    config = kernel_choice.choose(config, device, stored)
    state = build_state(config, device)
    if config.activation_checkpointing == "auto":
        fit_into_memory(state, config, device)
    dataset = MultiCropDataset(
        source, config.augmentation(), config.seed, config.pixel_format, config.augment_device == "cuda",
        config.first_augmentations(),
    )  # fmt: skip
    probe = build_probe(config, source, state.method, device)
    if evaluators is None:
        evaluators = [
            representation.build_evaluator(config, source, device),
            *build_evaluators(config, source, device, probe),
        ]
    return Job(
        config=config,
        state=state,
        dataset=dataset,
        evaluators=evaluators,
        observers=[StepMonitors(state.method), *([probe] if probe else []), *observers],
        schedules=Schedules.of,
        transform=config.eval_transform(),
        title=f"{config.method} with {config.arch}",
        initialise=partial(initialise, state.method, config) if config.init_weights else None,
        on_divergence=nonfinite.keep,
        next_command=next_command(config, source),
        report=Reporter(config.output_dir, Pictures(config, source, device) if config.report_pictures else None),
        details=set(representation.METRICS) - {config.labelfree_metric},
        recipe=recipe,
        judge=Judge(config),
    )


def with_statistics(config: PretrainConfig, source: Source, stored: Mapping[str, Any]) -> PretrainConfig:
    """Set mean and std of other than three channels if they are not given: those of ``stored``, else measured."""
    usual = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    missing = [name for name in usual if config.channels != 3 and getattr(config, name) == usual[name]]
    found = {name: tuple(stored[name]) for name in missing if len(stored.get(name, ())) == config.channels}
    if len(found) < len(missing):
        measured = dict(zip(usual, measure_channels(source, config.pixel_format), strict=True))
        found = {name: measured[name] for name in missing}
        numbers = (f"{name} {shown(values)}" for name, values in found.items())
        log.info(f"{config.channels} channels, measured on a sample: {', '.join(numbers)}")
    return dataclasses.replace(config, **found)  # type: ignore[arg-type]


def next_command(config: PretrainConfig, source: Source) -> str:
    """Return the command that a user runs after a finished run."""
    folder = Path(config.output_dir)
    weights = quote(str(folder / LATEST))
    if source.labels is not None and has_validation(config.data_path):
        return f"python run_knn.py --weights {weights}"
    vectors = quote(str(folder / "vectors"))
    return f"python run_extract.py --weights {weights} --data-path {quote(config.data_path)} --output-dir {vectors}"


def command() -> None:
    """Run :func:`main` with the exit codes of docs/reliability.md."""
    less_memory = (
        "lower --batch-size-per-gpu (and raise --accumulation-steps), the crop sizes or --out-dim, or use "
        "--activation-checkpointing auto"
    )
    distributed.run_command(main, less_memory)


if __name__ == "__main__":
    command()
