"""Which C, and which features, suit a logistic regression: tried on held-out training images, then fitted to all.

Resumable: what was tried is kept in logreg.pth beside the probe, after each C.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dino_xcit.errors import InputError
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import progress_bar
from eval.linear.heads import guesses
from eval.linear.logistic import LogisticRegression, Solution
from eval.linear.pooled import Labelled, Rows
from eval.linear.probe_file import LOGREG_NAME, Settings, write_probe
from eval.linear.setup import Probe
from eval.stats import correct, wilson_interval

Record = dict[str, Any]


def search(train: Labelled, probe: Probe, identity: Settings, stored: Record | None) -> Record:
    """Try every C with every choice of features, and fit the best to all training images.

    Where nothing is held out, the first choice and the first C are taken untried.

    Args:
        train: all training images, as they are prepared for evaluation.
        identity: of the regression, for logreg.pth.
        stored: what that holds already.

    Returns:
        ``tried``, a record each; ``chosen``, the best of them; ``weight`` [K, D] and ``bias`` [K] of its fit to all
        training images, ``iterations``, ``gradient`` and ``gap`` of that; ``seconds``.
    """
    started = time.perf_counter()
    content: Record = stored or {"tried": [], "last": None, "seconds": 0.0}
    spent = float(content["seconds"])
    choices, cs, patience = probe.config.features, probe.config.logreg_cs, probe.config.logreg_iterations
    held, classes, device, folder = probe.held, probe.classes, probe.device, probe.folder
    if "weight" in content:
        log.info(f"already complete: {folder / LOGREG_NAME} holds this regression (--resume never repeats it)")
        return content
    learnt = np.setdiff1d(np.arange(len(train.labels)), held)
    plan = [(choice, c) for choice in choices for c in sorted(cs)] if len(held) else []
    done = len(content["tried"])
    if done:
        log.info(f"resuming {folder / LOGREG_NAME} after {done} of {len(plan)} regressions")
    at_hand, regression = "", None
    with progress_bar(len(plan) + 1, "logistic regression", distributed.is_main(), done, unit="fit") as bar:
        for number in range(done, len(plan)):
            choice, c = plan[number]
            if regression is None or choice != at_hand:
                regression = None  # its features are many: none beside the next one's
                rows = train.rows[choice].some(learnt)
                at_hand, regression = choice, LogisticRegression(rows, train.labels[learnt], classes, device)
            # From where the next smaller C ended.
            same = number > 0 and plan[number - 1][0] == choice
            found = regression.solve(c, patience, tuple(content["last"]) if same else None)
            _demand_finite(found)
            content["tried"].append(_tried(found, choice, train, held, device))
            content |= {"last": [found.weight, found.bias], "seconds": spent + time.perf_counter() - started}
            if distributed.is_main():
                write_probe(folder, content, identity, LOGREG_NAME)
            bar.update()
        regression = None
        tried = content["tried"]
        best: Record = {"features": choices[0], "c": cs[0]}
        if tried:
            best = max(tried, key=lambda one: one["held_out_top1"])
        rows = train.rows[best["features"]]
        final = LogisticRegression(rows, train.labels, classes, device).solve(best["c"], patience)
        _demand_finite(final)
        bar.update()
    content |= {
        "last": None,
        "chosen": best,
        "weight": final.weight,
        "bias": final.bias,
        "iterations": final.iterations,
        "gradient": final.gradient,
        "gap": final.gap,
        "converged": final.converged,
        "seconds": spent + time.perf_counter() - started,
    }
    if distributed.is_main():
        write_probe(folder, content, identity, LOGREG_NAME)
    return content


def _tried(found: Solution, choice: str, train: Labelled, held: NDArray[np.int64], device: torch.device) -> Record:
    rows = train.rows[choice].some(held)
    hits = correct(guesses(found.weight, found.bias, rows, device), train.labels[held], 1)
    return {
        "features": choice,
        "c": found.c,
        "held_out_top1": 100.0 * float(hits.mean()),
        "iterations": found.iterations,
        "converged": found.converged,
    }


def _demand_finite(found: Solution) -> None:
    if not torch.isfinite(found.weight).all():
        raise InputError(f"the logistic regression with C = {found.c:g} is not finite: leave it out of --logreg-cs")


def logistic_results(content: Record, val: Labelled, device: torch.device) -> tuple[Record, NDArray[np.bool_]]:
    """The figures of what :func:`search` found, and whether each validation image was recognised."""
    chosen = content["chosen"]
    rows: Rows = val.rows[chosen["features"]]
    found = guesses(content["weight"], content["bias"], rows, device)
    hits = correct(found, val.labels, 1)
    five = len(content["bias"]) > 5
    by_features: dict[str, list[list[Any]]] = {}
    for one in content["tried"]:
        by_features.setdefault(one["features"], []).append([one["c"], one["held_out_top1"]])
    results: Record = {
        "features": chosen["features"],
        "c": chosen["c"],
        "chosen_on": "held-out training images" if content["tried"] else "nothing: there was one choice",
        "held_out_top1": chosen.get("held_out_top1"),
        "top1": 100.0 * float(hits.mean()),
        "top1_interval": list(wilson_interval(hits)),
        "top5": 100.0 * float(correct(found, val.labels, 5).mean()) if five else None,
        "iterations": content["iterations"],
        "gradient": content["gradient"],
        "gap": content["gap"],
        "converged": content["converged"],
        "not_converged": [[one["features"], one["c"]] for one in content["tried"] if not one["converged"]],
        "held_out_top1_by_c": by_features,
    }
    return results, hits
