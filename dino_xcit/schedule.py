"""Values that change while training: cosine with linear warm-up by step, linear by epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class CosineSchedule:
    """Linear from ``warmup_start`` to ``base`` over ``warmup_steps``, then half a cosine to ``final``.

    As the reference numbers its steps: the last warm-up step already has ``base``, the first cosine step has it
    again, and the last step of the run is one short of ``final``.
    """

    base: float
    final: float
    total_steps: int
    warmup_steps: int = 0
    warmup_start: float = 0.0

    def at(self, step: int) -> float:
        """The value for the 0-based ``step``; past the end it stays at ``final``."""
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
        """The value for the 0-based ``epoch``."""
        if epoch >= self.ramp_epochs:
            return self.end
        if self.ramp_epochs == 1:
            return self.start
        return self.start + (self.end - self.start) * epoch / (self.ramp_epochs - 1)
