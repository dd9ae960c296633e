"""Being asked to make room: SIGTERM and SIGUSR1 are remembered, and answered between two steps."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)
)  # Windows has no SIGUSR1


class Preemption:
    """Whether somebody has asked this process to stop: Slurm before it takes the machine, torchrun, or a person.

    Slurm: ``--signal=USR1@120`` sends SIGUSR1 two minutes before the time limit; a preempted job gets SIGTERM.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        """The signal that came last; None: none so far."""

    def watch(self) -> None:
        """Take over both signals for the rest of this process's life. Call it from the main thread."""
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def sentence(self, step: int) -> str:
        """What the run ends with."""
        asked = f"asked to stop by {self.signal_name}" if self.signal_name else "another process was asked to stop"
        return f"{asked}: step {step} is saved, and the same command carries on after it"

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
