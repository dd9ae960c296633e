"""The state of a run, and one optimizer step.

The host never waits for the device in a step: the decision to accept or skip it stays a tensor there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from dino_xcit.augment import group_by_size
from dino_xcit.config import PretrainConfig, TrainConfig
from dino_xcit.data.loader import Batch
from dino_xcit.methods import Method, Stats, build_method
from dino_xcit.methods.student_teacher import choose_precision
from dino_xcit.optim import Rates, Schedules, build_optimizer, clip_gradients, gradient_norms, set_rates
from dino_xcit.runtime import distributed
from dino_xcit.runtime.memory import keep_freed_memory
from dino_xcit.runtime.require_triton import require_triton


class Buffers:
    """Buffers of one or more networks, read and written as one flat tensor per dtype: few launches on a GPU."""

    def __init__(self, *modules: nn.Module) -> None:
        self._views: dict[torch.dtype, list[Tensor]] = {}
        """Flat views of the buffers, [elements] each."""
        for module in modules:
            for buffer in module.buffers():
                self._views.setdefault(buffer.dtype, []).append(buffer.view(-1))
        self._sizes = {kind: list(map(len, views)) for kind, views in self._views.items()}

    def read(self) -> dict[torch.dtype, Tensor]:
        """Return copies of the buffers, [elements] by dtype."""
        return {kind: torch.cat(views) for kind, views in self._views.items()}

    def write(self, flat: Mapping[torch.dtype, Tensor]) -> None:
        """Set the buffers to values as returned by :meth:`read`."""
        for kind, views in self._views.items():
            torch._foreach_copy_(views, flat[kind].split(self._sizes[kind]))


@dataclass
class TrainState:
    """Everything that a step changes and a checkpoint contains."""

    method: Method
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    skipped_steps: Tensor
    """Number of skipped steps; int64 scalar on the device."""
    skipped_in_a_row: Tensor
    """Number of skipped steps since the last accepted one; int64 scalar on the device."""
    step: int = 0
    """Completed steps, including skipped ones."""
    parameters: dict[str, nn.Parameter] = field(init=False)
    """Those of ``method.trained``, by name."""
    buffers: Buffers = field(init=False)
    """Those of the method's networks in train mode. A skipped step restores them."""

    def __post_init__(self) -> None:
        networks = (self.method.trained, self.method.teacher)
        self.parameters = dict(self.method.trained.named_parameters())
        self.buffers = Buffers(*(network for network in networks if network is not None))


def set_numerics(config: TrainConfig, device: torch.device) -> None:
    """Select deterministic kernels with ``--deterministic``, otherwise the fastest ones.

    Raises:
        InputError: ``kernels`` is ``fused``, but Triton's kernels cannot run on ``device``.
    """
    if config.kernels == "fused":
        require_triton(device, "kernels fused", "--kernels eager")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where Triton launches
    if device.type == "cpu":
        keep_freed_memory()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required for deterministic cuBLAS
        torch.use_deterministic_algorithms(True)
    else:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")


def noise_batch(config: PretrainConfig, images: int, device: torch.device) -> Batch:
    """Return a batch of noise with the largest crops of the run."""
    sides = [view.size for view in config.augmentation().views]
    groups = group_by_size(sides)
    shapes = [(len(group) * images, config.channels, sides[group[0]], sides[group[0]]) for group in groups]
    noise = [torch.randint(256, shape, dtype=torch.uint8, device=device) for shape in shapes]
    crops = noise if config.channels == 3 else [one / 255 for one in noise]
    return Batch(crops, [len(group) for group in groups], epoch=0, indices=torch.arange(images, device=device))


def build_state(config: PretrainConfig, device: torch.device) -> TrainState:
    """Build the state of a new run of ``config.method``, with the same weights on every rank."""
    return new_state(config, build_method(config, device), device)


def new_state(config: TrainConfig, method: Method, device: torch.device) -> TrainState:
    """Build the state of a new run of a method."""
    fp16 = choose_precision(config.precision, device) is torch.float16
    return TrainState(
        method=method,
        optimizer=build_optimizer(config.optimizer, method.parameter_groups()),
        scaler=torch.amp.GradScaler(device.type, enabled=fp16),
        skipped_steps=torch.zeros((), dtype=torch.int64, device=device),
        skipped_in_a_row=torch.zeros((), dtype=torch.int64, device=device),
    )


