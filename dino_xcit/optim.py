"""Schedules, parameter groups, optimizers and gradient clipping, without host synchronisation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dino_xcit.config import PretrainConfig
from dino_xcit.errors import InputError


@dataclass(frozen=True)
class CosineSchedule:
    """Linear from ``warmup_start`` to ``base`` over ``warmup_steps``, then half a cosine to ``final``.

    Steps are numbered as in facebookresearch/dino: the last warm-up step and the first cosine step both have ``base``,
    and the last step of the run is one step before ``final``.
    """

    base: float
    final: float
    total_steps: int
    warmup_steps: int = 0
    warmup_start: float = 0.0

    def at(self, step: int) -> float:
        """Return the value for the 0-based ``step``; ``final`` after the end."""
        if step < self.warmup_steps:
            span = max(1, self.warmup_steps - 1)
            return self.warmup_start + (self.base - self.warmup_start) * step / span
        if step >= self.total_steps:
            return self.final
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.final + 0.5 * (self.base - self.final) * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class LinearByEpoch:
    """Linear from ``start`` to ``end`` over the first ``ramp_epochs`` epochs (both ends included), then ``end``."""

    start: float
    end: float
    ramp_epochs: int

    def at(self, epoch: int) -> float:
        """Return the value for the 0-based ``epoch``."""
        if epoch >= self.ramp_epochs:
            return self.end
        if self.ramp_epochs == 1:
            return self.start
        return self.start + (self.end - self.start) * epoch / (self.ramp_epochs - 1)


class Schedule(Protocol):
    """A value that changes during a run."""

    def at(self, step: int) -> float:
        """Return the value for the 0-based step (or epoch)."""
        ...


@dataclass(frozen=True)
class Constant:
    """The same value at every step."""

    value: float

    def at(self, step: int) -> float:
        """Return the value."""
        return self.value


@dataclass(frozen=True)
class Rates:
    """The scheduled values of one step."""

    step: int
    """0-based."""
    epoch: int
    """0-based."""
    lr: float
    weight_decay: float
    momentum: float = math.nan
    """EMA momentum of the teacher; NaN for methods without one."""
    teacher_temp: float = math.nan
    """Softmax temperature of the teacher; NaN for methods without one."""
    loss_scale: float | Tensor = 1.0
    """Multiply the loss by this before ``backward()``: 1 / accumulation_steps, times the loss scale of fp16."""


@dataclass(frozen=True)
class Schedules:
    """All schedules of a run, and its length."""

    lr: Schedule
    weight_decay: Schedule
    momentum: Schedule
    teacher_temp: Schedule
    """By epoch, unlike the others."""
    steps_per_epoch: int
    total_steps: int
    warning: str = ""
    """Settings that do not fit the length of the run; empty if none."""

    @classmethod
    def of(cls, config: PretrainConfig, steps_per_epoch: int, global_batch: int) -> Schedules:
        """Build the schedules of a run; a warm-up that covers the whole run is shortened to a tenth of it."""
        total = config.epochs * steps_per_epoch
        warmup, warning = round(config.warmup_epochs * steps_per_epoch), ""
        if warmup >= total:
            warmup = total // 10
            warning = (
                f"warmup_epochs {config.warmup_epochs:g} is not shorter than the run (epochs {config.epochs}): "
                f"shortened to {warmup / steps_per_epoch:g}"
            )
        too_long = [warning] if warning else []
        if config.method == "dino" and config.freeze_last_layer >= config.epochs:
            too_long.append(f"freeze_last_layer {config.freeze_last_layer} freezes the prototypes for the whole run")
        if config.warmup_teacher_temp_epochs >= config.epochs and config.warmup_teacher_temp != config.teacher_temp:
            too_long.append(
                f"warmup_teacher_temp_epochs {config.warmup_teacher_temp_epochs} is not shorter than the run: the "
                f"teacher temperature does not reach {config.teacher_temp:g}"
            )
        scale = global_batch / config.lr_reference_batch if config.lr_reference_batch else 1.0
        return cls(
            lr=CosineSchedule(config.lr * scale, config.min_lr, total, warmup, config.warmup_start_lr),
            weight_decay=CosineSchedule(config.weight_decay, config.weight_decay_end, total),
            momentum=CosineSchedule(config.momentum_teacher, 1.0, total),
            teacher_temp=LinearByEpoch(
                config.warmup_teacher_temp, config.teacher_temp, config.warmup_teacher_temp_epochs
            ),
            steps_per_epoch=steps_per_epoch,
            total_steps=total,
            warning="; ".join(too_long),
        )

    @property
    def epochs(self) -> int:
        """Number of epochs of the run; the last one may be incomplete."""
        return -(-self.total_steps // self.steps_per_epoch)

    def at(self, step: int, loss_scale: float | Tensor = 1.0) -> Rates:
        """Return the values of the 0-based ``step``."""
        epoch = step // self.steps_per_epoch
        return Rates(
            step=step,
            epoch=epoch,
            lr=self.lr.at(step),
            weight_decay=self.weight_decay.at(step),
            momentum=self.momentum.at(step),
            teacher_temp=self.teacher_temp.at(epoch),
            loss_scale=loss_scale,
        )


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Return two groups: with weight decay, and without it for biases and 1-D tensors (norms, LayerScale).

    Class token, XCA temperature and trainable prototype norms are not 1-D, so they decay, as in facebookresearch/dino.
    """
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (decayed if decays(name, parameter) else exempt).append(parameter)
    return [{"params": decayed, "decays": True}, {"params": exempt, "decays": False, "weight_decay": 0.0}]


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter has weight decay: not biases and 1-D tensors."""
    return not name.endswith(".bias") and parameter.ndim != 1


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (arXiv 1708.03888) with momentum, as DINO's ``--optimizer lars``.

    Only tensors with more than one dimension get weight decay and a rate scaled by eta * |w| / |gradient|.
    ``found_inf``, a device scalar, makes a step a no-op, as in PyTorch's fused optimizers.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 1e-3,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Run one update; ``closure`` is not supported."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            matrices = [parameter for parameter in parameters if parameter.ndim > 1]
            decayed = self._scaled_updates(matrices, group["weight_decay"], group["eta"]) if matrices else []
            scaled = iter(decayed)
            updates = [next(scaled) if parameter.ndim > 1 else parameter.grad for parameter in parameters]
            for parameter in parameters:
                if "mu" not in self.state[parameter]:
                    self.state[parameter]["mu"] = torch.zeros_like(parameter)
            mus = [self.state[parameter]["mu"] for parameter in parameters]
            lr, momentum = group["lr"], group["momentum"]
            if self.found_inf is not None:  # updates of 0, as 0 * NaN is NaN
                rejected = self.found_inf.bool()
                flat = torch.where(rejected, 0.0, torch.cat([update.reshape(-1) for update in updates]))
                parts = flat.split([update.numel() for update in updates])
                updates = [part.view_as(update) for part, update in zip(parts, updates, strict=True)]
                lr, momentum = (
                    torch.where(rejected, skipped, value) for skipped, value in ((0.0, lr), (1.0, momentum))
                )
            torch._foreach_mul_(mus, momentum)
            torch._foreach_add_(mus, updates)
            torch._foreach_sub_(parameters, torch._foreach_mul(mus, lr))

    @staticmethod
    def _scaled_updates(matrices: list[Tensor], weight_decay: float, eta: float) -> list[Tensor]:
        """Return gradient plus weight decay of each matrix, scaled to eta times the matrix's norm."""
        gradients: list[Any] = [matrix.grad for matrix in matrices]
        updates = list(torch._foreach_add(gradients, matrices, alpha=weight_decay))
        lengths, update_lengths = (torch.stack(torch._foreach_norm(tensors)) for tensors in (matrices, updates))
        usable = (lengths > 0) & (update_lengths > 0)
        scale_each(updates, torch.where(usable, eta * lengths / update_lengths, 1.0))
        return updates


