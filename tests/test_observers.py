"""Observers on an asynchronous device: accepted steps are delivered one step late, skipped steps never."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from dino_xcit.observers import Observers


class OnCuda(Tensor):
    """A CPU tensor with is_cuda set."""

    is_cuda = True  # type: ignore[assignment]


def test_observers_deliver_accepted_steps_one_step_late_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    event = Mock()
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    seen: list[int] = []
    recorder = SimpleNamespace(on_step=lambda _, batch: seen.append(batch), metrics=lambda: {"steps_seen": len(seen)})
    observers = Observers([recorder])

    def step(number: int, accepted: bool) -> SimpleNamespace:
        flag = torch.tensor(accepted).as_subclass(OnCuda)
        result = SimpleNamespace(accepted=flag, metrics=lambda method: {})
        observers.on_step(result, number)
        flag.fill_(not accepted)  # the device reuses the flag, so the observers need their own copy
        return result

    step(0, accepted=True)
    assert (seen, event.synchronize.call_count) == ([], 0)
    step(1, accepted=False)
    assert (seen, event.synchronize.call_count) == ([0], 1)
    last = step(2, accepted=True)
    assert (seen, event.synchronize.call_count) == ([0], 2)
    assert observers.metrics(last, None) == {"steps_seen": 2.0}
    assert seen == [0, 2]
    step(3, accepted=True)
    observers.deliver()
    assert seen == [0, 2, 3]