@dataclass
class StepResult:
    """Results of one step; tensors are on the device."""

    rates: Rates
    loss: Tensor
    """Float32 scalar: mean over all forward passes and ranks."""
    gradient_norm: Tensor
    """Scalar: global norm before clipping."""
    gradient_norms: Tensor
    """[parameters with a gradient]: the norm of each gradient before clipping."""
    gradient_names: list[str]
    """The names of these parameters in ``method.trained``."""
    accepted: Tensor
    """Boolean scalar: false if the step was skipped."""
    skipped_steps: Tensor
    """Number of skipped steps of the run so far."""
    stats: Stats
    """Statistics of the method, summed over all forward passes and ranks."""
    features: Tensor | None
    """[rows, D] of this rank's last forward pass, if the method provides them."""
    prototype_logits: Tensor | None
    """[rows, K] of this rank's last forward pass, if the method has prototypes."""

    def metrics(self, method: Method) -> dict[str, float]:
        """Return scalars for the log; waits for the device."""
        on_device = {"loss": self.loss, **method.metrics(self.stats), "gradient_norm": self.gradient_norm}
        names = ("lr", "weight_decay", "momentum", "teacher_temp")
        rates = {name: value for name in names if not math.isnan(value := getattr(self.rates, name))}
        return {
            name: float(value) for name, value in (on_device | {"skipped_steps": self.skipped_steps} | rates).items()
        }


def train_step(state: TrainState, batches: Sequence[Batch], schedules: Schedules, config: TrainConfig) -> StepResult:
    """Run one optimizer step over the forward passes in ``batches`` (more than one: gradient accumulation).

    If the loss, the method's statistics, the gradients or the BatchNorm statistics are not finite on any rank, the step
    is skipped: parameters, optimizer, teacher and BatchNorm buffers are unchanged on every rank.
    """
    method, optimizer = state.method, state.optimizer
    device = state.skipped_steps.device
    # Dropout in timm backbones and torchvision's detectors use PyTorch's generators: exact resuming needs seeds.
    distributed.seed_generators(_generator_seed(config.seed, state.step, distributed.rank()), device)
    loss_scale = state.scaler.scale(torch.ones((), device=device)) / len(batches)
    rates = schedules.at(state.step, loss_scale)
    set_rates(optimizer, rates.lr, rates.weight_decay)
    before = state.buffers.read()
    statistics: dict[torch.dtype, Tensor] = {}  # sums of the BatchNorm statistics after each forward pass

    # ---- teacher, student, loss, gradients
    optimizer.zero_grad(set_to_none=True)
    loss, stats = torch.zeros((), device=device), Stats()
    for number, batch in enumerate(batches):
        if number > 0:  # start each pass from the same statistics, as on separate ranks
            state.buffers.write(before)
        with distributed.no_sync(method.ddp_student, skip=number + 1 < len(batches)):
            pass_loss, pass_stats = method.forward_backward(batch.to(device), rates)
        after = state.buffers.read()
        for kind in filter(lambda kind: kind.is_floating_point, after):
            statistics[kind] = statistics[kind] + after[kind] if kind in statistics else after[kind]
        loss += pass_loss.detach() / len(batches)
        stats = {name: value + stats[name] if stats else value for name, value in pass_stats.items()}

    # ---- finite check over all ranks
    if state.scaler.is_enabled():
        state.scaler.unscale_(optimizer)
    named = {name: parameter.grad for name, parameter in state.parameters.items() if parameter.grad is not None}
    gradients = list(named.values())
    norms, gradient_norm = gradient_norms(gradients)
    # Include the BatchNorm statistics: the variance of finite activations can overflow.
    checked = torch._foreach_norm([loss, *stats.values(), *statistics.values()], torch.inf)
    finite = torch.stack([*checked, gradient_norm]).amax() < torch.inf  # the maximum propagates NaN
    failures = (~finite).to(torch.float32)
    distributed.all_reduce_sum([failures, loss, *stats.values(), *statistics.values()])
    rejected = failures > 0
    accepted = ~rejected
    after |= {kind: total / (distributed.world_size() * len(batches)) for kind, total in statistics.items()}
    state.buffers.write({kind: torch.where(accepted, new, before[kind]) for kind, new in after.items()})
    loss /= distributed.world_size()

    # ---- update, or no change if the step is skipped
    clip_gradients(gradients, norms, config.clip_grad, config.clip_mode)
    for parameter in method.frozen_parameters(rates):
        parameter.grad = None
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = rejected.to(torch.float32)  # type: ignore[attr-defined]
    optimizer.step()
    if state.scaler.is_enabled():
        state.scaler.update()
    method.after_step(stats, rates, accepted)
    state.skipped_steps = state.skipped_steps + rejected
    state.skipped_in_a_row.add_(1).mul_(rejected)
    state.step += 1
    return StepResult(
        rates, loss, gradient_norm, norms, list(named), accepted, state.skipped_steps, stats,
        method.features, method.prototype_logits,
    )  # fmt: skip


def _generator_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
