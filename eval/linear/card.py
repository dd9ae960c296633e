"""The result file of a linear probe (``--json``): what was trained and how, what it found, on what."""

from __future__ import annotations

from collections.abc import Sequence

from eval.config import PAPER_CROP_SCALE, PAPER_EPOCHS
from eval.linear.identity import identity_of_logreg
from eval.linear.probe_file import Settings
from eval.linear.report import GRID, LOGREG, SGD, Record
from eval.linear.setup import Probe
from eval.results import data_card, images_card, result_card


def probe_card(
    probe: Probe, results: Record, figures: Sequence[dict[str, object]], history: Sequence[Record], seconds: float
) -> dict[str, object]:
    """All of the file.

    Args:
        results: by classifier.
        figures: each as :meth:`eval.results.Figure.to_card` gives it.
        history: a record an epoch of the paper's classifier.
        seconds: what the classifiers that are reported took, over all runs that made them.
    """
    data = {
        name: data_card(part, probe.identity[name]) | images_card(part)
        for name, part in (("train", probe.train), ("val", probe.val))
    }
    loaded, protocol = probe.loaded, protocol_of(probe)
    card = result_card(
        "linear", protocol, results, loaded, data, loaded.transform, probe.device, seconds, list(figures)
    )
    return card | {"history": list(history)}


def protocol_of(probe: Probe) -> Settings:
    """Name and settings of the classifiers that were trained, and of no others."""
    config, identity = probe.config, probe.identity
    of_logreg = identity_of_logreg(config, identity)
    regression = {name: of_logreg[name] for name in ("cs", "iterations", "gap")}
    of_sgd = ("epochs", "batch", "lr", "lrs", "crop_scale", "cached") if config.sgd else ()
    chosen = {name: identity[name] for name in (*of_sgd, "holdout", "seed", "features") if name in identity}
    if not config.sgd:
        return {"name": LOGREG, **chosen, **regression}
    published = {"epochs": PAPER_EPOCHS, "crop_scale": list(PAPER_CROP_SCALE)}
    protocol = {"name": SGD + (GRID if probe.lrs else ""), "published": published, **chosen}
    return protocol | ({"logreg": {"name": LOGREG, **regression}} if config.logreg else {})
