"""Measure a frozen backbone by weighted k-NN, DINO's protocol.

    python run_knn.py --weights runs/sample-xcit_pico_4_p4/checkpoint.pth
    torchrun --nproc-per-node 8 run_knn.py --weights ckpt.pth --data-path /data/imagenet
    python run_knn.py --weights ckpt.pth --few-shot 1 2 5 10 --per-class classes.csv --confusion classes.png

Processes share the extraction; the search is the main one's, with all cores of its machine.

Read top to bottom: settings, backbone, data, features, votes, report.
"""

from __future__ import annotations

# Import before torch: it sets how OpenMP threads wait.
import dino_xcit  # noqa: F401  # isort: skip

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np

from dino_xcit.cli import parse
from dino_xcit.data import Source
from dino_xcit.data.workers import usable_cores
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from eval.config import KnnConfig
from eval.features import Features
from eval.knn.approximate import approximate_index, refuse_few
from eval.knn.card import Found, Record, knn_card
from eval.knn.classify import Predictions, clamp_ks, knn_predict
from eval.knn.confusion import per_class, write_per_class
from eval.knn.confusion_figure import draw_confusion
from eval.knn.few_shot import few_shot
from eval.knn.models import features_of_models
from eval.knn.readable import measured
from eval.knn.report import few_shot_table, results_table, short_classes_notices
from eval.results import Card, few_shot_figure, figure, write_json
from eval.setup import labelled_parts, open_backbone
from eval.stats import correct, wilson_interval


def main() -> None:
    """The whole measurement."""
    # ---- settings, backbone, data
    started = time.perf_counter()
    config = parse(KnnConfig, sys.argv[1:], "run_knn.py")
    loaded, device = open_backbone(config)
    train, val = labelled_parts(config, loaded)
    ks = _possible(config.ks, train)
    if config.approximate != "no":
        refuse_few(config.approximate, len(train))
    log.info(
        f"k-NN: {len(train):,} training images of {train.url}, {len(val):,} validation images of {val.url}; "
        "features of length 1, vote weight exp(cosine / T)"
    )

    # ---- features and votes: this backbone, then what it has to beat
    found, data = Found(), dict[str, Card]()
    for model, parts in features_of_models(config, loaded, train, val, device):
        if model == "trained":
            (train, val), data = measured((train, val), parts, config)
            ks = _possible(ks, train)
        if distributed.is_main():  # all processes have every feature, but one search is enough
            predictions = _sweep(model, parts, config, ks, found)
            if model == "trained" and (config.per_class or config.confusion):
                _by_class(predictions, val, config, len(train))
            if config.few_shot:
                _few_shot(model, parts, config, found)
    if not distributed.is_main():
        return

    # ---- report
    log.info(results_table(found.records))
    if found.few_shot:
        for notice in short_classes_notices(train.labels, train.classes, config.few_shot):
            log.warning(notice)
        log.info(few_shot_table(found.few_shot, config.draws))
    if config.json:
        sources, seconds = {"train": train, "val": val}, time.perf_counter() - started
        card = knn_card(found, config, ks, loaded, data, sources, device, seconds)
        write_json(Path(config.json).expanduser(), card)
        log.info(f"written: {config.json}")


def _possible(ks: Sequence[int], train: Source) -> list[int]:
    """Those that the training images allow; says so if they are others."""
    possible, notice = clamp_ks(ks, len(train))
    if notice:
        log.warning(notice)
    return possible


def _sweep(model: str, parts: tuple[Features, Features], config: KnnConfig, ks: list[int], found: Found) -> Predictions:
    """One search; a record, and a figure to compare image by image, for each pair of k and T."""
    if distributed.world_size() > 1:
        # torchrun leaves a process one thread; the others of this machine are waiting, or have ended.
        faiss.omp_set_num_threads(usable_cores())
    train, val = parts
    shown = len(val.features) > 4096
    approximate = None
    if config.approximate != "no":
        approximate = approximate_index(
            train.features, val.features, config.approximate, ks, config.probes, config.seed
        )
        found.approximate[model] = approximate.to_card()
        log.info(approximate.describe(model))
        for notice in approximate.notices(config.probes):
            log.warning(notice)
    index = approximate.index if approximate else None
    predictions = knn_predict(train.features, train.labels, val.features, ks, config.temperatures, shown, index)
    # Of five classes every one is among the first five, and k < 5 neighbours name fewer.
    five = train.labels is not None and len(np.unique(train.labels)) > 5
    for k in ks:
        for temperature in config.temperatures:
            record: Record = {"model": model, "k": k, "temperature": temperature}
            for top, meant in ((1, True), (5, five and k >= 5)):
                hits = correct(predictions[k, temperature], val.labels, top)
                record[f"top{top}"] = 100.0 * float(hits.mean()) if meant else None
                record[f"top{top}_interval"] = wilson_interval(hits) if meant else None
                if top == 1:
                    name, baseline = f"{model} k={k} T={temperature:g} top-1", model != "trained"
                    found.figures.append(figure(name, {"model": model, "k": k, "T": temperature}, hits, baseline))
            if approximate:
                record["recall"] = approximate.recall[k]
            found.records.append(record)
    return predictions


def _by_class(predictions: Predictions, val: Source, config: KnnConfig, neighbours: int) -> None:
    """The table and the picture of the classes."""
    k, temperature = min(config.ks[0], neighbours), config.temperatures[0]
    guesses, title = predictions[k, temperature][:, 0], f"k-NN, k = {k}, T = {temperature:g}"
    assert val.labels is not None  # labelled_parts sees to that
    if config.per_class:
        write_per_class(Path(config.per_class).expanduser(), per_class(guesses, val.labels, val.classes))
        log.info(f"written: {config.per_class}, the classes ({title})")
    if config.confusion:
        draw_confusion(Path(config.confusion).expanduser(), guesses, val.labels, val.classes, title)
        log.info(f"written: {config.confusion}, which classes are taken for which ({title})")


def _few_shot(model: str, parts: tuple[Features, Features], config: KnnConfig, found: Found) -> None:
    """Records and figures with a few images a class."""
    train, val = parts
    records = few_shot(
        train.features, train.labels, val.features, val.labels, config.few_shot, config.draws, config.ks,
        config.temperatures, config.seed, progress=True,
    )  # fmt: skip
    found.few_shot += [{"model": model, **record} for record in records]
    found.figures += [few_shot_figure(model, record, config.draws, config.seed) for record in records]


def command() -> None:
    """The console entry."""
    distributed.run_command(main)


if __name__ == "__main__":
    command()