OPTIMIZERS = ("adamw", "sgd", "lars")


def build_optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Build ``adamw``, ``sgd`` (momentum 0.9) or ``lars`` over groups as of :func:`parameter_groups`.

    :func:`set_rates` sets the rates at each step. The fused kernels support ``found_inf``, which skips a step without
    host synchronisation.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    if name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)
        for group in groups:
            for parameter in group["params"]:
                # A skipped first step would leave the buffer unset; zeros give the same first update.
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    if name == "lars":
        return LARS(groups)
    raise InputError(f"optimizer is {name!r}, expected one of {', '.join(OPTIMIZERS)}")


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set the learning rate of all groups, times their ``lr_scale``, and the weight decay of groups that decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        if group["decays"]:
            group["weight_decay"] = weight_decay


def gradient_norms(gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the L2 norm of each gradient, [len(gradients)], and of all together."""
    norms = torch.stack(torch._foreach_norm(gradients))
    return norms, torch.linalg.vector_norm(norms)


CLIP_MODES = ("per-parameter", "global")


@torch.no_grad()
def clip_gradients(gradients: Sequence[Tensor], norms: Tensor, limit: float, mode: str) -> None:
    """Scale gradients in place so that no norm exceeds ``limit``.

    Args:
        gradients: one per parameter.
        norms: their L2 norms, [len(gradients)].
        limit: maximum norm; 0: no clipping.
        mode: ``per-parameter`` clips each gradient by its own norm (as facebookresearch/dino); ``global`` clips all by
            their global norm.
    """
    if limit <= 0 or not gradients:
        return
    if mode == "global":
        total = torch.linalg.vector_norm(norms)
        torch._foreach_mul_(list(gradients), (limit / (total + 1e-6)).clamp(max=1.0))
    elif mode == "per-parameter":
        scale_each(gradients, (limit / (norms + 1e-6)).clamp(max=1.0))
    else:
        raise InputError(f"clip_mode is {mode!r}, expected one of {', '.join(CLIP_MODES)}")


def scale_each(tensors: Sequence[Tensor], factors: Tensor) -> None:
    """Multiply each tensor in place by its own factor, [len(tensors)]."""
    scalars = factors.unbind()
    if factors.is_cuda:  # foreach operators launch one kernel per tensor unless shapes and strides are equal
        flat = torch.cat([scalar.expand(tensor.numel()) for scalar, tensor in zip(scalars, tensors, strict=True)])
        parts = flat.split([tensor.numel() for tensor in tensors])
        scalars = tuple(p.as_strided(t.shape, t.stride()) for p, t in zip(parts, tensors, strict=True))
    torch._foreach_mul_(list(tensors), list(scalars))
