"""Evaluate a frozen backbone with linear classifiers: DINO's published protocol and a grid of learning rates.

    python run_linear.py --weights runs/sample-xcit_micro_4_p16/checkpoint.pth
    torchrun --nproc-per-node 8 run_linear.py --weights ckpt.pth --data-path /data/imagenet
    python run_linear.py --weights ckpt.pth --features cls cls+mean last4 --cached --logreg

All classifiers share one forward pass. The paper's classifier trains on all training images. The grid's classifiers
train on standardised features without the held-out training images, on which the best learning rate is chosen, as is
the C of the logistic regression. Validation images are used for the final accuracy only.

eval/linear/sgd.py has the SGD loop, eval/linear/logistic.py the logistic regression.
"""

from __future__ import annotations

from dino_xcit.cli import check_flags, parse  # before torch: dino_xcit sets how OpenMP threads wait
from eval.config import LinearConfig

if __name__ == "__main__":
    check_flags(LinearConfig, "run_linear.py")

import sys
from pathlib import Path
from typing import Any

import numpy as np

from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import counted
from eval.linear.imagenet_variants import Variant
from eval.linear.logistic import classify, logistic_results, search
from eval.linear.pooled import Rows
from eval.linear.probe import FILE_NAME, LOGREG_NAME, Probe, Record
from eval.linear.sgd import train_heads
from eval.results import data_metadata, images_metadata, metric, result_content, write_json
from eval.stats import top_accuracies
from eval.table import percent, table


def main() -> None:
    """Run the evaluation."""
    # ---- settings, backbone, images, results of an earlier run
    probe = Probe(parse(LinearConfig, sys.argv[1:], "run_linear.py"))
    config = probe.config
    print_plan(probe)
    heads: Record = (probe.stored(FILE_NAME, probe.identity) if config.sgd else None) or {}
    logreg: Record = (probe.stored(LOGREG_NAME, probe.identity_of_logreg()) if config.logreg else None) or {}
    results: Record = {}
    metrics: list[Any] = []

    # ---- the paper's classifier and the grid: SGD on augmented images
    if "results" in heads:
        log.info(f"already complete: {probe.folder / FILE_NAME} holds this probe (--resume never trains it again)")
    elif config.sgd:
        heads = train_heads(probe, heads)
    results |= heads.get("results", {})
    metrics += heads.get("metrics", [])  # rank 0 has them

    # ---- logistic regression: L-BFGS on fixed features
    if config.logreg:
        logreg = search(probe, logreg)
        results["logreg"], hits = logistic_results(probe, logreg)
        metrics.append(metric("logreg, top-1", {"classifier": "logreg"}, hits).to_dict())

    # ---- the recommended classifier on ImageNet's variants
    for variant in probe.variants:
        probe.features(variant.source or probe.val)  # all ranks share the extraction
    if not distributed.is_main():
        return
    best = recommended(results, heads, logreg)
    also = {variant.name: measured(variant, probe, best) for variant in probe.variants}

    # ---- report
    print_results(results, config)
    if also:
        header = [f"variant ({best['name']})", "images", "classes", "top-1 % [95% interval]", "top-5 % [95% interval]"]
        rows = [
            [name, f"{found['images']:,}", f"{found['classes']:,}",
             *(percent(found[top], found[f"{top}_interval"]) for top in ("top1", "top5"))]
            for name, found in also.items()
        ]  # fmt: skip
        log.info(table(header, rows))
        results["also"] = {"classifier": best["name"], "features": best["features"], **also}
    if config.json:
        parts = (("train", probe.train), ("val", probe.val))
        data = {name: data_metadata(part, probe.identity[name]) | images_metadata(part) for name, part in parts}
        seconds = sum(float(part.get("seconds", 0.0)) for part in (heads, logreg))
        content = result_content(
            "linear", probe.protocol(), results, probe.loaded, data, probe.transform, probe.device, seconds, metrics
        )
        write_json(Path(config.json).expanduser(), content | {"history": heads.get("history", [])})
        log.info(f"written: {config.json}")
    log.info(f"classifier: {probe.folder / (LOGREG_NAME if best['name'] == 'logreg' else FILE_NAME)} ({best['name']})")


