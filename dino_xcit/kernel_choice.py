"""``--kernels auto``: the fastest kernels whose loss and gradients agree with eager's, measured on the run's own GPU.

Each candidate is tried in a process of its own, so a kernel that fails cannot end the run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dino_xcit.config import PretrainConfig
from dino_xcit.data.index import cache_folder
from dino_xcit.data.loader import Batch
from dino_xcit.methods import Method, build_method
from dino_xcit.methods.student_teacher import StudentTeacher, choose_precision
from dino_xcit.models.xcit import Kernels
from dino_xcit.optim import Schedules
from dino_xcit.runtime import atomic, distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.require_triton import require_triton
from dino_xcit.train import noise_batch, set_numerics

SECONDS = 60.0
"""Time for all candidates."""
PASSES = 5
"""Passes of which the shortest counts."""
TOLERANCE = {torch.float32: 0.1, torch.float16: 0.1, torch.bfloat16: 0.5}
"""Largest relative difference from eager's gradients. On the CPU, eager itself differs from float32 by up to 0.05 in
float16 (as precise as TF32) and 0.21 in bfloat16; a wrong kernel by more than 1 (tests/test_kernel_choice.py)."""
SHAPES = (
    "arch", "method", "batch_size_per_gpu", "out_dim", "head_hidden_dim", "head_bottleneck_dim", "use_bn_in_head",
    "local_crops_number", "global_crops_size", "local_crops_size", "drop_path_rate", "activation_checkpointing",
    "centering",
)  # fmt: skip
"""Settings on which the speed depends."""


COMPILED = "compiled "
"""Begins the entry of shapes that a run with ``--kernels compile`` has compiled."""


class Trial(NamedTuple):
    """A candidate beside eager, for one forward and backward pass."""

    eager_ms: float
    ms: float
    difference: float
    """Largest relative difference of the loss or of the gradient of a parameter."""


def choose(config: PretrainConfig, device: torch.device, stored: Mapping[str, Any]) -> PretrainConfig:
    """Return the settings with ``kernels`` chosen. Must be called on every rank; rank 0 measures.

    A run that resumes keeps the choice. On a CPU, with ``deterministic`` and for other networks than this project's
    XCiT, ``auto`` stays, which is the same as ``eager``.

    Args:
        stored: settings in the checkpoint from which the run resumes.

    Raises:
        InputError: the run resumes with Triton's kernels, which cannot run here.
    """
    on_gpu = device.type == "cuda"
    if config.kernels == "compile" and on_gpu:
        distributed.on_main(lambda: _remember({COMPILED + _key(config, device): True}))
    if config.kernels != "auto" or not on_gpu or config.deterministic or not config.is_xcit:
        return config
    kernels = stored.get("kernels", "auto")
    if kernels == "auto":
        kernels = distributed.on_main(lambda: fastest(config, device))
    else:
        log.info(f"kernels {kernels}, as before")
    if kernels == "fused":
        require_triton(device, "kernels fused", "--kernels eager")
    return dataclasses.replace(config, kernels=kernels)


def fastest(config: PretrainConfig, device: torch.device) -> Kernels:
    """Try the candidates that the cache lacks, print all, and return the fastest that agrees with eager."""
    known, key = _read(), _key(config, device)
    candidates: list[Kernels] = ["fused", "compile"] if COMPILED + key in known else ["fused"]
    tolerance = TOLERANCE[choose_precision(config.precision, device)]
    # The other ranks wait no longer than hang_timeout.
    end, best, lines = monotonic() + min(SECONDS, config.hang_timeout), 1.0, []
    chosen: Kernels = "eager"
    for kernels in candidates:
        entry = f"{kernels} {key}"
        kept = _trial_of(known.get(entry))
        found = kept or try_in_process(config, kernels, device, end - monotonic())
        if isinstance(found, str):
            lines.append(f"{kernels}: left out, {found}")
            if kernels == "compile":
                _remember({COMPILED + key: None})
            continue
        if not kept:
            _remember({entry: found})
        speed, agrees = found.eager_ms / found.ms, found.difference <= tolerance  # false for NaN
        lines.append(
            f"{kernels}: {found.ms:.1f} ms, eager {found.eager_ms:.1f} ms, {speed:.2f} times as fast; gradients differ "
            f"by {found.difference:.1%}" + ("" if agrees else f", more than {tolerance:.0%}: left out")
        )
        if agrees and speed > best:
            chosen, best = kernels, speed
    log.info("\n".join([f"kernels {chosen}, chosen by a forward and backward pass:", *lines]))
    return chosen


# ---- Results of earlier runs


def _key(config: PretrainConfig, device: torch.device) -> str:
    """Return what the speed and the agreement depend on: GPU, driver, versions, code and shapes."""
    package, driver = Path(__file__).parent, Path("/proc/driver/nvidia/version")
    files = sorted([*package.glob("kernels/*.py"), *package.glob("models/*.py"), *package.glob("methods/*.py")])
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    parts = [
        torch.cuda.get_device_name(device), *(driver.read_text().splitlines()[:1] if driver.exists() else []),
        torch.__version__, code, str(choose_precision(config.precision, device)),
    ]  # fmt: skip
    return " ".join([*parts, *(f"{name}={getattr(config, name)}" for name in SHAPES)])


def _file() -> Path:
    return cache_folder() / "kernels.json"


def _read() -> dict[str, Any]:
    try:
        found = json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _trial_of(value: object) -> Trial | None:
    """Return the trial that JSON of another process describes, if it does."""
    if isinstance(value, list) and len(value) == 3 and all(isinstance(one, float) for one in value):
        return Trial(*value)
    return None


def _remember(entries: Mapping[str, object]) -> None:
    """Set entries (None: remove); without a writable cache the next run measures again."""
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        content = {**_read(), **entries}
        atomic.write_json(_file(), {name: value for name, value in content.items() if value is not None})
    except OSError as error:
        log.warning(f"cannot write {_file()} ({error.strerror}): the next run measures its kernels again")


# ---- A trial


def try_in_process(config: PretrainConfig, kernels: Kernels, device: torch.device, seconds: float) -> Trial | str:
    """Try a candidate in another process; return why there are no figures if it fails."""
    of_ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {name: value for name, value in os.environ.items() if name not in of_ranks}
    order = json.dumps([dataclasses.asdict(config), kernels, str(device)])
    command = [sys.executable, "-m", "dino_xcit.kernel_choice"]
    try:
        ended = subprocess.run(
            command,
            input=order,
            capture_output=True,
            text=True,
            env=environment,
            timeout=max(1.0, seconds),
            check=False,
            cwd=Path(__file__).parent.parent,  # where Python finds this package
        )
    except subprocess.TimeoutExpired:
        return f"it took more than {seconds:.0f} s"
    try:
        found = _trial_of(json.loads(ended.stdout.splitlines()[-1]))
    except (ValueError, IndexError):
        found = None
    if ended.returncode or found is None:
        lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
        return f"it failed with: {lines[-1][:200]}"
    return found


def trial(config: PretrainConfig, kernels: Kernels, device: torch.device) -> Trial:
    """Compare a candidate with eager in this process, on noise of the run's shapes.

    If the batch does not fit into the memory, the trial has half of it.
    """
    set_numerics(config, device)
    config = dataclasses.replace(config, kernels="eager")
    if config.activation_checkpointing == "auto":  # the stages are chosen after the kernels
        config = dataclasses.replace(config, activation_checkpointing="on")
    while True:
        try:
            return _compare(config, kernels, device)
        except torch.cuda.OutOfMemoryError:
            if config.batch_size_per_gpu < 4:
                raise
        config = dataclasses.replace(config, batch_size_per_gpu=config.batch_size_per_gpu // 2)
        torch.cuda.empty_cache()


def _compare(config: PretrainConfig, kernels: Kernels, device: torch.device) -> Trial:
    torch.manual_seed(0)
    method, batch = build_method(config, device), noise_batch(config, config.batch_size_per_gpu, device)
    assert isinstance(method, StudentTeacher)
    _enlarge_branches(method)
    eager, expected = _results(method, batch, config, device)
    eager_ms = _milliseconds(method, batch, config, device)
    method.use_kernels(kernels)
    other, found = _results(method, batch, config, device)
    ms = _milliseconds(method, batch, config, device)
    whole = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(expected.values()))))
    differences = [(other - eager).abs() / eager.abs()]
    for name, gradient in expected.items():
        # A gradient that is zero in exact arithmetic is noise.
        size = gradient.norm().clamp_min(1e-3 * whole)
        differences.append((found[name] - gradient).norm() / size)
    return Trial(eager_ms, ms, float(torch.stack(differences).amax()))


@torch.no_grad()
def _enlarge_branches(method: StudentTeacher) -> None:
    """Change initial weights so that every kernel matters: LayerScale starts at 1e-5, attention nearly uniform."""
    for name, parameter in method.student.backbone.named_parameters():
        if "gamma" in name:
            parameter.fill_(1.0)
        elif name.endswith("temperature"):
            parameter.fill_(4.0)
        elif name.endswith("weight") and parameter.ndim == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
    method.teacher.load_state_dict(method.student.state_dict())


def _results(
    method: Method, batch: Batch, config: PretrainConfig, device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and the gradients."""
    loss = _pass(method, batch, config, device)
    parameters = method.trained.named_parameters()
    return loss, {name: one.grad.clone() for name, one in parameters if one.grad is not None}


def _pass(method: Method, batch: Batch, config: PretrainConfig, device: torch.device) -> Tensor:
    method.trained.zero_grad(set_to_none=True)
    return method.forward_backward(batch, Schedules.of(config, 1, 1).at(0, torch.ones((), device=device)))[0]


def _milliseconds(method: Method, batch: Batch, config: PretrainConfig, device: torch.device) -> float:
    """Return the shortest time of a pass."""
    times = []
    for _ in range(PASSES):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = perf_counter()
        _pass(method, batch, config, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (perf_counter() - began))
    return min(times)


if __name__ == "__main__":
    given, candidate, place = json.load(sys.stdin)
    values: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    print(json.dumps(trial(PretrainConfig(**values), candidate, torch.device(place))))
