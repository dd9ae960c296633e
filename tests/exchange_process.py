"""One of two processes that train a full-size network and record their collective operations.

test_scale_out.py starts it with a file name. The images are small to keep steps short: messages depend only on the
weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_run import CPU, sampler_of, steps, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dino_xcit.optim import Schedules
from dino_xcit.runtime import distributed
from dino_xcit.train import build_state, train_step

CONFIG = tiny_config(
    arch="xcit_small_12_p16", out_dim=65536, head_hidden_dim=2048, head_bottleneck_dim=256, batch_size_per_gpu=2,
    accumulation_steps=2, global_crops_size=32, drop_path_rate=0.0,  # on the CPU, drop path calls nonzero
)  # fmt: skip
HOST_WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select")
"""Operations whose result the host needs before it continues; on a GPU they synchronise."""


class Messages(TorchDispatchMode):
    """Record all c10d operations, including those of DistributedDataParallel, while this context is active."""

    def __init__(self, gradients: int) -> None:
        super().__init__()
        self.gradients = gradients
        self.clear()

    def clear(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.host_waits: list[str] = []
        self.arrived = 0
        """Number of gradients accumulated so far."""

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = operation.name()
        if name.startswith("c10d::"):
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.seen.append({
                "kind": name.removeprefix("c10d::").strip("_"),
                "bytes": sum(tensor.nbytes for tensor in tensors),
                "arrived": self.arrived,
            })  # fmt: skip
        elif name in HOST_WAITS:
            self.host_waits.append(name)
        return operation(*args, **(kwargs or {}))


def main() -> None:
    """Train steps of one, one and two forward passes, then compute the metrics of a logged step."""
    torch.set_num_threads(1)
    distributed.start(CPU)
    rank, world = distributed.rank(), distributed.world_size()
    state = build_state(CONFIG, CPU)
    sampler = sampler_of(CONFIG, rank, world)
    schedules = Schedules.of(CONFIG, sampler.steps_per_epoch, sampler.global_batch)
    trained = {name: p for name, p in state.method.student.named_parameters() if p.requires_grad}
    messages = Messages(len(trained))
    order: list[str] = []

    def note(name: str) -> None:
        messages.arrived += 1
        order.append(name)

    for name, parameter in trained.items():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: note(name))
    seen: list[dict[str, Any]] = []
    for passes, batches in zip((1, 1, 2), steps(CONFIG, 0, 3, rank, world), strict=True):
        messages.clear()
        order.clear()
        with messages:
            result = train_step(state, batches[:passes], schedules, CONFIG)
        seen.append({
            "passes": passes, "messages": messages.seen, "host_waits": messages.host_waits, "first": order[0],
        })  # fmt: skip
    messages.clear()
    with messages:
        result.metrics(state.method)
    logged = {"messages": messages.seen, "host_waits": messages.host_waits}
    running = sum(
        b.nbytes for b in [*state.method.student.buffers(), *state.method.teacher.buffers()] if b.is_floating_point()
    )
    found = {
        "gradients": len(trained),
        "gradient_bytes": sum(parameter.nbytes for parameter in trained.values()),
        "prototype_bytes": state.method.student.head.last_layer.weight_v.nbytes,
        "own_bytes": state.method.loss.center.nbytes + running + 7 * 4,  # plus flag, loss, rows, passes, 3 metrics
        "steps": seen,
        "logged": logged,
    }
    Path(f"{sys.argv[1]}-{rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.stop()


if __name__ == "__main__":
    main()
