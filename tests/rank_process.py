"""One rank of a two-rank run that test_two_ranks.py starts; it writes its results to a file."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any
from unittest.mock import Mock

import numpy as np
import torch
from tiny_run import CPU, learnt, sampler_of, steps, tiny_config
from torch import Tensor

from dino_xcit.config import PretrainConfig
from dino_xcit.health import StopFlags
from dino_xcit.methods.dino import sinkhorn_knopp
from dino_xcit.monitors import feature_metrics, prototype_metrics
from dino_xcit.optim import Schedules
from dino_xcit.runtime import distributed
from dino_xcit.train import build_state, train_step
from eval.linear.online import OnlineProbe

STEPS = 3
SCORES = 3 * torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
LABELS = (torch.arange(10) % 3 == 0).long()

# One process runs `accumulation_steps` forward passes per step; each of two processes runs half of them.
SCENARIOS: dict[str, PretrainConfig] = {
    "sgd": tiny_config(batch_size_per_gpu=4, accumulation_steps=2, optimizer="sgd", lr=0.05, drop_path_rate=0.2),
    "adamw": tiny_config(batch_size_per_gpu=4, accumulation_steps=2, drop_path_rate=0.2),
    "accumulating": tiny_config(batch_size_per_gpu=2, accumulation_steps=4, optimizer="sgd", lr=0.05),
}


def train(config: PretrainConfig, rank: int, world_size: int) -> dict[str, Any]:
    """Train three steps and return the learnt state, losses, image indices and number of skipped steps."""
    sampler = sampler_of(config, rank, world_size)
    schedules = Schedules.of(config, sampler.steps_per_epoch, sampler.global_batch)
    state = build_state(config, CPU)
    losses, indices = [], []
    for batches in steps(config, 0, STEPS, rank, world_size):
        indices.append([batch.indices.tolist() for batch in batches])
        losses.append(float(train_step(state, batches, schedules, config).loss))
    return {"learnt": learnt(state), "losses": losses, "indices": indices, "skipped": int(state.skipped_steps)}


def late_sums(rank: int) -> list[dict[str, int]]:
    """Return the sums of StopFlags with the one-call delay of CUDA.

    Each rank passes other values. No call returns the sums of the last one.
    """
    flags = StopFlags(CPU, timeout=30)
    flags._late = True
    said = [{"stop": rank}, {}, {"unreadable": 2 + rank, "diverged": 1 - rank}, {"stop": 1}, {"stop": 1}]
    none = {"stop": 0, "unreadable": 0, "diverged": 0}
    return [flags.exchange(**none | values) for values in said]


def monitors(rows: Tensor) -> dict[str, float]:
    """Return the monitors of rows that serve as logits and as features of two views."""
    found = prototype_metrics(rows, 0.5, rows.argmax(dim=1)) | feature_metrics(rows, len(rows) // 2)
    return {name: float(value) for name, value in found.items()}


def probe(features: Tensor, labels: Tensor) -> dict[str, Any]:
    """Train the online probe for three steps on rows of two classes; return its loss and its weights."""
    trained = OnlineProbe(features.shape[1], 2, CPU, np.ones(len(labels), dtype=np.bool_))
    batch = Mock(labels=labels, indices=torch.arange(len(labels)))
    for _ in range(STEPS):
        trained.on_step(Mock(features=features), batch)
    return {**trained.metrics(), **trained.state_dict()["classifier"]}


def main() -> None:
    """Run every scenario and collective operation, and save the results of this rank."""
    torch.set_num_threads(1)
    distributed.start(CPU)
    rank = distributed.rank()
    halved = {
        name: dataclasses.replace(config, accumulation_steps=config.accumulation_steps // 2)
        for name, config in SCENARIOS.items()
    }
    results: dict[str, Any] = {name: train(config, rank, 2) for name, config in halved.items()}
    results["world"] = (distributed.rank(), distributed.world_size(), distributed.is_main())
    results["gathered"] = distributed.gather_rows(torch.full((2 + 3 * rank, 4), float(rank)))
    results["gathered none"] = distributed.gather_rows(torch.full((2 * rank, 1), float(rank)))
    tensors = [torch.full((3,), 1.0 + rank), torch.tensor(10.0 * rank)]
    distributed.all_reduce_sum(tensors)
    results["summed"] = tensors
    results["sinkhorn"] = sinkhorn_knopp(SCORES.chunk(2)[rank])
    results["monitors"] = monitors(SCORES.unflatten(0, (2, 5))[:, [slice(3), slice(3, 5)][rank]].flatten(0, 1))
    results["probe"] = probe(SCORES.chunk(2)[rank], LABELS.chunk(2)[rank])
    results["late sums"] = late_sums(rank)
    results["decided"] = [
        distributed.broadcast_from_main("no data" if rank == 0 else None),
        distributed.broadcast_from_main(None),
    ]
    torch.save(results, f"{sys.argv[1]}-{rank}.pt")
    distributed.barrier()
    distributed.stop()


if __name__ == "__main__":
    main()
