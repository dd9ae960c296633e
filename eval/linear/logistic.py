"""Multinomial logistic regression by L-BFGS on fixed features that may exceed the memory (``--logreg``).

The objective is that of scikit-learn's LogisticRegression: C * sum of cross-entropies + |W|^2 / 2, without a penalty on
the bias (CLIP, arXiv 2103.00020, appendix A; DINOv2, arXiv 2304.07193). The problem is preconditioned: the features are
rotated to their principal axes, and each axis is scaled to similar curvature of the loss. The solution is the same, but
L-BFGS needs far fewer iterations.

:func:`search` fits each C with each choice of features without the held-out training images. It is resumable:
logreg.pth is written after each fit.

D features, K classes, n images.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_xcit.errors import InputError
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import progress_bar
from eval.linear.pooled import Rows
from eval.linear.probe import GAP, LOGREG_NAME, Probe, Record
from eval.linear.sgd import guesses
from eval.stats import accuracy, correct, top_accuracies

TOLERANCE = 1e-4
"""Maximum derivative of the mean loss at a solution, in preconditioned coordinates, where the curvature at uniform
predictions is about 1, so that it approximates the error of the weights. The value is scikit-learn's default, which
applies to unscaled coordinates. A solution also needs a gap of at most GAP: with a large C the loss is so flat that
small derivatives do not imply convergence."""

_HISTORY = 10
_ROWS_AT_ONCE = 8192
_KEPT_BYTES = 4 << 30
"""Maximum size of a rank's features on the device; larger ones are read from disk in each pass."""
_MIN_VARIANCE = 1e-8
"""Minimum variance of an axis relative to the largest; smaller ones are rounding errors."""


Solution = dict[str, Any]
"""A fitted regression on the CPU: ``weight`` [K, D] and ``bias`` [K] for unscaled features, ``iterations``,
``gradient`` (largest remaining derivative), ``gap`` (bound on the relative excess of the objective), and
``converged``."""


class _Converged(Exception):
    """Stops L-BFGS at a solution; its own criteria do not include the gap."""


