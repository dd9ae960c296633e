"""Multinomial logistic regression by L-BFGS, on features that are given once and may not fit in memory (``--logreg``).

It minimises what scikit-learn's LogisticRegression does: C * sum of cross-entropies + |W|^2 / 2, the bias free (CLIP,
arXiv 2103.00020, appendix A; DINOv2, arXiv 2304.07193). L-BFGS sees the problem in other coordinates: the
features along their principal axes, each scaled so that the loss curves about alike in all of them. That moves no
solution, but it is reached in far fewer iterations.

D features, K classes, n images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_xcit import distributed
from eval.pooled import Rows

TOLERANCE = 1e-4
"""Converged: no derivative of the mean loss is larger, in coordinates in which its curvature is about 1: there the
weights are still off by about as much. scikit-learn's default, in the features' own coordinates."""

_HISTORY = 10
_ROWS_AT_ONCE = 8192
_KEPT_BYTES = 4 << 30
"""So much of a process's share of the features stays on the device; more is read from the disk in each pass."""
_LEAST_SPREAD = 1e-8
"""Share of the largest variance: along axes with less there is rounding only."""


@dataclass
class Solution:
    """One regression, on the CPU."""

    c: float
    weight: Tensor
    """[K, D], for features as they are."""
    bias: Tensor
    """[K]."""
    iterations: int
    gradient: float
    """The largest derivative that is left; see :data:`TOLERANCE`."""

    @property
    def converged(self) -> bool:
        """Whether it is a solution, rather than where patience ended."""
        return self.gradient <= TOLERANCE


class LogisticRegression:
    """The regressions of one training set with any C."""

    def __init__(self, features: Rows, labels: NDArray[np.int64], classes: int, device: torch.device) -> None:
        """``features``: n rows of D, with ``labels`` [n]. Under torchrun each process takes its share of the rows."""
        self._features, self._count, self._classes, self._device = features, len(features), classes, device
        world, rank = distributed.world_size(), distributed.rank()
        self._share = range(self._count * rank // world, self._count * (rank + 1) // world)
        self._labels = torch.from_numpy(np.asarray(labels[self._share.start : self._share.stop])).to(device)
        self._mean = torch.zeros(features.width, device=device)
        self._axes = torch.eye(features.width, device=device)
        self._mean = self._mean_over_images(lambda rows: rows.sum(dim=0))
        spread = self._mean_over_images(lambda rows: rows.t() @ rows).cpu().double()
        # Axes are found once: on other processors they might come out with other signs.
        variance, axes = distributed.main_decides(torch.linalg.eigh(spread))
        floor = max(_LEAST_SPREAD * float(variance[-1]), float(torch.finfo(torch.float32).tiny))
        self._variance, self._axes = variance.clamp(min=floor).float().to(device), axes.float().to(device)
        small = 4 * len(self._share) * features.width <= _KEPT_BYTES
        self._kept = list(self._read()) if small else None

    def solve(self, c: float, max_iterations: int, start: tuple[Tensor, Tensor] | None = None) -> Solution:
        """The regression with ``c``.

        Args:
            max_iterations: patience.
            start: weight [K, D] and bias [K] to start from, such as another C's; zeros without.
        """
        strength = 1 / (c * self._count)
        # At even odds the loss of K classes curves by about the features' variance / K.
        scale = torch.cat([self._variance / self._classes + strength, self._variance.new_tensor([1 / self._classes])])
        scale.rsqrt_()
        point = torch.zeros(self._classes, len(scale), device=self._device)
        if start is not None:
            weight, bias = (part.to(self._device) for part in start)
            point = torch.cat([weight @ self._axes, (bias + weight @ self._mean)[:, None]], dim=1) / scale
        point.requires_grad_()
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
            loss, gradient = self._loss(point.detach() * scale, strength)
            point.grad = gradient * scale
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        found = point.detach() * scale
        left = float((self._loss(found, strength)[1] * scale).abs().max())
        weight = (found[:, :-1] @ self._axes.t()).cpu()
        bias = found[:, -1].cpu().double() - weight.double() @ self._mean.cpu().double()
        return Solution(c, weight, bias.float(), int(optimizer.state[point]["n_iter"]), left)

    def _loss(self, point: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy over all processes' images plus ``strength`` |W|^2 / 2, and its gradient [K, D + 1].

        Args:
            point: [K, D + 1], weights along the axes, then the bias.
        """
        weight, bias = point[:, :-1], point[:, -1]
        loss = torch.zeros(1, dtype=torch.float64, device=self._device)
        gradient = torch.zeros_like(point)
        first = 0
        for features in self._read() if self._kept is None else self._kept:
            truth = self._labels[first : first + len(features), None]
            first += len(features)
            log_share = torch.addmm(bias, features, weight.t()).log_softmax(dim=1)
            loss -= log_share.gather(1, truth).sum(dtype=torch.float64)
            error = log_share.exp_().scatter_add_(1, truth, -torch.ones_like(truth, dtype=torch.float32))
            gradient[:, :-1] += error.t() @ features
            gradient[:, -1] += error.sum(dim=0)
        distributed.all_reduce_sum([gradient])
        # Not by all_reduce_sum, which is float32: the line search looks at small differences.
        loss = distributed.gather_rows(loss).sum() / self._count
        gradient /= self._count
        gradient[:, :-1] += strength * weight
        return loss + 0.5 * strength * weight.double().square().sum(), gradient

    def _mean_over_images(self, total: Callable[[Tensor], Tensor]) -> Tensor:
        """``total`` of some rows, summed over all and divided by n."""
        empty = torch.zeros(1, self._features.width, device=self._device)
        found = torch.zeros_like(total(empty))
        for rows in self._read():
            found += total(rows)
        distributed.all_reduce_sum([found])
        return found / self._count

    def _read(self) -> Iterator[Tensor]:
        """This process's share, centred, along the axes."""
        for start in range(self._share.start, self._share.stop, _ROWS_AT_ONCE):
            rows = self._features[start : min(start + _ROWS_AT_ONCE, self._share.stop)]
            yield (torch.from_numpy(rows).to(self._device) - self._mean) @ self._axes
