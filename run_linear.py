"""Measure a frozen backbone by linear classifiers: DINO's published protocol, and a grid of learning rates beside it.

    python run_linear.py --weights runs/sample-xcit_pico_4_p4/checkpoint.pth
    torchrun --nproc-per-node 8 run_linear.py --weights ckpt.pth --data-path /data/imagenet
    python run_linear.py --weights ckpt.pth --features cls cls+mean last4 --cached --logreg

All classifiers learn from the same forward pass. The one with the paper's learning rate learns from every training
image. Those of the grid get standardised features and leave out a held-out part of the training images, on which the
best of them is chosen, so that the validation images choose nothing. So is the logistic regression's C.

Read top to bottom: what is measured, classifiers by SGD, logistic regressions, ImageNet's variants, report. The loop of
the SGD is in eval/linear/sgd.py, that of the regressions in eval/linear/logistic_search.py.
"""

from __future__ import annotations

# Import before torch: it sets how OpenMP threads wait.
import dino_xcit  # noqa: F401  # isort: skip

import sys
from pathlib import Path

from dino_xcit.cli import parse
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from eval.config import LinearConfig
from eval.linear.card import probe_card
from eval.linear.fixed_features import FixedFeatures
from eval.linear.identity import identity_of_logreg
from eval.linear.imagenet_variants import measure
from eval.linear.logistic_search import logistic_results, search
from eval.linear.probe_file import FILE_NAME, LOGREG_NAME
from eval.linear.report import Classifier, Record, recommended, results_table, variants_table
from eval.linear.setup import Probe, open_probe, say_what_is_measured, stored_probe
from eval.linear.sgd import train_heads
from eval.results import data_card, figure, write_json


def main() -> None:
    """The whole measurement."""
    # ---- what is measured: settings, backbone, images; and what there is of it from an earlier run
    probe = open_probe(parse(LinearConfig, sys.argv[1:], "run_linear.py"))
    say_what_is_measured(probe)
    config, fixed = probe.config, FixedFeatures(probe)
    of_logreg = identity_of_logreg(config, probe.identity)
    stored = stored_probe(probe, probe.identity, FILE_NAME) if config.sgd else None
    stored_logreg = stored_probe(probe, of_logreg, LOGREG_NAME) if config.logreg else None
    results: Record = {}
    figures: list[dict[str, object]] = []
    if config.logreg:
        fixed.rows(probe.train)  # first, for the held-out images are among them

    # ---- the paper's classifier and the grid, by SGD on augmented images
    heads: Record = stored or {}
    if heads.get("results"):
        log.info(f"already complete: {probe.folder / FILE_NAME} holds this probe (--resume never repeats it)")
    elif config.sgd:
        heads = train_heads(probe, stored, fixed.held_out(), fixed.labelled(probe.val))
    results |= heads.get("results", {})
    figures += heads.get("figures", [])

    # ---- logistic regressions, by L-BFGS on fixed features
    logreg: Record = {}
    if config.logreg:
        logreg = search(fixed.labelled(probe.train), probe, of_logreg, stored_logreg)
        results["logreg"], hits = logistic_results(logreg, fixed.labelled(probe.val), probe.device)
        figures.append(figure("logreg, top-1", {"classifier": "logreg"}, hits).to_card())

    # ---- the recommended one on ImageNet's variants: all processes share their features
    for variant in probe.variants:
        fixed.rows(variant.source or probe.val)
    if not distributed.is_main():
        return
    best = recommended(results, heads, logreg)
    also = _on_variants(probe, fixed, best)

    # ---- report
    log.info(results_table(results, config.lrs, config.logreg_cs))
    if also:
        log.info(variants_table(also, best))
        results["also"] = {"classifier": best.name, "features": best.features, **also}
    if config.json:
        seconds = sum(float(part.get("seconds", 0.0)) for part in (heads, logreg))
        card = probe_card(probe, results, figures, heads.get("history", []), seconds)
        write_json(Path(config.json).expanduser(), card)
        log.info(f"written: {config.json}")
    file = LOGREG_NAME if best.name == "logreg" else FILE_NAME
    log.info(f"classifier: {probe.folder / file} ({best.name})")


def _on_variants(probe: Probe, fixed: FixedFeatures, classifier: Classifier) -> Record:
    """Figures of a classifier on each of ImageNet's variants, by name."""
    found: Record = {}
    for variant in probe.variants:
        source = variant.source or probe.val
        features = fixed.rows(source)
        rows = probe.pooled.seen_by(classifier.features, features.features)
        data = {"labels": variant.fingerprint} | data_card(source, features.fingerprint)
        figures = measure(variant, rows, classifier.weight, classifier.bias, probe.device)
        found[variant.name] = figures | {"data": data}
    return found


def command() -> None:
    """The console entry."""
    distributed.run_command(main)


if __name__ == "__main__":
    command()
