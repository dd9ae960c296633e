"""The momentum teacher: an exponential moving average of the student's parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def start_as_copy(teacher: nn.Module, student: nn.Module) -> None:
    """Give the teacher the student's weights and buffers, and no gradients. It stays in train mode: the statistics of
    its BatchNorm layers come from its own global crops."""
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    teacher.train()


@torch.no_grad()
def update_teacher(
    teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float, accepted: Tensor | None = None
) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, in place, or no change where ``accepted`` is false.

    Args:
        teacher, student: parameters in the same order.
        momentum: the share of the teacher that stays.
        accepted: boolean scalar on the device; None: accepted. The decision needs no host synchronisation.
    """
    if accepted is None:
        torch._foreach_lerp_(list(teacher), list(student), 1.0 - momentum)
        return
    # A rejected step has left the student as it was, finite: a weight of 0 leaves the teacher's bits as they are.
    weight = accepted.to(torch.float32) * (1.0 - momentum)
    torch._foreach_lerp_(list(teacher), list(student), [weight] * len(teacher))