class LogisticRegression:
    """Logistic regressions on one training set with any C."""

    def __init__(self, features: Rows, labels: NDArray[np.int64], classes: int, device: torch.device) -> None:
        """Precondition ``features`` [n, D] with ``labels`` [n]; each rank takes a share of the rows."""
        self._features, self._count, self._classes, self._device = features, len(features), classes, device
        world, rank = distributed.world_size(), distributed.rank()
        self._share = range(self._count * rank // world, self._count * (rank + 1) // world)
        self._labels = torch.from_numpy(np.asarray(labels[self._share.start : self._share.stop])).to(device)
        self._mean = torch.zeros(features.width, device=device)
        self._axes = torch.eye(features.width, device=device)
        self._mean = self._mean_over_images(lambda rows: rows.sum(dim=0))
        spread = self._mean_over_images(lambda rows: rows.t() @ rows).cpu().double()
        # Broadcast from rank 0: other processors may give other signs.
        variance, axes = distributed.broadcast_from_main(torch.linalg.eigh(spread))
        floor = max(_MIN_VARIANCE * float(variance[-1]), float(torch.finfo(torch.float32).tiny))
        self._variance, self._axes = variance.clamp(min=floor).float().to(device), axes.float().to(device)
        small = 4 * len(self._share) * features.width <= _KEPT_BYTES
        self._kept = list(self._read()) if small else None

    def solve(self, c: float, max_iterations: int, start: Sequence[Tensor] | None = None) -> Solution:
        """Fit the regression with ``c``.

        Args:
            max_iterations: maximum number of iterations.
            start: weight [K, D] and bias [K] to start from, such as those of another C. Default: zeros.
        """
        strength = 1 / (c * self._count)
        # For uniform predictions the curvature of the loss is about variance / K.
        scale = torch.cat([self._variance / self._classes + strength, self._variance.new_tensor([1 / self._classes])])
        scale.rsqrt_()
        point = torch.zeros(self._classes, len(scale), device=self._device)
        if start is not None:
            weight, bias = (part.to(self._device) for part in start)
            point = torch.cat([weight @ self._axes, (bias + weight @ self._mean)[:, None]], dim=1) / scale
        point.requires_grad_()
        optimizer = torch.optim.LBFGS(
            [point], max_iter=max_iterations, max_eval=2 * max_iterations, tolerance_grad=0.0, tolerance_change=0.0,
            history_size=_HISTORY, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure() -> Tensor:
            found = point.detach() * scale
            loss, gradient = self._loss(found, strength)
            point.grad = gradient * scale
            if point.grad.abs().max() <= TOLERANCE and _gap(found, loss, gradient, strength) <= GAP:
                raise _Converged
            return loss

        with contextlib.suppress(_Converged):
            optimizer.step(closure)  # type: ignore[arg-type]
        found = point.detach() * scale
        loss, gradient = self._loss(found, strength)
        weight = (found[:, :-1] @ self._axes.t()).cpu()
        bias = found[:, -1].cpu().double() - weight.double() @ self._mean.cpu().double()
        if not torch.isfinite(weight).all():
            raise InputError(f"the logistic regression with C = {c:g} is not finite: remove it from --logreg-cs")
        steepest, gap = float((gradient * scale).abs().max()), _gap(found, loss, gradient, strength)
        return {
            "weight": weight, "bias": bias.float(), "iterations": int(optimizer.state[point]["n_iter"]),
            "gradient": steepest, "gap": gap, "converged": steepest <= TOLERANCE and gap <= GAP,
        }  # fmt: skip

    def _loss(self, point: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        """Compute mean cross-entropy over all ranks' images plus ``strength`` |W|^2 / 2, and its gradient [K, D + 1].

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
            # 1 - p of the true class as the sum of the others: the difference loses all digits for p close to 1, which
            # is typical with a large C.
            missed = error.sum(dim=1, keepdim=True)
            loss -= torch.where(missed < 0.5, torch.log1p(-missed), right).sum(dtype=torch.float64)
            error.scatter_(1, truth, -missed)
            gradient[:, :-1] += error.t() @ features
            gradient[:, -1] += error.sum(dim=0)
        distributed.all_reduce_sum([gradient])
        # Gather in float64, as the line search needs small differences; all_reduce_sum is float32.
        loss = distributed.gather_rows(loss).sum() / self._count
        gradient /= self._count
        gradient[:, :-1] += strength * weight
        return loss + 0.5 * strength * weight.double().square().sum(), gradient

    def _mean_over_images(self, total: Callable[[Tensor], Tensor]) -> Tensor:
        """Average ``total``, a sum over a chunk of rows, over all images."""
        empty = torch.zeros(1, self._features.width, device=self._device)
        found = torch.zeros_like(total(empty))
        for rows in self._read():
            found += total(rows)
        distributed.all_reduce_sum([found])
        return found / self._count

    def _read(self) -> Iterator[Tensor]:
        """Yield this rank's rows in chunks, centred and rotated to the axes."""
        for start in range(self._share.start, self._share.stop, _ROWS_AT_ONCE):
            rows = self._features[start : min(start + _ROWS_AT_ONCE, self._share.stop)]
            yield (torch.from_numpy(rows).to(self._device) - self._mean) @ self._axes


def _gap(point: Tensor, loss: Tensor, gradient: Tensor, strength: float) -> float:
    """Bound how far ``loss`` is above the minimum, relative to ``loss``.

    The objective minus ``strength`` |W|^2 / 2 is convex. With g its gradient by the weights and h by the bias,
    loss - minimum <= |g|^2 / (2 strength) + h (b - b*). The unknown b - b* is assumed to be at most the range of b
    plus 1; L-BFGS makes h small early, as the bias has no penalty.

    Args:
        point, gradient: [K, D + 1], weights along the axes, then the bias.
    """
    by_weight, by_bias = gradient[:, :-1].double(), gradient[:, -1].double()
    distance = 1 + float(point[:, -1].max() - point[:, -1].min())
    excess = float(by_weight.square().sum()) / (2 * strength) + float(by_bias.abs().sum()) * distance
    return excess / max(float(loss), torch.finfo(torch.float64).tiny)


def search(probe: Probe, stored: Record | None) -> Record:
    """Choose C and features on held-out training images and fit the best to all training images, unaugmented.

    Without held-out images, use the first features and the first C.

    Args:
        stored: content of logreg.pth from an earlier run.

    Returns:
        ``tried`` (a record per fit), ``chosen`` (the best record), the :data:`Solution` on all training images, and
        ``seconds``.
    """
    started, identity = time.perf_counter(), probe.identity_of_logreg()
    content: Record = stored or {"tried": [], "last": None, "seconds": 0.0}
    if "weight" in content:
        log.info(f"already complete: {probe.folder / LOGREG_NAME} holds this regression (--resume never fits it again)")
        return content
    spent, tried, iterations = float(content["seconds"]), content["tried"], probe.config.logreg_iterations
    train, labels = probe.rows(probe.train), probe.labels
    choices, cs, held = probe.config.features, probe.config.logreg_cs, probe.held
    done = {(one["features"], one["c"]) for one in tried}
    plan = [(choice, c) for choice in choices for c in sorted(cs)] if len(held) else []
    if done:
        log.info(f"resuming {probe.folder / LOGREG_NAME} after {len(done)} of {len(plan)} regressions")
    learnt = np.setdiff1d(np.arange(len(labels)), held)
    with progress_bar(len(plan) + 1, "logistic regression", distributed.is_main(), len(done), unit="fit") as bar:
        for choice in choices:
            left = [c for other, c in plan if other == choice and (choice, c) not in done]
            if not left:
                continue
            rows, held_rows = train[choice].some(learnt), train[choice].some(held)
            regression = LogisticRegression(rows, labels[learnt], probe.classes, probe.device)
            for c in left:
                # Start from the solution of the next smaller C.
                start = content["last"] if tried and tried[-1]["features"] == choice else None
                found = regression.solve(c, iterations, start)
                guessed = classify(found["weight"], found["bias"], held_rows, probe.device)
                record = {"features": choice, "c": c, "held_out_top1": accuracy(guessed, labels[held], 1)}
                tried.append(record | {name: found[name] for name in ("iterations", "converged")})
                content |= {"last": [found["weight"], found["bias"]]}
                content["seconds"] = spent + time.perf_counter() - started
                probe.write(LOGREG_NAME, content, identity)
                bar.update()
            del regression  # free its features before the next one
        best: Record = {"features": choices[0], "c": cs[0]}
        if tried:
            best = max(tried, key=lambda one: one["held_out_top1"])
        everything = LogisticRegression(train[best["features"]], labels, probe.classes, probe.device)
        content |= {"last": None, "chosen": best, **everything.solve(best["c"], iterations)}
        content["seconds"] = spent + time.perf_counter() - started
        bar.update()
    probe.write(LOGREG_NAME, content, identity)
    return content


def logistic_results(probe: Probe, content: Record) -> tuple[Record, NDArray[np.bool_]]:
    """Evaluate the result of :func:`search` on the validation images: results and hits [images]."""
    chosen, tried = content["chosen"], content["tried"]
    found = classify(content["weight"], content["bias"], probe.rows(probe.val)[chosen["features"]], probe.device)
    tops = top_accuracies(found, probe.val.labels, five=len(content["bias"]) > 5)
    by_features: dict[str, list[list[float]]] = {}
    for one in tried:
        by_features.setdefault(one["features"], []).append([one["c"], one["held_out_top1"]])
    results: Record = {
        "features": chosen["features"],
        "c": chosen["c"],
        "chosen_on": "held-out training images" if tried else "nothing: there was one choice",
        "held_out_top1": chosen.get("held_out_top1"),
        **{name: tops[name] for name in ("top1", "top1_interval", "top5")},
        **{name: content[name] for name in ("iterations", "gradient", "gap", "converged")},
        "not_converged": [[one["features"], one["c"]] for one in tried if not one["converged"]],
        "held_out_top1_by_c": by_features,
    }
    return results, correct(found, probe.val.labels, 1)


def classify(weight: Tensor, bias: Tensor, features: Rows, device: torch.device) -> NDArray[np.int64]:
    """Predict the classes with the largest logits, best first: [n, min(5, K)]. ``weight`` is [K, D], ``bias`` [K]."""
    weight, bias = weight.to(device), bias.to(device)
    return guesses(lambda rows: torch.addmm(bias, rows, weight.t()), features, device)
