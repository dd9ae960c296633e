"""Multinomial logistic regression by L-BFGS, on features that are given once and may not fit in memory (``--logreg``).

It minimises what scikit-learn's LogisticRegression does: C * sum of cross-entropies + |W|^2 / 2, the bias free (CLIP,
arXiv 2103.00020, appendix A; DINOv2, arXiv 2304.07193). L-BFGS sees the problem in other coordinates: the
features along their principal axes, each scaled so that the loss curves about alike in all of them. That moves no
solution, but it is reached in far fewer iterations.

D features, K classes, n images.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_xcit.runtime import distributed
from eval.linear.pooled import Rows

TOLERANCE = 1e-4
"""No derivative of the mean loss may be larger, in coordinates in which its curvature is about 1 at even odds: there
the weights are still off by about as much. scikit-learn's default, in the features' own coordinates."""
GAP = 1e-3
"""Nor may the objective be further above its least value, as a share of itself. Small derivatives alone say little
where C is large: far from even odds the loss is so flat that a large way down may be left."""

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
    gap: float
    """By which share of itself the objective may still be too large: :func:`_gap`'s bound; see :data:`GAP`."""

    @property
    def converged(self) -> bool:
        """Whether it is a solution, rather than where patience (or float32) ended."""
        return self.gradient <= TOLERANCE and self.gap <= GAP


class _Reached(Exception):
    """The point at hand is a solution: L-BFGS's own conditions know nothing of the gap."""


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
        variance, axes = distributed.broadcast_from_main(torch.linalg.eigh(spread))
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
            tolerance_grad=0.0,
            tolerance_change=0.0,
            history_size=_HISTORY,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            loss, gradient = self._loss(point.detach() * scale, strength)
            point.grad = gradient * scale
            if (
                float(point.grad.abs().max()) <= TOLERANCE
                and _gap(point.detach() * scale, loss, gradient, strength) <= GAP
            ):
                raise _Reached
            return loss

        with contextlib.suppress(_Reached):
            optimizer.step(closure)  # type: ignore[arg-type]
        found = point.detach() * scale
        loss, gradient = self._loss(found, strength)
        weight = (found[:, :-1] @ self._axes.t()).cpu()
        bias = found[:, -1].cpu().double() - weight.double() @ self._mean.cpu().double()
        steepest, gap = float((gradient * scale).abs().max()), _gap(found, loss, gradient, strength)
        return Solution(c, weight, bias.float(), int(optimizer.state[point]["n_iter"]), steepest, gap)

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
            right = log_share.gather(1, truth)
            error = log_share.exp_().scatter_(1, truth, 0)
            # All that the true class lacks. From what the others have: 1 - share has no digits left where share is
            # almost 1, and with a large C that is all there is.
            missed = error.sum(dim=1, keepdim=True)
            loss -= torch.where(missed < 0.5, torch.log1p(-missed), right).sum(dtype=torch.float64)
            error.scatter_(1, truth, -missed)
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


def _gap(point: Tensor, loss: Tensor, gradient: Tensor, strength: float) -> float:
    """How far ``loss`` may be above the least possible, as a share of itself.

    The objective less ``strength`` |W|^2 / 2 is convex, so that, with g its gradient by the weights and h by the bias,
    loss - least <= |g|^2 / (2 strength) + h (b - b*). What b still lacks is not known: it is taken to be at most as far
    as b's own spread and 1. L-BFGS makes h small first, there is no penalty on it.

    Args:
        point, gradient: [K, D + 1], weights along the axes, then the bias.
    """
    by_weight, by_bias = gradient[:, :-1].double(), gradient[:, -1].double()
    way = 1 + float(point[:, -1].max() - point[:, -1].min())
    above = float(by_weight.square().sum()) / (2 * strength) + float(by_bias.abs().sum()) * way
    return above / max(float(loss), torch.finfo(torch.float64).tiny)
