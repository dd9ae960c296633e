"""Multinomial logistic regression by L-BFGS, on features that are given once and may not fit in memory (``--logreg``).

It minimises what scikit-learn's LogisticRegression does: C * sum of cross-entropies + |W|^2 / 2, the bias free (CLIP,
arXiv 2103.00020, appendix A; DINOv2, arXiv 2304.07193). L-BFGS sees the problem in other coordinates: the
features along their principal axes, each scaled so that the loss curves about alike in all of them. That moves no
solution, but it is reached in far fewer iterations.

:func:`search` tries every C with every choice of features on held-out training images. It is resumable: what was tried
is kept in logreg.pth, after each C.

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
"""No derivative of the mean loss may be larger, in coordinates in which its curvature is about 1 at even odds: there
the weights are still off by about as much. scikit-learn's default, in the features' own coordinates. Nor may the
objective be further than GAP above its least value: small derivatives alone say little where C is large, for far from
even odds the loss is so flat that a large way down may be left."""

_HISTORY = 10
_ROWS_AT_ONCE = 8192
_KEPT_BYTES = 4 << 30
"""So much of a process's share of the features stays on the device; more is read from the disk in each pass."""
_LEAST_SPREAD = 1e-8
"""Share of the largest variance: along axes with less there is rounding only."""


Solution = dict[str, Any]
"""One regression, on the CPU: ``weight`` [K, D] and ``bias`` [K] for features as they are, ``iterations``, ``gradient``
(the largest derivative that is left), ``gap`` (by which share of itself the objective may still be too large), and
``converged``: whether it is a solution, rather than where patience (or float32) ended."""


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

    def solve(self, c: float, max_iterations: int, start: Sequence[Tensor] | None = None) -> Solution:
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
            [point], max_iter=max_iterations, max_eval=2 * max_iterations, tolerance_grad=0.0, tolerance_change=0.0,
            history_size=_HISTORY, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure() -> Tensor:
            found = point.detach() * scale
            loss, gradient = self._loss(found, strength)
            point.grad = gradient * scale
            if point.grad.abs().max() <= TOLERANCE and _gap(found, loss, gradient, strength) <= GAP:
                raise _Reached
            return loss

        with contextlib.suppress(_Reached):
            optimizer.step(closure)  # type: ignore[arg-type]
        found = point.detach() * scale
        loss, gradient = self._loss(found, strength)
        weight = (found[:, :-1] @ self._axes.t()).cpu()
        bias = found[:, -1].cpu().double() - weight.double() @ self._mean.cpu().double()
        if not torch.isfinite(weight).all():
            raise InputError(f"the logistic regression with C = {c:g} is not finite: leave it out of --logreg-cs")
        steepest, gap = float((gradient * scale).abs().max()), _gap(found, loss, gradient, strength)
        return {
            "weight": weight, "bias": bias.float(), "iterations": int(optimizer.state[point]["n_iter"]),
            "gradient": steepest, "gap": gap, "converged": steepest <= TOLERANCE and gap <= GAP,
        }  # fmt: skip

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


def search(probe: Probe, stored: Record | None) -> Record:
    """Try every C with every choice of features, and fit the best to all training images, unaugmented.

    Where nothing is held out, the first choice and the first C are taken untried.

    Args:
        stored: what logreg.pth holds already.

    Returns:
        ``tried``, a record each; ``chosen``, the best of them; ``weight`` [K, D] and ``bias`` [K] of its fit to all
        training images, ``iterations``, ``gradient`` and ``gap`` of that; ``seconds``.
    """
    started, identity = time.perf_counter(), probe.identity_of_logreg()
    content: Record = stored or {"tried": [], "last": None, "seconds": 0.0}
    if "weight" in content:
        log.info(f"already complete: {probe.folder / LOGREG_NAME} holds this regression (--resume never repeats it)")
        return content
    spent, tried, patience = float(content["seconds"]), content["tried"], probe.config.logreg_iterations
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
            rows, asked = train[choice].some(learnt), train[choice].some(held)
            regression = LogisticRegression(rows, labels[learnt], probe.classes, probe.device)
            for c in left:
                # From where the next smaller C ended.
                start = content["last"] if tried and tried[-1]["features"] == choice else None
                found = regression.solve(c, patience, start)
                guessed = classify(found["weight"], found["bias"], asked, probe.device)
                record = {"features": choice, "c": c, "held_out_top1": accuracy(guessed, labels[held], 1)}
                tried.append(record | {name: found[name] for name in ("iterations", "converged")})
                content |= {"last": [found["weight"], found["bias"]]}
                content["seconds"] = spent + time.perf_counter() - started
                probe.write(LOGREG_NAME, content, identity)
                bar.update()
            del regression  # its features are many: none beside the next one's
        best: Record = {"features": choices[0], "c": cs[0]}
        if tried:
            best = max(tried, key=lambda one: one["held_out_top1"])
        everything = LogisticRegression(train[best["features"]], labels, probe.classes, probe.device)
        content |= {"last": None, "chosen": best, **everything.solve(best["c"], patience)}
        content["seconds"] = spent + time.perf_counter() - started
        bar.update()
    probe.write(LOGREG_NAME, content, identity)
    return content


def logistic_results(probe: Probe, content: Record) -> tuple[Record, NDArray[np.bool_]]:
    """The figures of what :func:`search` found, and whether each validation image was recognised."""
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
    """The classes with the largest logits, best first: [n, up to 5]. ``weight`` is [K, D], ``bias`` [K]."""
    weight, bias = weight.to(device), bias.to(device)
    return guesses(lambda rows: torch.addmm(bias, rows, weight.t()), features, device)