def recommended(results: Record, heads: Record, logreg: Record) -> Record:
    """Choose the classifier with the best top-1 on held-out training images, or the paper's without held-out images.

    Args:
        results: results of the trained classifiers: ``paper``, ``grid``, ``logreg``.
        heads, logreg: contents of linear.pth and logreg.pth.

    Returns:
        ``name``, ``features`` (its input), ``weight`` [C, D] and ``bias`` [C].
    """
    held_out = {name: found.get("held_out_top1") for name, found in results.items()}
    # max() returns the first of equals: the order is the preference in ties and without held-out images.
    name = max(("grid", "paper", "logreg"), key=lambda one: (one in results, held_out.get(one) or -1.0))
    if name == "logreg":
        return {"name": name, "features": logreg["chosen"]["features"], **logreg}
    return {"name": name, "features": "cls", **heads["classifier"]}


def measured(variant: Variant, probe: Probe, classifier: Record) -> Record:
    """Measure top-1 and top-5 on a variant of ImageNet in percent, with 95% intervals over the images."""
    source = variant.source or probe.val
    features = probe.features(source)
    rows = Rows(features.features, probe.pooled.columns[classifier["features"]], variant.rows)
    among = np.arange(len(classifier["weight"])) if variant.among is None else variant.among
    guesses = among[classify(classifier["weight"][among], classifier["bias"][among], rows, probe.device)]
    found = top_accuracies(guesses, variant.labels, five=len(among) > 5)
    data = {"labels": variant.fingerprint} | data_metadata(source, features.fingerprint)
    return {"images": len(rows), "classes": len(among), **found, "data": data}


def print_plan(probe: Probe) -> None:
    """Log the data, the features and the classifiers."""
    config, sampler = probe.config, probe.sampler
    text = f"{len(probe.train):,} training images of {probe.train.url}, {len(probe.val):,} validation images of "
    text += f"{probe.val.url}; features {', '.join(config.features)}"
    if config.sgd:
        steps = counted(sampler.steps_per_epoch, "step")
        text += f"; {counted(config.epochs, 'epoch')} of {steps} at batch {sampler.global_batch}; the "
        text += f"paper's learning rate and a grid of {len(probe.lrs)}; crop scale {config.crop_scale}"
    log.info(f"{'linear probe' if config.sgd else 'logistic regression'}: {text}")


def print_results(results: Record, config: LinearConfig) -> None:
    """Log the result table and notes on its interpretation."""

    def row(label: str, setting: str, found: Record) -> list[str]:
        top1 = percent(found["top1"], found.get("top1_interval"))
        return [label, setting, percent(found.get("held_out_top1")), top1, percent(found["top5"])]

    rows, notes = [], []
    if paper := results.get("paper"):
        rate, best = f"lr {paper['lr']:g}", paper["best_epoch"]
        rows.append(row("paper's learning rate, last epoch", rate, paper["last_epoch"]))
        rows.append(row(f"paper's learning rate, best epoch ({best['epoch']}) *", rate, best))
        notes.append("* chosen on the validation images, as published figures are: an upper bound, not an estimate")
        notes.append("lr is for a batch of 256")
    for name, key, values in (("grid", "lr", config.lrs), ("logreg", "c", config.logreg_cs)):
        if found := results.get(name):
            setting = f"{key} {found[key]:g}"
            rows.append(row(f"{name}, {found.get('features', 'cls')}", setting, found))
            if len(values) > 1 and found[key] in (min(values), max(values)):
                notes.append(f"warning: {setting} is at the end of the grid: values beyond it may be better")
    if logreg := results.get("logreg"):
        if not logreg["converged"]:
            notes.append(
                f"warning: the logistic regression did not converge in {logreg['iterations']} iterations (largest "
                f"derivative {logreg['gradient']:.1g}; objective at most {100 * logreg['gap']:.2g}% too large): raise "
                "--logreg-iterations, or give smaller --logreg-cs"
            )
        if count := len(logreg["not_converged"]):
            notes.append(f"warning: {count} of the regressions on held-out images did not converge (see --json)")
    header = ["classifier", "setting", "held-out top-1 %", "top-1 % [95% interval]", "top-5 %"]
    log.info("\n".join([table(header, rows), *notes]))


def command() -> None:
    """Run :func:`main` with the exit codes of docs/reliability.md."""
    distributed.run_command(main)


if __name__ == "__main__":
    command()
