"""A student and its momentum teacher over multi-crop views. B batch, V views, D features."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dino_xcit.augment import group_by_size
from dino_xcit.config import PretrainConfig
from dino_xcit.data.loader import Batch
from dino_xcit.methods.method import Method, Stats
from dino_xcit.models import MultiCropOutput, MultiCropWrapper, XCiT, build_backbone
from dino_xcit.models.droppath import hash_bits
from dino_xcit.models.xcit import Kernels
from dino_xcit.optim import Rates
from dino_xcit.runtime import distributed
from dino_xcit.runtime.sync_batch_norm import synchronise_batch_norm
from dino_xcit.transform import normalise

GLOBAL_VIEWS = 2


class StudentTeacher(Method):
    """Base class of DINO and SimDINO; a subclass adds the loss in ``forward_backward``.

    The teacher starts as a copy of the student, gets no gradients and stays in train mode: its BatchNorm layers use the
    statistics of its own global crops.
    """

    def __init__(self, config: PretrainConfig, device: torch.device, build_head: Callable[[int], nn.Module]) -> None:
        """``build_head``: returns a head for the backbone's ``embed_dim``; called once per network."""
        self.config, self.device = config, device
        self.student = self._network(config.drop_path_rate, build_head)
        self.teacher: MultiCropWrapper = self._network(0.0, build_head)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.use_kernels("eager" if config.kernels == "auto" else config.kernels)
        self._update_teacher = Ema(self.teacher, self.student, as_vector=device.type == "cuda")
        self.trained, self.eval_backbone = self.student, self.teacher.backbone
        self.ddp_student = distributed.wrap_ddp(self.student, device)
        if distributed.world_size() > 1:
            self._settle_gradient_buckets()

    def _network(self, drop_path_rate: float, build_head: Callable[[int], nn.Module]) -> MultiCropWrapper:
        rate = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
        backbone = build_backbone(self.config.arch, self.config.channels, **rate)
        network = MultiCropWrapper(backbone, build_head(int(backbone.embed_dim)))  # type: ignore[arg-type]
        network = synchronise_batch_norm(network, self.device).to(self.device)  # type: ignore[assignment]
        if isinstance(network.backbone, XCiT) and self.config.activation_checkpointing == "on":
            network.backbone.recomputed_stages = network.backbone.stages
        return network.train()

    def use_kernels(self, kernels: Kernels) -> None:
        """Choose how XCiT's blocks, and the loss of a subclass, run in training."""
        self.kernels: Kernels = kernels
        for network in (self.student, self.teacher):
            if isinstance(network.backbone, XCiT):
                network.backbone.use_kernels(kernels)

    def forward(self, batch: Batch) -> tuple[MultiCropOutput, MultiCropOutput]:
        """Return the student's output over all views and the teacher's over the global views, view-major."""
        config = self.config
        crops = [normalise(crop, config.mean, config.std) for crop in batch.crops]
        # Local crops of the same size share the first tensor; global crops come first.
        global_crops = crops[0][: GLOBAL_VIEWS * len(batch.indices)]
        keys = drop_path_keys(batch, config.seed) if config.drop_path_rate > 0 else None
        with self._autocast():
            with torch.no_grad():
                teacher = self.teacher([global_crops])
            student = self.ddp_student(crops, keys)
        self.features = teacher.features.detach()
        return student, teacher

    def after_step(self, stats: Stats, rates: Rates, accepted: Tensor) -> None:
        """Update the teacher as an EMA of the student."""
        self._update_teacher(rates.momentum, accepted)

    def state_dict(self) -> dict[str, Any]:
        return {"student": self.student.state_dict(), "teacher": self.teacher.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = choose_precision(self.config.precision, self.device)
        return nullcontext() if dtype is torch.float32 else torch.autocast(self.device.type, dtype)

    def _settle_gradient_buckets(self) -> None:
        """Run one pass over noise and discard its gradients.

        DistributedDataParallel rebuilds its buckets after the first pass, and the rounding of a sum over more than two
        ranks depends on the buckets. Without this pass, the first step of a resumed run would differ from the same step
        of an uninterrupted run.
        """
        generator = torch.Generator().manual_seed(0)
        sizes = [view.size for view in self.config.augmentation().views]
        # torch.compile specialises on shapes, so use the batch size of the training.
        images = self.config.batch_size_per_gpu if self.kernels == "compile" else 2
        channels = self.config.channels
        shapes = [(images * len(group), channels, *[sizes[group[0]]] * 2) for group in group_by_size(sizes)]
        crops = [torch.randn(shape, generator=generator).to(self.device) for shape in shapes]
        buffers = list(self.student.buffers())
        before = [buffer.clone() for buffer in buffers]
        with self._autocast():
            self.ddp_student(crops).logits.sum().backward()
        self.student.zero_grad(set_to_none=True)
        if buffers:
            torch._foreach_copy_(buffers, before)


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """Return the autocast dtype for ``auto``, ``fp32``, ``bf16`` or ``fp16``."""
    if wanted == "auto":
        if device.type != "cuda":
            return torch.float32
        # GPUs before Ampere emulate bfloat16, slowly.
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted]


