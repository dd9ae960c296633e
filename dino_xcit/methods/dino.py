"""DINO (arXiv 2104.14294): self-distillation over prototypes. B batch, V views, G global views, K prototypes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dino_xcit.config import PretrainConfig
from dino_xcit.data.loader import Batch
from dino_xcit.errors import InputError
from dino_xcit.methods.method import Stats
from dino_xcit.methods.student_teacher import GLOBAL_VIEWS, StudentTeacher, feature_std
from dino_xcit.models import DINOHead
from dino_xcit.optim import Rates
from dino_xcit.runtime import distributed


class DINO(StudentTeacher):
    """DINO: the student predicts the teacher's prototype assignments of other views of the same image."""

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        def build_head(embed_dim: int) -> DINOHead:
            return DINOHead(
                embed_dim,
                config.out_dim,
                use_bn=config.use_bn_in_head,
                norm_last_layer=config.norm_last_layer,
                hidden_dim=config.head_hidden_dim,
                bottleneck_dim=config.head_bottleneck_dim,
            )

        super().__init__(config, device, build_head)
        self.loss = DINOLoss(
            config.out_dim, config.student_temp, config.center_momentum, GLOBAL_VIEWS, config.centering
        ).to(device)

    def forward_backward(self, batch: Batch, rates: Rates) -> tuple[Tensor, Stats]:
        student, teacher = self.forward(batch)
        self.prototype_logits = teacher.logits.detach()
        loss, teacher_entropy = self._loss(student.logits, teacher.logits, rates.teacher_temp)
        total = loss
        if self.config.koleo_weight > 0:
            global_features = student.features[: len(teacher.features)]  # the global views come first
            total = loss + self.config.koleo_weight * koleo(global_features, GLOBAL_VIEWS)
        (total * rates.loss_scale).backward()
        loss = loss.detach()
        return loss, {
            "teacher_logits": self.prototype_logits.to(torch.float32).sum(dim=0, keepdim=True),
            "rows": loss.new_full((), len(teacher.logits)),
            "passes": loss.new_ones(()),
            "teacher_entropy": teacher_entropy,
            "kl": loss - teacher_entropy,
            "feature_std": feature_std(teacher.features),
        }

    def _loss(self, student: Tensor, teacher: Tensor, teacher_temp: float) -> tuple[Tensor, Tensor]:
        """Return the loss, and the entropy of the teacher's targets."""
        if self.kernels != "fused":
            targets = self.loss.teacher_probabilities(teacher, teacher_temp)
            return self.loss.cross_entropy(student, targets), entropy(targets)
        from dino_xcit.kernels.cross_entropy import cross_entropy, sharpened  # triton is missing on some systems

        if self.loss.centering == "centering":
            targets, of_rows = sharpened(teacher.detach(), self.loss.center, teacher_temp)
            of_targets = of_rows.mean()
        else:
            targets = self.loss.teacher_probabilities(teacher, teacher_temp)
            of_targets = entropy(targets)
        return cross_entropy(student, targets, GLOBAL_VIEWS, self.config.student_temp), of_targets

    def after_step(self, stats: Stats, rates: Rates, accepted: Tensor) -> None:
        super().after_step(stats, rates, accepted)
        self.loss.update_center(stats["teacher_logits"] / stats["rows"], accepted)

    def metrics(self, stats: Stats) -> dict[str, Tensor | float]:
        """Return indicators of collapse.

        ``teacher_entropy``: 0 if one prototype takes all images, ln K if uniform. ``kl``: divergence of the student
        from the teacher, 0 if both agree. ``feature_std``: 0 if all images have the same feature. ``center_norm``: L2
        norm of the center.
        """
        means = {name: stats[name] / stats["passes"] for name in ("teacher_entropy", "kl", "feature_std")}
        return means | {"center_norm": self.loss.center.norm()}

    def frozen_parameters(self, rates: Rates) -> Iterable[nn.Parameter]:
        if rates.epoch >= self.config.freeze_last_layer:
            return ()
        return self.student.get_submodule("head.last_layer").parameters()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"dino_loss": self.loss.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.loss.load_state_dict(state["dino_loss"])


CENTERINGS = ("centering", "sinkhorn_knopp")
"""Methods that keep all prototypes in use, by DINOv2's names."""


