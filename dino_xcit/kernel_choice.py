"""``--kernels auto``: the fastest kernels whose loss and gradients agree with eager's, measured on the run's own GPU.

Each candidate is tried in a process of its own, so a kernel that fails cannot end the run.
"""

from __future__ import annotations

import dataclasses
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
from dino_xcit.methods import Method, build_method
from dino_xcit.methods.student_teacher import StudentTeacher, choose_precision
from dino_xcit.models.xcit import Kernels
from dino_xcit.optim import Schedules
from dino_xcit.runtime import atomic, distributed
from dino_xcit.runtime import logging as log
from dino_xcit.train import noise_batch, set_numerics

SECONDS = 60.0
"""Time for all candidates."""
PASSES = 5
"""Passes of which the shortest counts."""
TOLERANCE = {torch.float32: 0.01, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Largest relative difference from eager's gradients; TF32 for float32. A wrong kernel differs by 1."""
SHAPES = (
    "arch", "method", "batch_size_per_gpu", "out_dim", "head_hidden_dim", "head_bottleneck_dim", "use_bn_in_head",
    "local_crops_number", "global_crops_size", "local_crops_size", "drop_path_rate", "activation_checkpointing",
)  # fmt: skip
"""Settings on which the speed depends."""


class Trial(NamedTuple):
    """A candidate beside eager, for one forward and backward pass."""

    eager_ms: float
    ms: float
    difference: float
    """Largest relative difference of the loss or of the gradient of a parameter."""
    failed: str = ""
    """Why there are no figures; empty if there are."""


def choose(config: PretrainConfig, device: torch.device, stored: Mapping[str, Any]) -> PretrainConfig:
    """Return the settings with ``kernels`` chosen. Must be called on every rank; rank 0 measures.

    A run that resumes keeps its kernels. On a CPU, with ``deterministic`` and for other networks than this project's
    XCiT, the choice is ``eager``.

    Args:
        stored: settings in the checkpoint from which the run resumes.
    """
    if config.kernels == "compile":
        distributed.on_main(lambda: _remember(f"{_key(config, device)} compiled", True))
    if config.kernels != "auto":
        return config
    kept = stored.get("kernels", "auto")
    if device.type != "cuda" or config.deterministic or not config.is_xcit:
        kept = "eager"
    if kept == "auto":
        kept = distributed.on_main(lambda: fastest(config, device))
    return dataclasses.replace(config, kernels=kept)


def fastest(config: PretrainConfig, device: torch.device) -> Kernels:
    """Try the candidates that the cache lacks, print all, and return the fastest that agrees with eager."""
    key, known = _key(config, device), _read()
    candidates: list[Kernels] = ["fused", "compile"] if f"{key} compiled" in known else ["fused"]
    tolerance = TOLERANCE[choose_precision(config.precision, device)]
    end, best, lines = monotonic() + SECONDS, 1.0, []
    chosen: Kernels = "eager"
    for kernels in candidates:
        entry = f"{key} {kernels}"
        found = Trial(*known[entry]) if entry in known else try_in_process(config, kernels, device, end - monotonic())
        if found.failed:
            lines.append(f"{kernels}: left out, {found.failed}")
            continue
        if entry not in known:
            _remember(entry, found)
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
    """Return what the speed depends on: GPU, driver, versions and shapes."""
    parts = [torch.__version__, str(choose_precision(config.precision, device))]
    if device.type == "cuda":
        driver = Path("/proc/driver/nvidia/version")
        parts += [torch.cuda.get_device_name(device), *(driver.read_text().splitlines()[:1] if driver.exists() else [])]
    return " ".join([*parts, *(f"{name}={getattr(config, name)}" for name in SHAPES)])


def _file() -> Path:
    return cache_folder() / "kernels.json"


def _read() -> dict[str, Any]:
    try:
        found = json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(entry: str, value: object) -> None:
    """Add a result; without a writable cache the next run measures again."""
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        atomic.write_json(_file(), _read() | {entry: value})
    except OSError as error:
        log.warning(f"cannot write {_file()} ({error.strerror}): the next run measures its kernels again")


# ---- A trial


def try_in_process(config: PretrainConfig, kernels: Kernels, device: torch.device, seconds: float) -> Trial:
    """Try a candidate in another process."""
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
        return Trial(0.0, 0.0, 0.0, f"it took more than {seconds:.0f} s")
    lines = (ended.stdout if ended.returncode == 0 else ended.stderr).strip().splitlines()
    if ended.returncode:
        return Trial(0.0, 0.0, 0.0, f"it failed with: {lines[-1][:200] if lines else f'exit code {ended.returncode}'}")
    return Trial(*json.loads(lines[-1]))


def trial(config: PretrainConfig, kernels: Kernels, device: torch.device) -> Trial:
    """Compare a candidate with eager in this process, on noise of the run's shapes."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where Triton launches
    set_numerics(config, device)
    method = build_method(dataclasses.replace(config, kernels="eager"), device)
    assert isinstance(method, StudentTeacher)
    eager, expected = _results(method, config, device)
    eager_ms = _milliseconds(method, config, device)
    method.use_kernels(kernels)
    other, found = _results(method, config, device)
    ms = _milliseconds(method, config, device)
    whole = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(expected.values()))))
    differences = [(other - eager).abs() / eager.abs()]
    for name, gradient in expected.items():
        # A gradient that is zero in exact arithmetic is noise.
        size = gradient.norm().clamp_min(1e-3 * whole)
        differences.append((found[name] - gradient).norm() / size)
    return Trial(eager_ms, ms, float(torch.stack(differences).amax()))


def _results(method: Method, config: PretrainConfig, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and the gradients."""
    loss = _pass(method, config, device)
    parameters = method.trained.named_parameters()
    return loss, {name: one.grad.clone() for name, one in parameters if one.grad is not None}


def _pass(method: Method, config: PretrainConfig, device: torch.device) -> Tensor:
    """Run forward and backward pass over the same noise each time."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        batch = noise_batch(config, config.batch_size_per_gpu, device)
    method.trained.zero_grad(set_to_none=True)
    return method.forward_backward(batch, Schedules.of(config, 1, 1).at(0, torch.ones((), device=device)))[0]


def _milliseconds(method: Method, config: PretrainConfig, device: torch.device) -> float:
    """Return the shortest time of a pass."""
    times = []
    for _ in range(PASSES):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = perf_counter()
        _pass(method, config, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (perf_counter() - began))
    return min(times)


if __name__ == "__main__":
    given, candidate, place = json.load(sys.stdin)
    values: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    print(json.dumps(trial(PretrainConfig(**values), candidate, torch.device(place))))
