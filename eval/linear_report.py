"""What a linear probe found, as plain values and as a table. D features, n images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.figures import Figure, figure
from eval.knn import bootstrap_interval
from eval.linear import LinearHeads
from eval.table import percent, table

Record = dict[str, Any]
Labelled = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Features [n, D] and labels [n]."""

PROTOCOL = (
    "linear probe on the frozen class token, SGD with momentum 0.9, no weight decay, cosine by epoch, "
    "RandomResizedCrop (bilinear) and flip (DINO, arXiv 2104.14294); beside it a grid of learning rates on "
    "standardised features, chosen on held-out training images"
)


def percentages(hits: NDArray[np.bool_]) -> list[tuple[float, float]]:
    """[heads, 2, n] (:meth:`LinearHeads.hits`) to (top-1, top-5) a head; NaN for no image at all."""
    if not hits.shape[2]:
        return [(float("nan"), float("nan"))] * len(hits)
    return [(100.0 * float(one.mean()), 100.0 * float(five.mean())) for one, five in hits]


def final_results(
    lr: float,
    paper: LinearHeads,
    lrs: Sequence[float],
    grid: LinearHeads | None,
    history: Sequence[Record],
    held: Labelled,
    val: Labelled,
) -> Record:
    """The figures at the end, and the classifier that they recommend.

    Args:
        lr, paper: the paper's learning rate and its classifier.
        lrs, grid: those of the grid, ascending.
        history: a record an epoch of the paper's classifier: ``epoch``, ``loss``, ``top1``, ``top5``.
        held: the training images on which the grid is chosen.
        val: the validation images; of the grid, only the chosen classifier ever sees them.

    Returns:
        ``results`` and ``figures`` (:meth:`Figure.to_card`) for the card, and ``classifier`` with weight [C, D] and
        bias [C] for features as the backbone gives them: the grid's choice if there is a grid.
    """

    figures: list[Figure] = []

    def final(name: str, heads: LinearHeads, head: int) -> Record:
        hits = heads.hits(*val, [head])
        figures.append(figure(f"{name}, last epoch, top-1", {"classifier": name, "epoch": "last"}, hits[0, 0]))
        top1, top5 = percentages(hits)[0]
        meant = history[-1]["top5"] is not None
        return {"top1": top1, "top1_interval": list(bootstrap_interval(hits[0, 0])), "top5": top5 if meant else None}

    best = max(history, key=lambda record: float(record["top1"]))
    results: Record = {
        "paper": {
            "lr": lr,
            "last_epoch": final("paper", paper, 0),
            "best_epoch": {**best, "chosen_on": "validation images, as published figures are"},
        }
    }
    # Its hits were not kept: epochs are told apart by their accuracy alone.
    settings = {"classifier": "paper", "epoch": "best"}
    figures.append(Figure("paper, best epoch, top-1", settings, float(best["top1"]), None))
    weight, bias = paper.folded(0)
    if grid:
        chances = [top1 for top1, _ in percentages(grid.hits(*held, range(len(lrs))))]
        winner = int(np.argmax(chances))
        lr = lrs[winner]
        results["grid"] = {
            "lr": lr,
            "chosen_on": "held-out training images",
            "held_out_images": len(held[1]),
            "held_out_top1": chances[winner],
            **final("grid", grid, winner),
            "held_out_top1_by_lr": [list(pair) for pair in zip(lrs, chances, strict=True)],
        }
        weight, bias = grid.folded(winner)
    return {
        "results": results,
        "figures": [one.to_card() for one in figures],
        "classifier": {"weight": weight, "bias": bias, "lr": lr},
    }


def results_table(results: Record, lrs: Sequence[float]) -> str:
    """The figures for the screen, with what a reader has to know about them."""
    paper, grid = results["paper"], results.get("grid")
    last, best = paper["last_epoch"], paper["best_epoch"]
    rate = f"{paper['lr']:g}"
    rows = [
        ["paper's learning rate, last epoch", rate, "-", percent(last["top1"], last["top1_interval"]),
         percent(last["top5"])],
        [f"paper's learning rate, best epoch ({best['epoch']}) *", rate, "-", percent(best["top1"]),
         percent(best["top5"])],
    ]  # fmt: skip
    if grid:
        held_out, top1 = percent(grid["held_out_top1"]), percent(grid["top1"], grid["top1_interval"])
        rows.append(["grid, last epoch", f"{grid['lr']:g}", held_out, top1, percent(grid["top5"])])
    text = table(["classifier", "lr (of 256)", "held-out top-1 %", "top-1 % [95% interval]", "top-5 %"], rows)
    text += "\n* chosen on the validation images, as published figures are: an upper bound, not an estimate"
    if grid and len(lrs) > 1 and grid["lr"] in (min(lrs), max(lrs)):
        text += f"\nnotice: lr {grid['lr']:g} is the end of the grid: --lrs with values beyond it may do better"
    return text
