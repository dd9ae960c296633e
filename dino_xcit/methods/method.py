"""The interface between a training step and a method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from dino_xcit.data.loader import Batch
from dino_xcit.optim import Rates

Stats = dict[str, Tensor]
"""Float tensors that :func:`dino_xcit.train.train_step` sums over the forward passes and ranks of a step."""


class Method(Protocol):
    """Subclass it, or offer the same attributes.

    ``train_step`` owns everything that methods share: accumulation, the finite check, clipping, the optimizer and the
    BatchNorm statistics. A method owns its networks, its loss and what follows the optimizer's update.
    """

    trained: nn.Module
    """What the optimizer updates. With several ranks, call it through ``ddp_student`` in ``forward_backward``."""
    eval_backbone: nn.Module
    """The backbone that evaluators measure and that ``backbone.pth`` holds."""
    teacher: nn.Module | None = None
    """A second network in train mode; a skipped step restores its BatchNorm statistics as well."""
    ddp_student: Any = None
    """:func:`dino_xcit.runtime.distributed.wrap_ddp` of ``trained``; required with several ranks."""
    features: Tensor | None = None
    """[rows, D] features of the last batch, without gradient; observers read them."""

    def forward_backward(self, batch: Batch, rates: Rates) -> tuple[Tensor, Stats]:
        """One forward and backward pass of this rank over a batch on the device.

        Call ``(loss * rates.loss_scale).backward()``; the gradients accumulate in ``trained``.

        Returns:
            The detached loss, and the statistics that ``after_step`` and ``metrics`` need. A step in which any of them
            is not finite on any rank is skipped.
        """
        ...

    def after_step(self, stats: Stats, rates: Rates, accepted: Tensor) -> None:
        """Update what follows the student, such as an EMA teacher.

        Args:
            stats: the sums over all passes and ranks of the step.
            rates: the step's values.
            accepted: boolean scalar on the device. Where it is false nothing may change, and nothing may wait for it.
        """

    def metrics(self, stats: Stats) -> dict[str, Tensor | float]:
        """Scalars for the log, from the sums that ``after_step`` gets."""
        return {}

    def frozen_parameters(self, rates: Rates) -> Iterable[nn.Parameter]:
        """Parameters of ``trained`` that this step does not update."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the method: tensors and plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`, strictly."""
        ...
