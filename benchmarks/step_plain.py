"""The training step as one writes it from the paper, with timm's XCiT: the oracle and the second rival of
benchmarks/step.py. B batch, V views, D features, K prototypes.

Plain means: PyTorch's and timm's parts, no fusing, no compiling, nothing kept out of memory but by ``no_grad``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import timm.models.xcit as timm_xcit
import torch
from step_settings import Precision, Settings
from torch import Tensor, nn
from torch.nn import functional as F

from dino_xcit.errors import InputError
from dino_xcit.models.xcit import XCIT_SIZES

STUDENT_TEMP, TEACHER_TEMP, CENTER_MOMENTUM, TEACHER_MOMENTUM = 0.1, 0.04, 0.9, 0.996
LR, WEIGHT_DECAY, CLIP = 1e-5, 0.04, 3.0
"""The step's cost does not depend on them; the losses of a few steps shall stay finite."""

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: str, precision: Precision) -> AbstractContextManager[Any]:
    """PyTorch's own choice of what is computed in 16 bits; nothing for fp32."""
    return torch.autocast(device, AUTOCAST[precision]) if precision in AUTOCAST else nullcontext()


def timm_backbone(arch: str, drop_path: float) -> nn.Module:
    """timm's XCiT of one of this project's names, without classifier: images [B, 3, h, w] to [B, D].

    timm has stems for patches of 8 and 16; for 4 its own layers are put together in the same way.

    Raises:
        InputError: another architecture.
    """
    name, _, patch = arch.rpartition("_p")
    if name not in XCIT_SIZES:
        raise InputError(f"--arch is {arch}, expected an XCiT, such as xcit_small_12_p16")
    size = XCIT_SIZES[name]
    model = timm_xcit.Xcit(
        patch_size=max(8, int(patch)),
        num_classes=0,
        embed_dim=size.dim,
        depth=size.depth,
        num_heads=size.heads,
        mlp_ratio=size.mlp_ratio,
        cls_attn_layers=size.class_blocks,
        eta=size.layer_scale,
        tokens_norm=size.tokens_norm,
        drop_path_rate=drop_path,
    )
    if patch == "4":
        stem = timm_xcit.conv3x3(3, size.dim // 2, 2), nn.GELU(), timm_xcit.conv3x3(size.dim // 2, size.dim, 2)
        model.patch_embed.proj = nn.Sequential(*stem)
    return model


def in_timms_names(state: Mapping[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """A backbone's weights, or gradients, from the official names to timm's, by timm's own filter."""
    return timm_xcit.checkpoint_filter_fn(dict(state), backbone)


class PlainHead(nn.Module):
    """DINO's head with the names of the published one."""

    def __init__(self, in_dim: int, settings: Settings) -> None:
        super().__init__()
        hidden, bottleneck = settings.head_hidden, settings.head_bottleneck
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.last_layer = nn.Module()
        self.last_layer.weight_g = nn.Parameter(torch.ones(settings.out_dim, 1), requires_grad=False)
        self.last_layer.weight_v = nn.Parameter(torch.randn(settings.out_dim, bottleneck) * bottleneck**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        """[rows, D] to [rows, K]."""
        x = F.normalize(self.mlp(features), dim=-1)
        weight_g, weight_v = self.last_layer.weight_g, self.last_layer.weight_v
        return F.linear(x, weight_g * F.normalize(weight_v, dim=1))  # type: ignore[arg-type, operator]


class PlainNetwork(nn.Module):
    """timm's backbone, once a crop size, and the head over all views."""

    def __init__(self, settings: Settings, drop_path: float) -> None:
        super().__init__()
        self.backbone = timm_backbone(settings.arch, drop_path)
        self.head = PlainHead(XCIT_SIZES[settings.arch.rpartition("_p")[0]].dim, settings)

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        """One tensor a crop size, [views of that size * B, 3, size, size], to [V * B, K]."""
        return self.head(torch.cat([self.backbone(crop) for crop in crops]))

    def load_official(self, backbone: Mapping[str, Tensor], head: Mapping[str, Tensor]) -> None:
        """Take weights under the official names, strictly."""
        self.backbone.load_state_dict(in_timms_names(backbone, self.backbone))
        self.head.load_state_dict(dict(head))


def plain_loss(student_logits: Tensor, teacher_logits: Tensor, center: Tensor, views: int) -> Tensor:
    """Algorithm 1 of arXiv 2104.14294: the mean over pairs of different views of a cross-entropy.

    Args:
        student_logits: [V * B, K], view-major, the global views first.
        teacher_logits: [2 * B, K].
        center: [1, K].
        views: V.
    """
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    log_p = F.log_softmax(student_logits.to(wide) / STUDENT_TEMP, dim=-1).chunk(views)
    targets = F.softmax((teacher_logits.to(wide) - center) / TEACHER_TEMP, dim=-1).chunk(2)
    pairs = [
        -(target * log_p[view]).sum(dim=-1).mean()
        for number, target in enumerate(targets)
        for view in range(views)
        if view != number
    ]
    return torch.stack(pairs).mean()


class PlainStep:
    """Student, teacher, centre, optimizer, and one step over them."""

    def __init__(self, settings: Settings, precision: Precision, device: torch.device) -> None:
        self.settings, self.precision, self.device = settings, precision, device
        torch.manual_seed(0)
        self.student = PlainNetwork(settings, settings.drop_path).to(device)
        self.teacher = PlainNetwork(settings, 0.0).to(device)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.center = torch.zeros(1, settings.out_dim, device=device)
        trained = [p for p in self.student.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LR)

    def loss(self, crops: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The loss, and the teacher's logits [2 * B, K]."""
        with autocast(self.device.type, self.precision):
            with torch.no_grad():
                teacher_logits = self.teacher([crops[0][: 2 * self.settings.batch]])
            student_logits = self.student(crops)
        return plain_loss(student_logits, teacher_logits, self.center, self.settings.views), teacher_logits

    def __call__(self, crops: Sequence[Tensor]) -> Tensor:
        """One training step over float crops; its loss."""
        crops = [crop.to(self.device, non_blocking=True) for crop in crops]
        loss, teacher_logits = self.loss(crops)
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.student.parameters():  # each on its own norm, as the reference does
            if parameter.grad is not None:
                nn.utils.clip_grad_norm_(parameter, CLIP)
        self.optimizer.step()
        with torch.no_grad():
            for kept, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                kept.lerp_(new, 1 - TEACHER_MOMENTUM)
            mean = teacher_logits.to(self.center.dtype).mean(dim=0, keepdim=True)
            self.center.lerp_(mean, 1 - CENTER_MOMENTUM)
        return loss.detach()
