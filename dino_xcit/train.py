"""The state of a run, and one training step. B batch, V views, K prototypes.

Nothing in a step asks the device for a number: whether the step is accepted is decided, and acted on, there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from dino_xcit.augment import group_by_size
from dino_xcit.config import PretrainConfig
from dino_xcit.data.loader import Batch
from dino_xcit.loss import DINOLoss, entropy, feature_deviation, koleo
from dino_xcit.models import DINOHead, ViewNetwork, XCiT, build_backbone
from dino_xcit.models.droppath import hash_bits
from dino_xcit.optim import build_optimizer, clip_gradients, set_rates
from dino_xcit.runtime import distributed
from dino_xcit.schedule import CosineSchedule, LinearByEpoch
from dino_xcit.teacher import start_as_copy, update_teacher
from dino_xcit.transform import normalise


@dataclass(frozen=True)
class Schedules:
    """Every value that changes while training, as a function of the step or the epoch."""

    lr: CosineSchedule
    weight_decay: CosineSchedule
    momentum: CosineSchedule
    teacher_temp: LinearByEpoch
    steps_per_epoch: int
    notice: str = ""
    """What had to be changed to fit the run's length; empty if nothing."""

    @classmethod
    def of(cls, config: PretrainConfig, steps_per_epoch: int, global_batch: int) -> Schedules:
        """The schedules of a run; a warm-up that is not shorter than the run is cut to a tenth of it."""
        total = config.epochs * steps_per_epoch
        warmup, notice = round(config.warmup_epochs * steps_per_epoch), ""
        if warmup >= total:
            warmup = total // 10
            notice = (
                f"warmup_epochs {config.warmup_epochs:g} is not shorter than the run ({config.epochs} epochs): "
                f"shortened to {warmup / steps_per_epoch:g} epochs"
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
            notice=notice,
        )


@dataclass
class TrainState:
    """All that a step changes, and so all that a checkpoint must hold."""

    student: ViewNetwork
    teacher: ViewNetwork
    loss: DINOLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    """Steps done."""
    rejected: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    """Steps that were rejected because something in them was not finite; on the device."""
    rejected_in_a_row: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    """Of them, those since the last accepted one; on the device."""
    shared: nn.Module = field(init=False)
    """The student as called in training: itself, or its DistributedDataParallel wrapping."""

    def __post_init__(self) -> None:
        self.shared = self.student


def build_state(config: PretrainConfig, device: torch.device) -> TrainState:
    """A fresh run: the teacher is a copy of the student, the same weights on every process."""
    torch.manual_seed(config.seed)

    def network(drop_path_rate: float) -> ViewNetwork:
        backbone = build_backbone(config.arch, drop_path_rate=drop_path_rate)
        head = DINOHead(
            int(backbone.embed_dim),  # type: ignore[arg-type]
            config.out_dim,
            use_bn=config.use_bn_in_head,
            norm_last_layer=config.norm_last_layer,
            hidden_dim=config.head_hidden_dim,
            bottleneck_dim=config.head_bottleneck_dim,
        )
        return ViewNetwork(backbone, head)

    student, teacher = network(config.drop_path_rate), network(0.0)
    student = distributed.synchronise_batch_norm(student, device).to(device)  # type: ignore[assignment]
    teacher = distributed.synchronise_batch_norm(teacher, device).to(device)  # type: ignore[assignment]
    start_as_copy(teacher, student)
    if isinstance(student.backbone, XCiT) and isinstance(teacher.backbone, XCiT):
        student.backbone.activation_checkpointing = config.activation_checkpointing
        if config.compile:
            student.backbone.compile_blocks()
            teacher.backbone.compile_blocks()
    scaled = choose_precision(config.precision, device) is torch.float16
    state = TrainState(
        student=student,
        teacher=teacher,
        loss=DINOLoss(config.out_dim, config.student_temp, config.center_momentum, centering=config.centering).to(
            device
        ),
        optimizer=build_optimizer(config.optimizer, student),
        scaler=torch.amp.GradScaler(device.type, enabled=scaled),
        rejected=torch.zeros((), dtype=torch.int64, device=device),
        rejected_in_a_row=torch.zeros((), dtype=torch.int64, device=device),
    )
    state.shared = distributed.share_gradients(student, device)
    if distributed.world_size() > 1:
        _settle_gradient_exchange(state, config, device)
    return state