class DINOLoss(nn.Module):
    """Cross-entropy between the centered, sharpened teacher and the student, over pairs of different views.

    ``forward`` does not change the center; :meth:`DINO.after_step` calls :meth:`update_center` after the loss.

    Args:
        out_dim: K.
        student_temp: 0.1 in every published run.
        center_momentum: 0.9 in every published run.
        global_views: G, the number of the teacher's views.
        centering: ``centering`` subtracts the moving average of the teacher's logits (DINO); ``sinkhorn_knopp``
            spreads the batch over the prototypes (:func:`sinkhorn_knopp`) and ignores the center.

    Raises:
        InputError: ``centering`` is unknown.
    """

    center: Tensor

    def __init__(
        self,
        out_dim: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        global_views: int = 2,
        centering: str = "centering",
    ) -> None:
        super().__init__()
        if centering not in CENTERINGS:
            raise InputError(f"centering is {centering!r}, expected one of {', '.join(CENTERINGS)}")
        self.centering = centering
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.global_views = global_views
        self.register_buffer("center", torch.zeros(1, out_dim))

    def teacher_probabilities(self, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        """Compute softmax((t - center) / T) or its Sinkhorn-Knopp counterpart: [G * B, K], at least float32, detached.

        Sinkhorn-Knopp normalises over one forward pass of all ranks, so it must be called on every rank.
        """
        logits = teacher_logits.detach().to(torch.promote_types(teacher_logits.dtype, torch.float32))
        if self.centering == "sinkhorn_knopp":
            return sinkhorn_knopp(logits / teacher_temp)
        return ((logits - self.center) / teacher_temp).softmax(dim=-1)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        """Compute the mean over pairs (g, v) with v != g and over samples of -sum_k q_g[k] log p_v[k].

        Args:
            student_logits: [V * B, K], view-major, the global views first and in the teacher's order.
            teacher_logits: [G * B, K], view-major.
            teacher_temp: T.

        Returns:
            A scalar, at least float32.

        Raises:
            InputError: the shapes do not match.
        """
        batch, rest = divmod(teacher_logits.shape[0], self.global_views)
        views, odd = divmod(student_logits.shape[0], max(batch, 1))
        if rest or odd or views < self.global_views or views < 2:
            raise InputError(
                f"{student_logits.shape[0]} student rows and {teacher_logits.shape[0]} teacher rows do not form "
                f"{self.global_views} global views and at least 2 views of one batch"
            )
        if not student_logits.shape[1:] == teacher_logits.shape[1:] == self.center.shape[1:]:
            raise InputError(
                f"student logits are {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)}, "
                f"expected {self.center.shape[1]} prototypes"
            )
        return self.cross_entropy(student_logits, self.teacher_probabilities(teacher_logits, teacher_temp))

    def cross_entropy(self, student_logits: Tensor, teacher_probabilities: Tensor) -> Tensor:
        """Compute :meth:`forward` from the teacher's probabilities [G * B, K]."""
        batch = len(teacher_probabilities) // self.global_views
        views = len(student_logits) // batch
        accum_dtype = torch.promote_types(student_logits.dtype, torch.float32)
        targets = teacher_probabilities.unflatten(0, (self.global_views, batch))
        total = targets.sum(dim=0)
        # The sum over pairs is linear in the teacher, so each view needs one log-softmax against a sum of targets: all
        # teacher views for a local view, all but its own for a global view.
        loss = student_logits.new_zeros((), dtype=accum_dtype)
        for view, logits in enumerate(student_logits.unflatten(0, (views, batch)).unbind(0)):
            target = total - targets[view] if view < self.global_views else total
            log_p = (logits.to(accum_dtype) / self.student_temp).log_softmax(dim=-1)
            loss = loss - (target * log_p).sum(dim=-1).mean()
        return loss / (self.global_views * (views - 1))

    @torch.no_grad()
    def update_center(self, batch_mean: Tensor, accepted: Tensor | None = None) -> None:
        """Update center <- m * center + (1 - m) * batch_mean, unless ``accepted`` is false.

        Args:
            batch_mean: [1, K], mean of the teacher's logits over the global batch.
            accepted: boolean scalar on the device; None: accepted.
        """
        new = self.center * self.center_momentum + batch_mean * (1 - self.center_momentum)
        self.center.copy_(new if accepted is None else torch.where(accepted, new, self.center))


@torch.no_grad()
def sinkhorn_knopp(scores: Tensor, iterations: int = 3) -> Tensor:
    """Assign rows evenly to prototypes by Sinkhorn-Knopp (SwAV, arXiv 2006.09882, section 3.1; used in DINOv2).

    Alternately rescales columns and rows of the softmax, over the rows of all ranks. Starting from the softmax avoids
    underflow and has the same limit as SwAV's code.

    Args:
        scores: [rows, K], logits divided by the temperature.
        iterations: 3 in SwAV and DINOv2.

    Returns:
        [rows, K]; rows sum to 1, columns approach (rows of all ranks) / K.
    """
    start = scores.softmax(dim=-1)
    row_scale = scores.new_ones(scores.shape[0])
    column_scale = scores.new_ones(scores.shape[1])
    tiny = torch.finfo(scores.dtype).tiny
    for _ in range(iterations):
        # Scale vectors instead of the matrix: two products per iteration, and an all-reduce of one vector [K].
        column_sum = row_scale @ start
        distributed.all_reduce_sum([column_sum])
        column_scale = 1 / column_sum.clamp_min(tiny)
        row_scale = 1 / (start @ column_scale)
    return start * row_scale[:, None] * column_scale


def koleo(features: Tensor, views: int) -> Tensor:
    """KoLeo regulariser (DINOv2, arXiv 2304.07193, section 4; Sablayrolles et al., arXiv 1806.03198).

    Mean of -log of the distance of each unit vector to its nearest neighbour in the batch.

    Args:
        features: [views * B, D], view-major; neighbours are searched within each view. B >= 2.
        views: number of views.

    Returns:
        A scalar, at least float32.
    """
    accum_dtype = torch.promote_types(features.dtype, torch.float32)
    unit = nn.functional.normalize(features.to(accum_dtype), dim=-1).unflatten(0, (views, -1))
    with torch.no_grad():
        similarity = unit @ unit.transpose(1, 2)
        similarity.diagonal(dim1=1, dim2=2).fill_(-2.0)
        nearest = similarity.argmax(dim=-1, keepdim=True)
    neighbour = unit.gather(1, nearest.expand_as(unit))
    # The epsilon keeps logarithm and gradient finite for equal features.
    return -((unit - neighbour).square().sum(dim=-1) + 1e-8).sqrt().log().mean()


def entropy(probabilities: Tensor) -> Tensor:
    """Mean entropy in nats of the rows of [rows, K]: ln K if uniform, 0 if one prototype takes all."""
    return torch.special.entr(probabilities).sum(dim=-1).mean()
