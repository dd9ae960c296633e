"""Multinomial logistic regression by L-BFGS over a grid of C, on features of unaugmented images (``--logreg``).

It minimises what scikit-learn's LogisticRegression does: C * sum of cross-entropies + |W|^2 / 2, the bias free (CLIP,
arXiv 2103.00020, section 3.2; DINOv2, arXiv 2304.07193, appendix B). The features are centred and divided by one number
before, and the penalty adapted, which moves no solution but lets L-BFGS reach it; sums of losses are float64, all else
float32.

D features, K classes, n images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_xcit import distributed
from eval.linear import moments
from eval.pooled import Rows

TOLERANCE = 1e-5
"""Converged: no derivative of the mean loss by a weight (of features with mean deviation 1) is larger. scikit-learn's
default is 1e-4."""

_HISTORY = 10
_ROWS_AT_ONCE = 8192
_KEPT_BYTES = 4 << 30
"""So much of a process's share of the features stays on the device; more is read from the disk in each pass."""


@dataclass
class Solution:
    """One regression."""

    c: float
    weight: Tensor
    """[K, D], for features as they are."""
    bias: Tensor
    """[K]."""
    iterations: int
    gradient: float
    """The largest derivative that is left."""

    @property
    def converged(self) -> bool:
        """Whether it is a solution, rather than where patience ended."""
        return self.gradient <= TOLERANCE


class LogisticRegression:
    """The regressions of one training set, one C after another."""

    def __init__(self, features: Rows, labels: NDArray[np.int64], classes: int, device: torch.device) -> None:
        """``features``: n rows of D, with ``labels`` [n]. Under torchrun each process takes its share of the rows."""
        mean, variance = moments(features)
        self._scale = float(1 / np.sqrt(max(variance.mean(), np.finfo(np.float32).tiny)))
        self._mean = torch.as_tensor(mean, dtype=torch.float32).to(device)
        self._features, self._count, self._device = features, len(features), device
        world, rank = distributed.world_size(), distributed.rank()
        self._share = range(self._count * rank // world, self._count * (rank + 1) // world)
        self._labels = torch.from_numpy(np.asarray(labels[self._share.start : self._share.stop])).to(device)
        small = 4 * len(self._share) * features.width <= _KEPT_BYTES
        self._kept = list(self._read()) if small else None
        # Weight and bias in one, as L-BFGS sees them: those of the centred and divided features.
        self._point = torch.zeros(classes, features.width + 1, device=device)

    def solve(self, c: float, max_iterations: int) -> Solution:
        """The regression with ``c``, starting from where the one before ended; from zeros at first."""
        strength = self._scale**2 / (c * self._count)
        point = self._point.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [point],
            max_iter=max_iterations,
            max_eval=2 * max_iterations,
            tolerance_grad=TOLERANCE,
            tolerance_change=0.0,
            history_size=_HISTORY,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            loss, point.grad = self._loss(point.detach(), strength)
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        self._point = point.detach()
        _, gradient = self._loss(self._point, strength)
        weight = self._point[:, :-1] * self._scale
        bias = self._point[:, -1].double() - weight.double() @ self._mean.double()
        iterations = int(optimizer.state[point]["n_iter"])
        return Solution(c, weight.cpu(), bias.float().cpu(), iterations, float(gradient.abs().max()))

    def state(self) -> Tensor:
        """Where the last regression ended, on the CPU: the next one starts there."""
        return self._point.cpu()

    def go_on_from(self, state: Tensor) -> None:
        """The inverse of :meth:`state`."""
        self._point = state.to(self._device)

    def _loss(self, point: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy over all processes' images plus ``strength`` |W|^2 / 2, and its gradient [K, D + 1]."""
        weight, bias = point[:, :-1], point[:, -1]
        loss = torch.zeros(1, dtype=torch.float64, device=self._device)
        gradient = torch.zeros_like(point)
        first = 0
        for features in self._read() if self._kept is None else self._kept:
            truth = self._labels[first : first + len(features), None]
            first += len(features)
            log_share = torch.addmm(bias, features, weight.t()).log_softmax(dim=1)
            loss -= log_share.gather(1, truth).sum(dtype=torch.float64)
            error = log_share.exp_().scatter_add_(1, truth, torch.full_like(truth, -1, dtype=torch.float32))
            gradient[:, :-1] += error.t() @ features
            gradient[:, -1] += error.sum(dim=0)
        distributed.all_reduce_sum([gradient])
        loss = distributed.gather_rows(loss).sum() / self._count  # all_reduce_sum would round it to float32
        gradient /= self._count
        gradient[:, :-1] += strength * weight
        return loss + 0.5 * strength * weight.double().square().sum(), gradient

    def _read(self) -> Iterator[Tensor]:
        for start in range(self._share.start, self._share.stop, _ROWS_AT_ONCE):
            rows = self._features[start : min(start + _ROWS_AT_ONCE, self._share.stop)]
            yield (torch.from_numpy(rows).to(self._device) - self._mean) * self._scale
