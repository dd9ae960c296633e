"""Evaluators, which run at epoch ends, and observers, which run after each step. Neither changes the run."""

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
    """An evaluation at epoch ends; a plain tuple works too."""

    name: str
    """Shown in messages."""
    every: int
    """Epochs between evaluations, plus one at the end of the run; 0: never."""
    measure: Callable[[Method], Mapping[str, float]]
    """Maps the method to {metric: value}. Called on every rank; the values of rank 0 are used."""


def evaluate(
    evaluators: Sequence[tuple[str, int, Callable[[Method], Mapping[str, float]]]],
    epoch: int,
    run_ends: bool,
    method: Method,
) -> dict[str, float]:
    """Run the evaluators that are due after the 0-based ``epoch`` and return their metrics.

    Raises:
        ValueError: two evaluators return the same metric.
    """
    metrics: dict[str, float] = {}
    for name, every, measure in evaluators:
        if every > 0 and (run_ends or (epoch + 1) % every == 0):
            watchdog.phase(f"evaluating {name}")
            _add(metrics, measure(method), f"evaluator {name}")
    return metrics


def _add(metrics: dict[str, float], found: Mapping[str, float], source: str) -> None:
    if repeated := metrics.keys() & found.keys():
        raise ValueError(f"{source} repeats {', '.join(sorted(repeated))}: rename the metric")
    metrics |= {name: float(value) for name, value in found.items()}


class Observer(Protocol):
    """Receives every accepted step in order; its state is stored in the checkpoint. It must not change the method.

    Each rank has its own observer; the state and metrics of rank 0 are used. Collectives must be called on every rank.
    """

    def on_step(self, result: StepResult, batch: Batch) -> None:
        """Process one accepted step and its last batch on this rank."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """Return scalars for the log; called at each logged step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values; called on rank 0 only."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        ...


class Observers:
    """Delivers steps to observers without synchronising with the device.

    Whether a step was accepted is computed on the device. On CUDA a step is therefore delivered while the next one
    runs; all pending steps are delivered before metrics are read or states are stored.
    """

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        """Raises ValueError if two observers have the same class name, which is the key of their state."""
        observers = list(observers)
        self._observers = {type(observer).__name__: observer for observer in observers}
        if len(self._observers) < len(observers):
            raise ValueError("two observers have the same class name, which keys their state: rename or merge them")
        self._pending: deque[tuple[StepResult, Batch, torch.Tensor, torch.cuda.Event | None]] = deque()

    def on_step(self, result: StepResult, batch: Batch) -> None:
        """Queue a step, which may still be running on the device."""
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
        """Return the metrics of the step and of all observers; waits for the device."""
        self.deliver()
        metrics = result.metrics(method)
        for name, observer in self._observers.items():
            _add(metrics, observer.metrics(), f"observer {name}")
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return the observers' states by class name. Call :meth:`deliver` first."""
        return {name: observer.state_dict() for name, observer in self._observers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the observers in the checkpoint; others keep their initial state."""
        for name, observer in self._observers.items():
            if name in state:
                observer.load_state_dict(state[name])

    def deliver(self, leave: int = 0) -> None:
        """Deliver all but the last ``leave`` steps. Must be called on every rank: observers may call collectives."""
        while len(self._pending) > leave:
            result, batch, accepted, arrives = self._pending.popleft()
            if arrives is not None:
                arrives.synchronize()
            if bool(accepted):
                for observer in self._observers.values():
                    observer.on_step(result, batch)
