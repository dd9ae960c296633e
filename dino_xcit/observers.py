"""Evaluators run at the ends of epochs, observers after each step; neither changes the run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from dino_xcit.data.loader import Batch
from dino_xcit.methods import Method
from dino_xcit.runtime import watchdog
from dino_xcit.train import StepResult


class Evaluator(NamedTuple):
    """A measurement at the ends of epochs; a plain tuple of the three works too."""

    name: str
    """For messages."""
    every: int
    """Epochs between two measurements; the end of a run is always measured. 0: never."""
    measure: Callable[[Method], Mapping[str, float]]
    """The method to {metric: value}. Every rank calls it; rank 0's values count."""


def evaluate(
    evaluators: Sequence[tuple[str, int, Callable[[Method], Mapping[str, float]]]],
    epoch: int,
    run_ends: bool,
    method: Method,
) -> dict[str, float]:
    """The metrics of all evaluators that are due after the 0-based ``epoch``.

    Raises:
        ValueError: two evaluators give the same metric.
    """
    metrics: dict[str, float] = {}
    for name, every, measure in evaluators:
        if every > 0 and (run_ends or (epoch + 1) % every == 0):
            watchdog.phase(f"evaluating {name}")
            _add(metrics, measure(method), f"evaluator {name}")
    return metrics


def _add(metrics: dict[str, float], found: Mapping[str, float], giver: str) -> None:
    if twice := metrics.keys() & found.keys():
        raise ValueError(f"{giver} repeats {', '.join(sorted(twice))}: rename the metric")
    metrics |= {name: float(value) for name, value in found.items()}


class Observer(Protocol):
    """Sees every accepted step, in order, and is stored with the checkpoint. It never changes the method.

    Every rank has its own; rank 0's state and metrics count. Collectives must be called on every rank.
    """

    def on_step(self, result: StepResult, batch: Batch) -> None:
        """One accepted step and its last batch on this rank."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """Numbers for the log, at each logged step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values. Rank 0 alone calls it."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        ...


class Observers:
    """Delivers steps to observers without making the host wait for the device.

    Only the device knows whether a step was accepted. So on CUDA a step is delivered while the next one runs, and all
    of them before metrics are read or states are stored.
    """

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        """Raises ValueError where two observers are of the same class: their states would share a name."""
        observers = list(observers)
        self._observers = {type(observer).__name__: observer for observer in observers}
        if len(self._observers) < len(observers):
            raise ValueError("two observers have the same class name, which keys their state: rename or merge them")
        self._pending: deque[tuple[StepResult, Batch, torch.Tensor, torch.cuda.Event | None]] = deque()

    def on_step(self, result: StepResult, batch: Batch) -> None:
        """Queue one step, which may still be running."""
        if not self._observers:
            return
        arrives = None
        accepted = result.accepted
        if accepted.is_cuda:
            accepted = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(accepted, non_blocking=True)
            arrives = torch.cuda.Event()
            arrives.record()
        self._pending.append((result, batch, accepted, arrives))
        self.deliver(leave=1 if arrives else 0)

    def metrics(self, result: StepResult, method: Method) -> dict[str, float]:
        """Metrics of the step and of all observers; waits for the device."""
        self.deliver()
        metrics = result.metrics(method)
        for name, observer in self._observers.items():
            _add(metrics, observer.metrics(), f"observer {name}")
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """By class name, after :meth:`deliver`."""
        return {name: observer.state_dict() for name, observer in self._observers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore those that the checkpoint holds; observers that are new start from nothing."""
        for name, observer in self._observers.items():
            if name in state:
                observer.load_state_dict(state[name])

    def deliver(self, leave: int = 0) -> None:
        """Deliver all but the last ``leave`` steps. Every rank calls it, because observers may call collectives."""
        while len(self._pending) > leave:
            result, batch, accepted, arrives = self._pending.popleft()
            if arrives is not None:
                arrives.synchronize()
            if bool(accepted):
                for observer in self._observers.values():
                    observer.on_step(result, batch)
