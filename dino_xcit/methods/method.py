"""The interface between a training step and a method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from dino_xcit.data.loader import Batch
from dino_xcit.optim import Rates, parameter_groups

Stats = dict[str, Tensor]
"""Float tensors that :func:`dino_xcit.train.train_step` sums over the forward passes and ranks of a step."""


class Method(Protocol):
    """Interface of a method: subclass it, or provide the same attributes.

    ``train_step`` does what methods share: accumulation, the finite check, clipping, the optimizer and the BatchNorm
    statistics. A method owns its networks, its loss and the updates after the optimizer step.
    """

    trained: nn.Module
    """The network that the optimizer updates. With several ranks, ``forward_backward`` must call it through
    ``ddp_student``."""
    eval_backbone: nn.Module
    """The backbone that evaluators measure and that ``backbone.pth`` holds."""
    teacher: nn.Module | None = None
    """A second network in train mode; a skipped step restores its BatchNorm statistics as well."""
    ddp_student: Any = None
    """:func:`dino_xcit.runtime.distributed.wrap_ddp` of ``trained``; required with several ranks."""
    features: Tensor | None = None
    """[rows, D] features of the last batch, without gradient; observers read them."""
    prototype_logits: Tensor | None = None
    """[rows, K] the teacher's logits of the last batch, without gradient, for methods with prototypes."""

    def forward_backward(self, batch: Batch, rates: Rates) -> tuple[Tensor, Stats]:
        """Run one forward and backward pass of this rank over a batch on the device.

        Must call ``(loss * rates.loss_scale).backward()``; gradients accumulate in ``trained``.

        Returns:
            The detached loss, and statistics for ``after_step`` and ``metrics``. If any of them is not finite on any
            rank, the step is skipped.
        """
        ...

    def after_step(self, stats: Stats, rates: Rates, accepted: Tensor) -> None:
        """Update state that follows the student, such as an EMA teacher.

        Args:
            stats: sums over all passes and ranks of the step.
            rates: the scheduled values of the step.
            accepted: boolean scalar on the device; if false, nothing may change. Must not be read on the host.
        """

    def metrics(self, stats: Stats) -> dict[str, Tensor | float]:
        """Return scalars for the log, from the sums passed to ``after_step``."""
        return {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups of the parameters of ``trained``."""
        return parameter_groups(self.trained)

    def frozen_parameters(self, rates: Rates) -> Iterable[nn.Parameter]:
        """Return the parameters of ``trained`` that this step does not update."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """Return the method's part of a checkpoint: tensors and plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`, strictly."""
        ...
