"""Save the state of a run that ends after too many skipped steps, and repeat its last step.

    python -m dino_xcit.nonfinite RUN/nonfinite.pth

repeats the last skipped step in one process with the same weights, images and crops, and reports for each forward pass
the first module with non-finite output.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import MinLen
from torch import Tensor, nn

from dino_xcit import safe_load
from dino_xcit.bounds import FilePath, Positional
from dino_xcit.checkpoint.state import Run, content_of, restore
from dino_xcit.cli import parse
from dino_xcit.config import PretrainConfig
from dino_xcit.data import open_source
from dino_xcit.data.loader import Batch, StepSampler, build_loader
from dino_xcit.errors import DIVERGED, InputError, RunStopped
from dino_xcit.methods.student_teacher import choose_precision
from dino_xcit.optim import Schedules
from dino_xcit.runtime import atomic, distributed
from dino_xcit.runtime.logging import counted
from dino_xcit.train import TrainState, build_state, set_numerics, train_step

STATE, SUMMARY = "nonfinite.pth", "nonfinite.json"


@dataclasses.dataclass(frozen=True)
class NonfiniteConfig:
    """Repeat the last step of a run that ended after too many skipped steps, and name the first module with non-finite
    output."""

    file: Annotated[FilePath, MinLen(1), Positional] = ""
    """The nonfinite.pth of the run's output directory (the flag --file may be omitted)."""


def keep(state: TrainState, config: PretrainConfig, sampler: StepSampler) -> RunStopped:
    """Save the state and the images of the last skipped step; return the exception that ends the run.

    Must be called on every rank.
    """
    stopped = RunStopped(DIVERGED, "")
    if distributed.is_main():
        stopped = _keep(state, config, sampler, state.skipped_steps.device)
    distributed.barrier()  # wait for rank 0's files: torchrun ends all ranks when the first one exits
    return stopped


def _keep(state: TrainState, config: PretrainConfig, sampler: StepSampler, device: torch.device) -> RunStopped:
    folder = Path(config.output_dir)
    in_a_row = int(state.skipped_in_a_row)
    step = state.step - 1  # the last step, 0-based
    summary = {
        "step": step,
        "epoch": step // sampler.steps_per_epoch,
        "skipped_in_a_row": in_a_row,
        "seed": config.seed,
        "precision": str(choose_precision(config.precision, device)).removeprefix("torch."),
        "images_by_forward_pass": passes_of(sampler, step),
    }
    content = content_of(state, Run(config, sampler.steps_per_epoch, transform=config.eval_transform())) | {
        "nonfinite": summary
    }
    try:
        atomic.write_torch(folder / STATE, content)
        atomic.write_json(folder / SUMMARY, summary)
        hint = f"run python -m dino_xcit.nonfinite {folder / STATE} to find the first module that is not finite"
    except OSError as error:
        hint = f"their state could not be written ({error.strerror})"
    return RunStopped(
        DIVERGED,
        f"error: {in_a_row} consecutive steps up to step {state.step} were not finite (--max-skipped-steps "
        f"{config.max_skipped_steps}) and did not change the weights; {hint}; then resume with --resume changed and a "
        "lower --lr, a lower --clip-grad or --precision fp32, or start from scratch with --resume never",
    )


def passes_of(sampler: StepSampler, step: int) -> list[list[int]]:
    """Return the images of each forward pass of the 0-based ``step`` over all ranks, in sampling order."""
    alone = StepSampler(
        sampler.length, sampler.batch_size, sampler.accumulation_steps * sampler.world_size, seed=sampler.seed,
        start_step=step, stop_step=step + 1,
    )  # fmt: skip
    return [[index for _, index in keys] for keys in alone]


