"""What a linear probe found, as plain values and as tables. D features, C classes, n images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from eval.linear.heads import LinearHeads
from eval.linear.pooled import Labelled
from eval.results import Figure, figure
from eval.stats import wilson_interval
from eval.table import percent, table

Record = dict[str, Any]

SGD = (
    "linear probe on the frozen class token, SGD with momentum 0.9, no weight decay, cosine by epoch, "
    "RandomResizedCrop (bilinear) and flip (DINO, arXiv 2104.14294)"
)
GRID = "; beside it a grid of learning rates on standardised features, chosen on held-out training images"
LOGREG = "multinomial logistic regression with an L2 penalty, by L-BFGS on features of unaugmented images"


@dataclass(frozen=True)
class Classifier:
    """A classifier of features as the backbone gives them."""

    name: str
    """``paper``, ``grid`` or ``logreg``."""
    features: str
    """What it sees, such as ``cls``."""
    weight: Tensor
    """[C, D]."""
    bias: Tensor
    """[C]."""


def percentages(hits: NDArray[np.bool_]) -> list[tuple[float, float]]:
    """[heads, 2, n] (:meth:`LinearHeads.hits`) to (top-1, top-5) a head; NaN for no image at all."""
    if not hits.shape[2]:
        return [(float("nan"), float("nan"))] * len(hits)
    return [(100.0 * float(one.mean()), 100.0 * float(five.mean())) for one, five in hits]


def final_results(
    lr: float,
    paper: LinearHeads,
    lrs: Sequence[float],
    grids: Mapping[str, LinearHeads],
    history: Sequence[Record],
    held: Labelled,
    val: Labelled,
    best_hits: NDArray[np.bool_] | None = None,
) -> Record:
    """The figures at the end, and the classifier that they recommend.

    Args:
        lr, paper: the paper's learning rate and its classifier.
        lrs, grids: those of the grid, ascending, and for each choice of features their classifiers; none: no grid.
        history: a record an epoch of the paper's classifier: ``epoch``, ``loss``, ``top1``, ``top5``.
        held: the training images on which the grid is chosen.
        val: the validation images; of the grid, only the chosen classifier ever sees them.
        best_hits: [n], whether the paper's classifier was right in the best epoch; None where a part of the epochs was
            trained before these were kept.

    Returns:
        ``results`` and ``figures`` (:meth:`Figure.to_card`) for the card, and ``classifier`` with weight [C, D] and
        bias [C] for features as the backbone gives them: the grid's choice if there is a grid.
    """

    figures: list[Figure] = []

    def final(name: str, features: str, heads: LinearHeads, head: int) -> Record:
        hits = heads.hits(val.rows[features], val.labels, [head])
        figures.append(figure(f"{name}, last epoch, top-1", {"classifier": name, "epoch": "last"}, hits[0, 0]))
        top1, top5 = percentages(hits)[0]
        meant = history[-1]["top5"] is not None
        return {"top1": top1, "top1_interval": list(wilson_interval(hits[0, 0])), "top5": top5 if meant else None}

    best = max(history, key=lambda record: float(record["top1"]))
    results: Record = {
        "paper": {
            "lr": lr,
            "last_epoch": final("paper", "cls", paper, 0),
            "best_epoch": {**best, "chosen_on": "validation images, as published figures are"},
        }
    }
    settings = {"classifier": "paper", "epoch": "best"}
    figures.append(Figure("paper, best epoch, top-1", settings, float(best["top1"]), best_hits))
    features = "cls"
    weight, bias = paper.folded(0)
    if grids:
        chances = {
            name: [top1 for top1, _ in percentages(heads.hits(held.rows[name], held.labels, range(len(lrs))))]
            for name, heads in grids.items()
        }
        features = max(chances, key=lambda name: max(chances[name]))
        winner = int(np.argmax(chances[features]))
        lr = lrs[winner]
        results["grid"] = {
            "lr": lr,
            "features": features,
            "chosen_on": "held-out training images",
            "held_out_images": len(held.labels),
            "held_out_top1": chances[features][winner],
            **final("grid", features, grids[features], winner),
            "held_out_top1_by_lr": [list(pair) for pair in zip(lrs, chances[features], strict=True)],
            "held_out_top1_by_features": {name: max(found) for name, found in chances.items()},
        }
        weight, bias = grids[features].folded(winner)
    return {
        "results": results,
        "figures": [one.to_card() for one in figures],
        "classifier": {"weight": weight, "bias": bias, "lr": lr, "features": features},
    }


def recommended(results: Record, probe: Record, logreg: Record | None) -> Classifier:
    """Of the classifiers that are there, the one that did best on held-out training images; the paper's where nothing
    was held out.

    Args:
        results: of all of them: ``paper``, ``grid``, ``logreg``.
        probe: what linear.pth holds; empty where there was no SGD.
        logreg: what logreg.pth holds.
    """
    chances: dict[str, float] = {
        name: float(results[name]["held_out_top1"])
        for name in ("grid", "logreg")
        if name in results and results[name]["held_out_top1"] is not None
    }
    name = max(chances, key=lambda one: chances[one]) if chances else "paper" if "paper" in results else "logreg"
    if logreg and name == "logreg":
        return Classifier(name, logreg["chosen"]["features"], logreg["weight"], logreg["bias"])
    kept = probe["classifier"]
    return Classifier(name, kept.get("features", "cls"), kept["weight"], kept["bias"])


def results_table(results: Record, lrs: Sequence[float], cs: Sequence[float] = ()) -> str:
    """The figures for the screen, with what a reader has to know about them."""
    paper, grid, logreg = (results.get(name) for name in ("paper", "grid", "logreg"))
    rows, notes = [], []
    if paper:
        last, best = paper["last_epoch"], paper["best_epoch"]
        rate = f"lr {paper['lr']:g}"
        rows += [
            ["paper's learning rate, last epoch", rate, "-", percent(last["top1"], last["top1_interval"]),
             percent(last["top5"])],
            [f"paper's learning rate, best epoch ({best['epoch']}) *", rate, "-", percent(best["top1"]),
             percent(best["top5"])],
        ]  # fmt: skip
        notes.append("* chosen on the validation images, as published figures are: an upper bound, not an estimate")
    for name, found, setting in (("grid, last epoch", grid, "lr"), ("logistic regression", logreg, "c")):
        if found:
            seen = found.get("features", "cls")
            label = name if seen == "cls" else f"{name}, {seen}"
            value = f"{'C' if setting == 'c' else 'lr'} {found[setting]:g}"
            top1 = percent(found["top1"], found["top1_interval"])
            rows.append([label, value, percent(found["held_out_top1"]), top1, percent(found["top5"])])
    for found, key, values, flag in ((grid, "lr", lrs, "lrs"), (logreg, "c", cs, "logreg-cs")):
        if found and len(values) > 1 and found[key] in (min(values), max(values)):
            word = "C" if key == "c" else key
            notes.append(
                f"warning: {word} {found[key]:g} is the end of the grid: --{flag} with values beyond it may do better"
            )
    if logreg and not logreg["converged"]:
        notes.append(
            f"warning: the logistic regression has not converged after {logreg['iterations']} iterations (largest "
            f"derivative {logreg['gradient']:.1g}; the objective may be {100 * logreg['gap']:.2g}% too large): raise "
            "--logreg-iterations, or keep to smaller --logreg-cs"
        )
    if logreg and logreg["not_converged"]:
        count = len(logreg["not_converged"])
        notes.append(f"warning: {count} of the regressions tried on held-out images had not converged (see --json)")
    if paper or grid:
        notes.insert(0, "lr: for a batch of 256")
    header = ["classifier", "setting", "held-out top-1 %", "top-1 % [95% interval]", "top-5 %"]
    return "\n".join([table(header, rows), *notes])


def variants_table(variants: Record, classifier: Classifier) -> str:
    """What the recommended classifier does on other images; ``variants`` by name, as
    :func:`eval.linear.imagenet_variants.measure` gives them."""
    rows = [
        [
            name,
            f"{found['images']:,}",
            f"{found['classes']:,}",
            percent(found["top1"], found["top1_interval"]),
            percent(found["top5"], found["top5_interval"]),
        ]
        for name, found in variants.items()
    ]
    header = [f"variant ({classifier.name})", "images", "classes", "top-1 % [95% interval]", "top-5 % [95% interval]"]
    return table(header, rows)