class Ema:
    """Exponential moving average of a student's parameters in a teacher."""

    def __init__(self, teacher: nn.Module, student: nn.Module, as_vector: bool) -> None:
        """``as_vector``: make the teacher's parameters views of one vector. An update then takes two kernels on a GPU;
        on a CPU it would copy the student."""
        self._networks, self._as_vector = (teacher, student), as_vector
        self._teacher = [flattened(teacher)] if as_vector else list(teacher.parameters())
        self._student = [one.detach().view(-1) if as_vector else one for one in student.parameters()]

    def __deepcopy__(self, memo: dict[int, Any]) -> Ema:
        """Refer to the copied networks: copies of the views would not."""
        return Ema(*copy.deepcopy(self._networks, memo), self._as_vector)

    @torch.no_grad()
    def __call__(self, momentum: float, accepted: Tensor | None = None) -> None:
        """Update teacher <- momentum * teacher + (1 - momentum) * student, unless ``accepted`` is false.

        Args:
            momentum: share of the teacher that is kept.
            accepted: boolean scalar on the device, not read on the host; None: accepted.
        """
        student = [torch.cat(self._student)] if self._as_vector else self._student
        # The student is finite after a skipped step, so a weight of 0 leaves the teacher unchanged bit for bit.
        weight = torch.tensor(1.0 - momentum) if accepted is None else accepted.to(torch.float32) * (1.0 - momentum)
        for one, other in zip(self._teacher, student, strict=True):
            one.lerp_(other, weight)


def flattened(network: nn.Module) -> Tensor:
    """Make all parameters of a network views of one vector, and return it."""
    parameters = list(network.parameters())
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    parts = flat.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part.view_as(parameter)
    return flat


def drop_path_keys(batch: Batch, seed: int) -> list[Tensor]:
    """Return one drop-path key per view and image, a function of (seed, epoch, image, view); ordered like the crops."""
    start, keys = 0, []
    image = hash_bits(batch.indices + (batch.epoch << 32)) ^ (seed & 0xFFFFFFFF)
    for views in batch.views:
        view = torch.arange(start, start + views, device=image.device, dtype=torch.int64)
        keys.append(hash_bits(image[None, :] + (view[:, None] + 1) * 0x9E3779B1).flatten())
        start += views
    return keys


def feature_std(features: Tensor) -> Tensor:
    """Mean std over a batch of the coordinates of L2-normalised features, times sqrt(D).

    1 for features spread evenly over the sphere; 0 for a collapse, where all samples have the same feature.

    Args:
        features: [rows, D].
    """
    unit = nn.functional.normalize(features.to(torch.float32), dim=-1)
    return unit.std(dim=0, unbiased=False).mean() * features.shape[1] ** 0.5
