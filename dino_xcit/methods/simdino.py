"""SimDINO (arXiv 2502.10385): DINO without prototypes. B batch, V views, G global views, p dimensions, m rows.

A coding-rate term prevents collapse, so there is no centering, no temperature and no last layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dino_xcit.config import PretrainConfig
from dino_xcit.data.loader import Batch
from dino_xcit.methods.method import Stats
from dino_xcit.methods.student_teacher import GLOBAL_VIEWS, StudentTeacher, feature_std
from dino_xcit.models.head import ProjectionHead
from dino_xcit.optim import Rates
from dino_xcit.runtime import distributed


class SimDINO(StudentTeacher):
    """SimDINO: aligns the unit vectors of student and teacher, and maximises the coding rate of the student's."""

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        def build_head(embed_dim: int) -> ProjectionHead:
            return ProjectionHead(embed_dim, config.use_bn_in_head, config.head_hidden_dim, config.head_bottleneck_dim)

        super().__init__(config, device, build_head)

    def forward_backward(self, batch: Batch, rates: Rates) -> tuple[Tensor, Stats]:
        (student, _), (teacher, features) = self.forward(batch)
        cosine = view_similarity(student, teacher)
        rate = coding_rate(student[: len(teacher)].unflatten(0, (GLOBAL_VIEWS, -1)), self.config.coding_rate_eps)
        rows, dim = len(batch.indices) * distributed.world_size(), student.shape[1]
        gamma = self.config.coding_rate_weight * (dim + rows) / (dim * rows)
        loss = -cosine - gamma * rate
        (loss * rates.loss_scale).backward()
        loss = loss.detach()
        return loss, {
            "passes": loss.new_ones(()),
            "cosine": cosine.detach(),
            "coding_rate": rate.detach(),
            "feature_std": feature_std(features),
        }

    def metrics(self, stats: Stats) -> dict[str, Tensor | float]:
        """Return ``cosine`` of student and teacher (1 if they agree), ``coding_rate`` and ``feature_std`` (0 at a
        collapse)."""
        return {name: stats[name] / stats["passes"] for name in ("cosine", "coding_rate", "feature_std")}


def view_similarity(student: Tensor, teacher: Tensor, global_views: int = GLOBAL_VIEWS) -> Tensor:
    """Mean cosine between teacher and student over pairs (g, v) of different views and over samples.

    Args:
        student: [V * B, p] unit vectors, view-major, the global views first and in the teacher's order.
        teacher: [G * B, p] unit vectors, view-major.
    """
    targets = teacher.detach().unflatten(0, (global_views, -1))
    views = student.unflatten(0, (-1, targets.shape[1]))
    # The sum over pairs is linear in the teacher: multiply each view by the sum of all teacher views but its own.
    pairs = (views * targets.sum(dim=0)).sum() - (views[:global_views] * targets).sum()
    return pairs / (global_views * (len(views) - 1) * targets.shape[1])


def coding_rate(features: Tensor, eps: float) -> Tensor:
    """Coding rate 1/2 logdet(I + p / (m eps) Z^T Z), averaged over views; Z contains the rows of all ranks.

    Each rank's gradient is multiplied by the number of ranks, because DistributedDataParallel averages the gradients.

    Args:
        features: [G, B, p] unit vectors of this rank.
        eps: squared coding precision (epsilon^2 in the paper); 0.5 in the paper's code.

    Returns:
        A scalar, at least float32.
    """
    z = features.to(torch.promote_types(features.dtype, torch.float32))
    ranks, dim = distributed.world_size(), z.shape[-1]
    with torch.autocast(z.device.type, enabled=False):
        covariance = z.mT @ z
        if ranks > 1:
            total = covariance.detach().clone()
            distributed.all_reduce_sum([total])
            covariance = total + ranks * (covariance - covariance.detach())
        identity = torch.eye(dim, dtype=z.dtype, device=z.device)
        # cholesky_ex does not synchronise with the device; the finite check catches non-finite features.
        factor = torch.linalg.cholesky_ex(identity + dim / (z.shape[1] * ranks * eps) * covariance).L
        return factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1).mean()
