"""Observers on a device that works asynchronously: a step is delivered one step late, and only if it was accepted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from dino_xcit.observers import Observers


class OnCuda(Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


class Recorder:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_step(self, result: Any, batch: Any) -> None:
        self.seen.append(batch)

    def metrics(self) -> dict[str, float]:
        return {"steps_seen": len(self.seen)}

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}


def test_a_step_is_delivered_while_the_next_one_runs_and_a_skipped_one_never(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    event = Mock()
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    recorder = Recorder()
    observers = Observers([recorder])

    def step(number: int, accepted: bool) -> SimpleNamespace:
        flag = torch.tensor(accepted).as_subclass(OnCuda)
        result = SimpleNamespace(accepted=flag, metrics=lambda method: {})
        observers.on_step(result, number)
        flag.fill_(not accepted)  # the device reuses it: the copy counts
        return result

    step(0, accepted=True)
    assert (recorder.seen, event.synchronize.call_count) == ([], 0)
    step(1, accepted=False)
    assert (recorder.seen, event.synchronize.call_count) == ([0], 1)
    last = step(2, accepted=True)
    assert (recorder.seen, event.synchronize.call_count) == ([0], 2)
    assert observers.metrics(last, None) == {"steps_seen": 2.0}
    assert recorder.seen == [0, 2]
    step(3, accepted=True)
    observers.deliver()
    assert observers.state_dict() == {"Recorder": {"seen": [0, 2, 3]}}