def _settle_gradient_exchange(state: TrainState, config: PretrainConfig, device: torch.device) -> None:
    """One pass over noise whose gradients are thrown away.

    DistributedDataParallel packs its messages anew after the first pass, in the order in which gradients came, and a
    sum over more than two processes depends on the packing. Without this the first step of a resumed run would be
    summed otherwise than the same step of a run that was never interrupted.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = [view.size for view in config.augmentation().views]
    # Of the training's shape where kernels are compiled for shapes.
    images = config.batch_size_per_gpu if config.compile else 2
    crops = [
        torch.randn(images * len(group), 3, sizes[group[0]], sizes[group[0]], generator=generator).to(device)
        for group in group_by_size(sizes)
    ]
    buffers = _batch_norm_buffers(state)
    before = [buffer.clone() for buffer in buffers]
    with _autocast(config, device):
        state.shared(crops).logits.sum().backward()
    state.optimizer.zero_grad(set_to_none=True)
    if buffers:
        torch._foreach_copy_(buffers, before)


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """``auto``, ``fp32``, ``bf16`` or ``fp16`` to the dtype that autocast shall use."""
    if wanted == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted]


@dataclass
class StepResult:
    """Figures of one step, all on the device."""

    loss: Tensor
    gradient_norm: Tensor
    """Of all gradients together, before clipping."""
    accepted: Tensor
    last_loss: Tensor
    """Of this process's last forward pass."""
    teacher_logits: Tensor
    """[2 * B, K] of that forward pass."""
    teacher_features: Tensor
    """[2 * B, D] of that forward pass."""

    def figures(self, state: TrainState, schedules: Schedules) -> dict[str, float]:
        """Numbers for the log of the step that was just done; reading them waits for the device.

        Among them what shows a collapse: teacher entropy (0: one prototype takes all; ln K: uniform), KL divergence
        of the student from the teacher (0: nothing left to learn), spread of the features (0: all images alike).
        """
        step = state.step - 1
        teacher_temp = schedules.teacher_temp.at(step // schedules.steps_per_epoch)
        teacher_entropy = entropy(state.loss.teacher_probabilities(self.teacher_logits, teacher_temp))
        of_last_pass = [teacher_entropy, self.last_loss - teacher_entropy, feature_deviation(self.teacher_features)]
        distributed.all_reduce_sum(of_last_pass)
        mean_entropy, divergence, deviation = (figure / distributed.world_size() for figure in of_last_pass)
        on_device = {
            "loss": self.loss,
            "teacher_entropy": mean_entropy,
            "kl": divergence,
            "feature_std": deviation,
            "gradient_norm": self.gradient_norm,
            "rejected_steps": state.rejected,
        }
        return {name: float(value) for name, value in on_device.items()} | {
            "lr": schedules.lr.at(step),
            "weight_decay": schedules.weight_decay.at(step),
            "momentum": schedules.momentum.at(step),
            "teacher_temp": teacher_temp,
        }


def train_step(state: TrainState, batches: Sequence[Batch], schedules: Schedules, config: PretrainConfig) -> StepResult:
    """One optimizer step over the forward passes in ``batches`` (more than one: gradient accumulation).

    A step in which the loss, the teacher's logits, the gradients or the BatchNorm statistics are not finite on any
    process leaves parameters, optimizer, teacher, centre and BatchNorm buffers as they were, on every process.
    """
    device = state.loss.center.device
    # Nothing of ours draws from PyTorch's generators, but a timm backbone's dropout does: so its coins, and the
    # generators' state, follow from the step, and a resumed run has the same.
    torch.manual_seed(_generator_seed(config.seed, state.step, distributed.rank()))
    epoch = state.step // schedules.steps_per_epoch
    teacher_temp = schedules.teacher_temp.at(epoch)
    set_rates(state.optimizer, schedules.lr.at(state.step), schedules.weight_decay.at(state.step))
    buffers = _batch_norm_buffers(state)
    before = [buffer.clone() for buffer in buffers]
    running = [buffer for buffer in buffers if buffer.is_floating_point()]
    running_sum = [torch.zeros_like(buffer) for buffer in running]

    # ---- teacher, student, loss, gradients
    state.optimizer.zero_grad(set_to_none=True)
    loss_sum = torch.zeros((), device=device)
    logits_sum = torch.zeros_like(state.loss.center)
    for number, batch in enumerate(batches):
        if number > 0 and buffers:  # each pass starts from the same statistics, as it would on a process of its own
            torch._foreach_copy_(buffers, before)
        batch = batch.to(device)
        crops = [normalise(crop, config.mean, config.std) for crop in batch.crops]
        keys = drop_path_keys(batch, config.seed) if config.drop_path_rate > 0 else None
        with distributed.without_sharing(state.shared, skip=number + 1 < len(batches)), _autocast(config, device):
            with torch.no_grad():
                teacher = state.teacher([_globals(crops, batch)])
            student = state.shared(crops, keys)
        loss = state.loss(student.logits, teacher.logits, teacher_temp) / len(batches)
        total = loss
        if config.koleo_weight > 0:
            of_globals = student.features[: len(teacher.features)]  # they come first
            total = loss + config.koleo_weight / len(batches) * koleo(of_globals, state.loss.global_views)
        state.scaler.scale(total).backward()
        if running:
            torch._foreach_add_(running_sum, running)
        loss_sum += loss.detach()
        logits_sum += teacher.logits.detach().to(torch.float32).sum(dim=0, keepdim=True)

    # ---- is all of it finite, everywhere?
    if state.scaler.is_enabled():
        state.scaler.unscale_(state.optimizer)
    gradients = [parameter.grad for parameter in state.student.parameters() if parameter.grad is not None]
    norms = torch._foreach_norm(gradients)
    total_norm = torch.linalg.vector_norm(torch.stack(norms))
    finite = torch.isfinite(loss_sum) & torch.isfinite(logits_sum).all() & torch.isfinite(total_norm)
    if running:  # an activation of 1e25 is finite, and so is what BatchNorm makes of it, but its variance is not
        finite &= torch.isfinite(torch.stack(torch._foreach_norm(running_sum, torch.inf))).all()
    failures = (~finite).to(torch.float32)
    rows = torch.full((), float(sum(2 * len(batch.indices) for batch in batches)), device=device)
    distributed.all_reduce_sum([failures, logits_sum, loss_sum, rows, *running_sum])
    accepted = failures == 0
    if running:
        torch._foreach_div_(running_sum, distributed.world_size() * len(batches))
        torch._foreach_copy_(running, running_sum)
    loss_sum /= distributed.world_size()

    # ---- student, teacher, centre
    clip_gradients(gradients, norms, config.clip_grad, config.clip_mode)
    if epoch < config.freeze_last_layer:
        for parameter in state.student.head.last_layer.parameters():
            parameter.grad = None
    state.optimizer.grad_scale = None  # type: ignore[attr-defined]
    state.optimizer.found_inf = (~accepted).to(torch.float32)  # type: ignore[attr-defined]
    state.optimizer.step()
    if state.scaler.is_enabled():
        state.scaler.update()
    update_teacher(
        list(state.teacher.parameters()),
        [parameter.detach() for parameter in state.student.parameters()],
        schedules.momentum.at(state.step),
        accepted,
    )
    state.loss.update_center(logits_sum / rows, accepted)
    for buffer, old in zip(buffers, before, strict=True):
        buffer.copy_(torch.where(accepted, buffer, old))
    state.rejected += ~accepted
    state.rejected_in_a_row.copy_(torch.where(accepted, 0, state.rejected_in_a_row + 1))
    state.step += 1
    last = loss.detach() * len(batches)
    return StepResult(loss_sum, total_norm, accepted, last, teacher.logits.detach(), teacher.features.detach())


def _generator_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def drop_path_keys(batch: Batch, seed: int) -> list[Tensor]:
    """Keys for drop-path, one a view of each image, from (seed, epoch, image, view) alone; shaped like the crops."""
    start, keys = 0, []
    image = hash_bits(batch.indices + (batch.epoch << 32)) ^ (seed & 0xFFFFFFFF)
    for views in batch.views:
        view = torch.arange(start, start + views, device=image.device, dtype=torch.int64)
        keys.append(hash_bits(image[None, :] + (view[:, None] + 1) * 0x9E3779B1).flatten())
        start += views
    return keys


def _globals(crops: list[Tensor], batch: Batch) -> Tensor:
    """The two global views alone: local crops of the same size share their tensor."""
    return crops[0][: 2 * len(batch.indices)]


def _batch_norm_buffers(state: TrainState) -> list[Tensor]:
    return [*state.student.buffers(), *state.teacher.buffers()]


def _autocast(config: PretrainConfig, device: torch.device) -> AbstractContextManager[object]:
    dtype = choose_precision(config.precision, device)
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype)
