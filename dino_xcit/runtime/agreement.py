"""What all processes of a run must decide alike, step by step: stop, or go on.

Collective operations hang where one process leaves the loop a step before another. So no process acts on what it alone
knows: it says so here, and all act on the sum.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from dino_xcit.runtime import distributed

TOPICS = ("stop", "unreadable", "diverged", "cannot_save", "too_many_unreadable")
"""stop: a signal came; unreadable: images were replaced; the others end the run."""


class Agreement:
    """Adds up a few small numbers over all processes, on the CPU (gloo), whatever the device does meanwhile.

    Where the device works asynchronously (CUDA) the sum is that of the call before, so that no process waits for
    another one's current step; on the CPU it is the sum of this call.
    """

    def __init__(self, device: torch.device, timeout: float) -> None:
        """``timeout``: seconds after which waiting for another process is an error."""
        self._late = device.type != "cpu"
        self._group: dist.ProcessGroup | None = None
        if distributed.world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))  # type: ignore[assignment]
        self._posted: tuple[torch.Tensor, dist.Work] | None = None

    def exchange(self, **values: int) -> dict[str, int]:
        """This process's values by topic; the sums over all processes. All processes call it equally often.

        Topics that are not given count as 0. The first call on CUDA returns zeros.
        """
        unknown = values.keys() - set(TOPICS)
        if unknown:
            raise ValueError(f"unknown topics {', '.join(sorted(unknown))}, expected some of {', '.join(TOPICS)}")
        own = torch.tensor([int(values.get(topic, 0)) for topic in TOPICS])
        if self._group is None:
            return dict(zip(TOPICS, own.tolist(), strict=True))
        before = self._posted
        work = dist.all_reduce(own, group=self._group, async_op=True)
        assert work is not None
        self._posted = (own, work)
        if self._late and before is None:
            return dict.fromkeys(TOPICS, 0)
        sums, work = before if self._late and before is not None else self._posted
        work.wait()
        return dict(zip(TOPICS, sums.tolist(), strict=True))
