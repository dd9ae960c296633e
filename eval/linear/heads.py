"""Linear probes: many linear classifiers trained side by side on the features of one frozen forward pass.

B batch, D features, C classes, L classifiers, n images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dino_xcit.errors import InputError
from dino_xcit.runtime import distributed
from eval.linear.pooled import Rows

MOMENTUM = 0.9
INIT_DEVIATION = 0.01
REFERENCE_BATCH = 256
"""The batch that learning rates are quoted for (DINO, arXiv 2104.14294, appendix F.3)."""

_ROWS_AT_ONCE = 1024
_COLUMNS_AT_ONCE = 64
_VARIANCE_FLOOR = 1e-6
_COPIES = 5
"""Of a classifier's weights, while it learns: themselves, velocity, gradient, its mean, and the step."""


class LinearHeads:
    """L linear classifiers with a learning rate each, trained by SGD with momentum 0.9 and no weight decay.

    All start from the same weights, N(0, 0.01), and biases of 0. None knows of the others: each ends where it would
    have ended alone.
    """

    def __init__(
        self,
        lrs: Sequence[float],
        classes: int,
        dim: int,
        seed: int,
        device: torch.device,
        standardise: Rows | None = None,
    ) -> None:
        """Fresh classifiers.

        Args:
            lrs: [L] highest learning rates, as they are used, not scaled with the batch any more.
            standardise: n features whose mean and deviation the classifiers' input shall be freed of, as a
                BatchNorm without parameters does. It changes no classifier's family, for it can be folded into the
                weights (:meth:`folded`), but SGD gets nowhere on features that hardly differ from their mean.
        """
        start = torch.empty(classes, dim).normal_(0.0, INIT_DEVIATION, generator=torch.Generator().manual_seed(seed))
        shift: NDArray[np.float64] = np.zeros(dim)
        scale: NDArray[np.float64] = np.ones(dim)
        if standardise is not None:
            shift, variance = moments(standardise)
            scale = 1 / np.sqrt(variance + _VARIANCE_FLOOR)
        self.lrs = torch.tensor(list(lrs), dtype=torch.float32, device=device)
        self._state = {
            "weight": start.repeat(len(lrs), 1, 1).to(device),  # [L, C, D]
            "bias": torch.zeros(len(lrs), classes, device=device),
            "velocity_weight": torch.zeros(len(lrs), classes, dim, device=device),
            "velocity_bias": torch.zeros(len(lrs), classes, device=device),
            "shift": torch.as_tensor(shift, dtype=torch.float32).to(device),
            "scale": torch.as_tensor(scale, dtype=torch.float32).to(device),
        }

    def step(self, features: Tensor, labels: Tensor, taken: Tensor, lr_factor: float) -> Tensor:
        """One step of every classifier.

        Under torchrun each process brings its own images; the step is that of all of them together.

        Args:
            features: [B, D], without gradient.
            labels: [B].
            taken: [B] of 0 and 1: which images are learnt from. The loss is the mean over those.
            lr_factor: the schedule's share of the learning rates.

        Returns:
            [L] mean cross-entropies before the step, on the device.
        """
        parameters = [self._state[name] for name in ("weight", "bias")]
        leaves = [parameter.detach().requires_grad_() for parameter in parameters]
        logits = linear(self._standard(features), *leaves)
        each = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(self.lrs)), reduction="none")
        sums = (each.view(len(self.lrs), -1) * taken).sum(dim=1)
        gradients = list(torch.autograd.grad(sums.sum(), leaves))
        sums, count = sums.detach(), taken.sum()
        distributed.all_reduce_sum([*gradients, sums, count])
        count.clamp_(min=1)
        for name, parameter, gradient in zip(("weight", "bias"), parameters, gradients, strict=True):
            velocity = self._state[f"velocity_{name}"]
            velocity.mul_(MOMENTUM).add_(gradient / count)
            parameter.sub_(lr_factor * self.lrs.view(-1, *[1] * (parameter.ndim - 1)) * velocity)
        return sums / count

    def folded(self, head: int) -> tuple[Tensor, Tensor]:
        """Weight [C, D] and bias [C] of one classifier for features as the backbone gives them, on the CPU."""
        state = self.state_dict()
        weight = state["weight"][head].double() * state["scale"].double()
        bias = state["bias"][head].double() - weight @ state["shift"].double()
        return weight.float(), bias.float()

    def _standard(self, features: Tensor) -> Tensor:
        return (features - self._state["shift"]) * self._state["scale"]

    @torch.no_grad()
    def hits(self, features: Rows, labels: NDArray[np.int64], heads: Sequence[int]) -> NDArray[np.bool_]:
        """Whether an image's label is the first, and among the first five, guesses: [heads, 2, n].

        Args:
            features: [n, D].
            labels: [n].
            heads: which classifiers.
        """
        rows = list(heads)
        weight, bias = self._state["weight"][rows], self._state["bias"][rows]
        out = np.zeros((len(rows), 2, len(features)), dtype=np.bool_)
        for start in range(0, len(features), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            batch = torch.from_numpy(features[part]).to(weight.device)
            truth = torch.from_numpy(np.asarray(labels[part], dtype=np.int64)).to(weight.device)
            logits = linear(self._standard(batch), weight, bias)
            guesses = logits.topk(min(5, weight.shape[1]), dim=-1).indices
            match = guesses == truth[None, :, None]
            out[:, 0, part] = match[..., 0].cpu().numpy()
            out[:, 1, part] = match.any(dim=-1).cpu().numpy()
        return out

    def state_dict(self) -> dict[str, Tensor]:
        """All that decides what a classifier answers and how it goes on learning, on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self._state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            InputError: parts are missing or have other shapes.
        """
        for name, target in self._state.items():
            value = state.get(name)
            if not isinstance(value, Tensor) or value.shape != target.shape:
                raise InputError(f"the stored probe has no {name} of shape {tuple(target.shape)}: use --resume never")
            target.copy_(value)


def guesses(
    weight: Tensor, bias: Tensor, features: Rows, device: torch.device, among: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """The labels with the largest logits, best first: [n, up to 5].

    Args:
        weight, bias: [C, D], [C].
        among: the labels to choose from; None: all.
    """
    labels = torch.arange(len(weight)) if among is None else torch.from_numpy(among)
    weight, bias = weight[labels].to(device), bias[labels].to(device)
    found = np.zeros((len(features), min(5, len(labels))), dtype=np.int64)
    for start in range(0, len(features), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        logits = torch.addmm(bias, torch.from_numpy(features[part]).to(device), weight.t())
        found[part] = labels[logits.topk(found.shape[1], dim=1).indices.cpu()].numpy()
    return found


def moments(features: Rows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean [D] and variance [D] in float64, some columns at a time, so that no copy of all of them is made."""
    means, variances = np.zeros(features.width), np.zeros(features.width)
    for first in range(0, features.width, _COLUMNS_AT_ONCE):
        some = slice(first, min(first + _COLUMNS_AT_ONCE, features.width))
        wide = features.columns(some.start, some.stop).astype(np.float64)
        means[some], variances[some] = wide.mean(axis=0), wide.var(axis=0)
    return means, variances


def bytes_of_heads(heads: int, classes: int, dim: int) -> int:
    """What ``heads`` classifiers take on the device while they learn."""
    return _COPIES * 4 * heads * classes * (dim + 1)


def linear(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Logits of L classifiers: [B, D], [L, C, D], [L, C] to [L, B, C]."""
    heads, classes, _ = weight.shape
    logits = features @ weight.flatten(0, 1).t() + bias.flatten()
    return logits.view(len(features), heads, classes).transpose(0, 1)


def cosine_factor(epoch: int, epochs: int) -> float:
    """The learning rate's share in a 0-based epoch: a cosine from 1 towards 0, constant within the epoch."""
    return 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def scaled(lr: float, global_batch: int) -> float:
    """A learning rate quoted for 256 images, for ``global_batch`` of them."""
    return lr * global_batch / REFERENCE_BATCH
