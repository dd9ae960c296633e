"""``--activation-checkpointing auto``: recompute as few stages of the student as the memory requires."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dino_xcit.config import PretrainConfig
from dino_xcit.methods import Method
from dino_xcit.models.xcit import XCiT
from dino_xcit.optim import Rates, Schedules
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.memory import SPARE, peak_memory, reset_peak_memory, total_memory
from dino_xcit.train import TrainState, noise_batch

MOMENTS = {"adamw": 2, "sgd": 1, "lars": 1}
"""Tensors that an optimizer keeps for each parameter."""


class Costs(NamedTuple):
    """Bytes of a training process."""

    base: float
    """Without images, with the optimizer's state."""
    plain: float
    """For each image, without recomputing."""
    stem: float
    """For each image, if the stem is recomputed."""
    full: float
    """For each image, if the stem and all blocks are recomputed."""

    def needed(self, images: int, stages: int, blocks: int) -> float:
        """Return the bytes for a batch if the stem and ``stages - 1`` of the blocks are recomputed; 0 stages: none."""
        each = self.plain if stages == 0 else self.stem - (self.stem - self.full) * (stages - 1) / blocks
        return self.base + images * each

    def fewest_stages(self, images: int, blocks: int, total: float) -> int:
        """Return the fewest stages with which a batch leaves :data:`SPARE` of ``total`` bytes free; else all."""
        stages = range(1 + blocks + 1)
        return next((n for n in stages if self.needed(images, n, blocks) <= (1 - SPARE) * total), stages[-1])


def fit_into_memory(state: TrainState, config: PretrainConfig, device: torch.device) -> None:
    """Choose the stages that the student recomputes, by the peaks of two small batches. Changes nothing else.

    Must be called on every rank; the rank with the highest need decides.
    """
    method, student = state.method, state.method.trained.get_submodule("backbone")
    assert isinstance(student, XCiT)
    blocks, small = student.stages - 1, max(2, config.batch_size_per_gpu // 8)  # KoLeo compares images
    before, rates = state.buffers.read(), Schedules.of(config, 1, 1).at(0, torch.ones((), device=device))

    def peaks(stages: int) -> tuple[int, int]:
        student.recomputed_stages = stages
        return _peak(method, config, rates, device, small), _peak(method, config, rates, device, 2 * small)

    peaks(0)  # the first passes allocate and compile
    measured = [peaks(stages) for stages in (0, 1, 1 + blocks)]
    method.trained.zero_grad(set_to_none=True)
    state.buffers.write(before)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    plain, stem, full = ((large - one) / small for one, large in measured)
    moments = MOMENTS[config.optimizer] * sum(p.nbytes for p in method.trained.parameters() if p.requires_grad)
    costs = Costs(measured[0][0] - small * plain + moments, plain, stem, full)
    total = total_memory(device)
    stages = max(distributed.gather_objects(costs.fewest_stages(config.batch_size_per_gpu, blocks, total)))
    student.recomputed_stages = stages
    needed = costs.needed(config.batch_size_per_gpu, stages, blocks)
    what = "nothing" if stages == 0 else f"the stem and {stages - 1} of {blocks} blocks"
    log.info(
        f"activation checkpointing recomputes {what}: about {needed / 1e9:.3g} of {total / 1e9:.3g} GB per process"
    )


def _peak(method: Method, config: PretrainConfig, rates: Rates, device: torch.device, images: int) -> int:
    """Return the peak memory of a forward and backward pass over noise."""
    batch = noise_batch(config, images, device)
    method.trained.zero_grad(set_to_none=True)
    reset_peak_memory(device)
    method.forward_backward(batch, rates)
    return peak_memory(device)