def repeat(path: Path) -> str:
    """Repeat the saved step and return a report.

    Raises:
        InputError: the file is missing or invalid, the images changed, or the step is finite on this machine.
    """
    content = safe_load.read(path)
    summary, stored = content.get("nonfinite"), content.get("args")
    if not isinstance(summary, Mapping) or not isinstance(stored, Mapping):
        raise InputError(f"{path} has no skipped step: expected the {STATE} of a run that ended with code {DIVERGED}")
    config = _config_of(stored, summary)
    device = distributed.choose_device(config.device)
    if device.type != "cuda":
        config = dataclasses.replace(config, kernels="eager")
    set_numerics(config, device)
    source = open_source(config.data_path, "train")
    step = int(summary["step"])
    sampler = StepSampler(
        len(source), config.batch_size_per_gpu, config.accumulation_steps, seed=config.seed,
        start_step=step, stop_step=step + 1,
    )  # fmt: skip
    if passes_of(sampler, step) != summary["images_by_forward_pass"]:
        raise InputError(f"{config.data_path} changed: step {step} would use other images; restore the original data")
    state = build_state(config, device)
    restore(state, content, path)
    state.step = step
    schedules = Schedules.of(config, sampler.steps_per_epoch, sampler.global_batch)
    loader = build_loader(source, config.augmentation(), sampler, config.seed, 0, device, config.pixel_format)
    batches = list(islice(loader, config.accumulation_steps))
    lines = [f"step {step} of {path}, {counted(len(batches), 'forward pass')} on {device.type} in {config.precision}:"]
    for number, batch in enumerate(batches):
        lines.append(f"  pass {number}: {_try(state, batch, schedules, config)}")
    if bool(train_step(state, batches, schedules, config).accepted):
        raise InputError(
            "\n".join(
                [*lines, "the step is finite here: repeat it on the original device with the original PyTorch version"]
            )
        )
    return "\n".join([*lines, "the step is skipped again"])


def _try(state: TrainState, batch: Batch, schedules: Schedules, config: PretrainConfig) -> str:
    """Run a step with a single forward pass on a copy of the state; describe its result."""
    trial = copy.deepcopy(state)
    with _record_nonfinite_modules(trial) as names:
        result = train_step(trial, [batch], schedules, config)
    images = ", ".join(map(str, batch.indices.tolist()[:8])) + (" ..." if len(batch.indices) > 8 else "")
    where = f"first in {names[0]}" if names else "every module's output is finite"
    metrics = f"loss {float(result.loss):g}, gradient norm {float(result.gradient_norm):g}"
    return f"{'finite' if bool(result.accepted) else 'NOT FINITE'}; {metrics}; {where}; images {images}"


@contextmanager
def _record_nonfinite_modules(state: TrainState) -> Iterator[list[str]]:
    """Yield a list that collects the names of modules with non-finite output, in execution order."""
    names: list[str] = []
    handles = []
    for network_name, network in (("teacher", state.method.teacher), ("student", state.method.trained)):
        for name, module in network.named_modules() if network is not None else ():
            if any(True for _ in module.children()):
                continue  # report leaf modules only

            def record(_: nn.Module, __: Any, output: object, name: str = f"{network_name}.{name}") -> None:
                if isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                    names.append(name)

            handles.append(module.register_forward_hook(record))
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


def _config_of(stored: Mapping[str, Any], summary: Mapping[str, Any]) -> PretrainConfig:
    """Return the settings of the run for one process that does the forward passes of all ranks."""
    values = {
        field.name: tuple(stored[field.name]) if isinstance(stored[field.name], list) else stored[field.name]
        for field in dataclasses.fields(PretrainConfig)
        if field.name in stored
    }
    precision = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[summary["precision"]]
    passes = len(summary["images_by_forward_pass"])
    return PretrainConfig(**values | {"precision": precision, "accumulation_steps": passes})  # type: ignore[arg-type]


def main() -> None:
    """Repeat the step of the file on the command line."""
    print(repeat(Path(parse(NonfiniteConfig, sys.argv[1:], "python -m dino_xcit.nonfinite").file)))


if __name__ == "__main__":
    distributed.run_command(main)
