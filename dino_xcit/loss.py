"""The DINO loss (arXiv 2104.14294, section 3.1, algorithm 1). B batch, V views, G global views, K prototypes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dino_xcit.errors import InputError
from dino_xcit.runtime import distributed

CENTERINGS = ("centering", "sinkhorn_knopp")
"""DINOv2's words for the two ways in which the prototypes are kept in use."""


class DINOLoss(nn.Module):
    """Cross-entropy between the centred, sharpened teacher and the student, over pairs of different views.

    ``forward`` is pure; the centre changes only in :meth:`update_center`, which the training step calls by name after
    the loss has used the old one.

    Args:
        out_dim: K.
        student_temp: 0.1 in every published run.
        center_momentum: 0.9 in every published run.
        global_views: G, the number of views that the teacher sees.
        centering: ``centering`` subtracts the moving average of the teacher's logits (DINO); ``sinkhorn_knopp``
            spreads the batch over the prototypes (:func:`sinkhorn_knopp`) and leaves the centre out of account.

    Raises:
        InputError: another centering.
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
        """softmax((t - centre) / T), or its Sinkhorn-Knopp counterpart: [G * B, K] float32 at least, without gradient.

        Sinkhorn-Knopp is over one forward pass of all processes, so all of them must call this together.
        """
        logits = teacher_logits.detach().to(torch.promote_types(teacher_logits.dtype, torch.float32))
        if self.centering == "sinkhorn_knopp":
            return sinkhorn_knopp(logits / teacher_temp)
        return ((logits - self.center) / teacher_temp).softmax(dim=-1)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        """The mean, over pairs (g, v) with v != g and over samples, of -sum_k q_g[k] log p_v[k].

        Args:
            student_logits: [V * B, K], view-major, the global views first and in the teacher's order.
            teacher_logits: [G * B, K], view-major.
            teacher_temp: T.

        Returns:
            A scalar, float32 at least.

        Raises:
            InputError: the two shapes do not belong together.
        """
        batch, rest = divmod(teacher_logits.shape[0], self.global_views)
        views, odd = divmod(student_logits.shape[0], max(batch, 1))
        if rest or odd or views < self.global_views or views < 2:
            raise InputError(
                f"{student_logits.shape[0]} student and {teacher_logits.shape[0]} teacher rows do not form "
                f"{self.global_views} global and at least 2 views of one batch"
            )
        if not student_logits.shape[1:] == teacher_logits.shape[1:] == self.center.shape[1:]:
            raise InputError(
                f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} are "
                f"not both over the {self.center.shape[1]} prototypes of the centre"
            )
        wide = torch.promote_types(student_logits.dtype, torch.float32)
        targets = self.teacher_probabilities(teacher_logits, teacher_temp).unflatten(0, (self.global_views, batch))
        total = targets.sum(dim=0)
        # The pair sum is linear in the teacher, so a view's log-probabilities meet all its teachers at once:
        # views v >= G meet every teacher, a global view all but its own. One log-softmax a view, K-wide tensors few.
        loss = student_logits.new_zeros((), dtype=wide)
        for view, logits in enumerate(student_logits.unflatten(0, (views, batch)).unbind(0)):
            target = total - targets[view] if view < self.global_views else total
            log_p = (logits.to(wide) / self.student_temp).log_softmax(dim=-1)
            loss = loss - (target * log_p).sum(dim=-1).mean()
        return loss / (self.global_views * (views - 1))

    @torch.no_grad()
    def update_center(self, batch_mean: Tensor, accepted: Tensor | None = None) -> None:
        """centre <- m * centre + (1 - m) * batch_mean, or no change where ``accepted`` is false.

        Args:
            batch_mean: [1, K], the mean of the teacher's logits over all its views of the global batch, all ranks.
            accepted: boolean scalar on the device; None: accepted.
        """
        new = self.center * self.center_momentum + batch_mean * (1 - self.center_momentum)
        self.center.copy_(new if accepted is None else torch.where(accepted, new, self.center))


@torch.no_grad()
def sinkhorn_knopp(scores: Tensor, iterations: int = 3) -> Tensor:
    """The rows' softmax, rescaled in turn so that every prototype is used equally over the rows of all processes and
    every row sums to 1 (SwAV, arXiv 2006.09882, section 3.1; DINOv2 puts it in the place of DINO's centring).

    It starts from rows that sum to 1, where SwAV's code starts from exponentials on one common scale: no row can
    underflow, and both go to the same limit.

    Args:
        scores: [rows, K], logits over temperature.
        iterations: 3 in SwAV and DINOv2.

    Returns:
        [rows, K]; rows sum to 1, columns approach (rows of all processes) / K.
    """
    start = scores.softmax(dim=-1)
    row_scale = scores.new_ones(scores.shape[0])
    column_scale = scores.new_ones(scores.shape[1])
    least = torch.finfo(scores.dtype).tiny
    for _ in range(iterations):
        # Scaling vectors instead of scaled matrices: two products a round, and one K-vector on the wire.
        column_sum = row_scale @ start
        distributed.all_reduce_sum([column_sum])
        column_scale = 1 / column_sum.clamp_min(least)
        row_scale = 1 / (start @ column_scale)
    return start * row_scale[:, None] * column_scale


def koleo(features: Tensor, views: int) -> Tensor:
    """The KoLeo regulariser of DINOv2 (arXiv 2304.07193, section 4; Sablayrolles et al., arXiv 1806.03198): -log of the
    distance to the nearest other image of the batch, on unit vectors, averaged. It spreads the features.

    Args:
        features: [views * B, D], view-major; each view's images are compared among themselves. B >= 2.
        views: how many views the rows hold.

    Returns:
        A scalar, float32 at least.
    """
    wide = torch.promote_types(features.dtype, torch.float32)
    unit = nn.functional.normalize(features.to(wide), dim=-1).unflatten(0, (views, -1))
    with torch.no_grad():
        similarity = unit @ unit.transpose(1, 2)
        similarity.diagonal(dim1=1, dim2=2).fill_(-2.0)
        nearest = similarity.argmax(dim=-1, keepdim=True)
    neighbour = unit.gather(1, nearest.expand_as(unit))
    # The distance of two equal features is 0: the small number keeps its logarithm and gradient finite.
    return -((unit - neighbour).square().sum(dim=-1) + 1e-8).sqrt().log().mean()


def entropy(probabilities: Tensor) -> Tensor:
    """Mean entropy in nats of the rows of [rows, K]: ln K when uniform, 0 when one prototype takes all."""
    return torch.special.entr(probabilities).sum(dim=-1).mean()


def feature_deviation(features: Tensor) -> Tensor:
    """Mean standard deviation, over a batch, of the coordinates of L2-normalised features, times sqrt(D).

    1 for features spread evenly over the sphere, 0 when all samples have the same feature: a collapse.

    Args:
        features: [rows, D].
    """
    unit = nn.functional.normalize(features.to(torch.float32), dim=-1)
    return unit.std(dim=0, unbiased=False).mean() * features.shape[1] ** 0.5
