"""Evaluate a frozen backbone with weighted k-NN classification (DINO's protocol).

    python run_knn.py --weights runs/sample-xcit_micro_4_p16/checkpoint.pth
    torchrun --nproc-per-node 8 run_knn.py --weights ckpt.pth --data-path /data/imagenet
    python run_knn.py --weights ckpt.pth --few-shot 1 2 5 10 --per-class classes.csv --confusion classes.png

All ranks share the extraction; rank 0 runs the search with all cores of its machine.
"""

from __future__ import annotations

from dino_xcit.cli import check_flags, parse  # before torch: dino_xcit sets how OpenMP threads wait
from eval.config import KnnConfig

if __name__ == "__main__":
    check_flags(KnnConfig, "run_knn.py")

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from dino_xcit.data import Source, Subset, UndecodableImage
from dino_xcit.errors import InputError
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from eval.baselines import baselines
from eval.features import Features, cached, fingerprint_without, unreadable_metadata, unreadable_notice
from eval.knn.classify import Predictions, approximate_index, clamp_ks, knn_predict, refuse_few
from eval.knn.confusion import draw_confusion, write_per_class
from eval.knn.few_shot import few_shot
from eval.pooling import Descriptor
from eval.results import (
    KNN_PROTOCOL,
    Metric,
    Setting,
    data_metadata,
    few_shot_metric,
    images_metadata,
    metric,
    result_content,
    write_json,
)
from eval.setup import cache_folder, labelled_parts, open_backbone
from eval.stats import correct, top_accuracies
from eval.table import percent, table

Record = dict[str, Any]


def main() -> None:
    """Run the evaluation."""
    # ---- settings, backbone, data
    started = time.perf_counter()
    config = parse(KnnConfig, sys.argv[1:], "run_knn.py")
    loaded, device = open_backbone(config, rgb=False)
    train, val = labelled_parts(config, loaded)
    if config.approximate != "no":
        refuse_few(config.approximate, len(train))
    log.info(
        f"k-NN: {len(train):,} training images of {train.url}, {len(val):,} validation images of {val.url}; "
        "unit-length features, vote weight exp(cosine / T)"
    )
    folder = cache_folder(config)
    results: list[Record] = []
    few: list[Record] = []
    indices: dict[str, Record] = {}
    metrics: list[Metric] = []

    descriptor = Descriptor(precision=config.precision)
    models = [("trained", loaded.backbone, loaded.hash)]
    if config.baselines:
        models += baselines(loaded, len(train) + len(val), device)
    for model, backbone, weights_hash in models:
        # ---- features; the first model removes unreadable images from train and val
        how = loaded.transform, device, folder if weights_hash else None, config.batch_size_per_gpu, config.num_workers
        try:
            known, queries = (
                cached(backbone, weights_hash, part, *how, descriptor, config.unreadable) for part in (train, val)
            )
        except UndecodableImage as error:
            raise InputError(f"{error}; or add --unreadable skip to evaluate without such images") from error
        if model == "trained":
            train, train_metadata = readable("training", train, known, config)
            val, val_metadata = readable("validation", val, queries, config)
            ks, notice = clamp_ks(config.ks, len(train))
            if notice:
                log.warning(notice)
        if not distributed.is_main():
            continue

        # ---- votes
        index = None
        if config.approximate != "no":
            index, indices[model] = approximate_index(
                known.features, queries.features, config.approximate, ks, config.probes, config.seed
            )
        predictions = knn_predict(
            known.features, known.labels, queries.features, ks, config.temperatures, len(queries.features) > 4096, index
        )
        recalls = indices[model]["recall_percent"] if index else {}
        records, shown = scored(model, predictions, known, queries, recalls)
        results += records
        metrics += shown
        if model == "trained":
            by_class(predictions, val, config, len(train))
        if config.few_shot:
            for record in few_shot(
                known, queries, config.few_shot, config.draws, config.ks, config.temperatures, config.seed, True
            ):
                few.append({"model": model, **record})
                metrics.append(few_shot_metric(model, record, config.draws, config.seed))
    if not distributed.is_main():
        return

    # ---- report
    print_results(results, few, config.draws)
    if config.json:
        protocol = protocol_of(config, ks, indices)
        data = {"train": train_metadata | images_metadata(train), "val": val_metadata | images_metadata(val)}
        seconds, plain = time.perf_counter() - started, [one.to_dict() for one in metrics]
        content = result_content("knn", protocol, results, loaded, data, loaded.transform, device, seconds, plain)
        if few:
            content["few_shot"] = {"draws": config.draws, "seed": config.seed, "results": few}
        if indices:
            content["approximate"] = indices
        write_json(Path(config.json).expanduser(), content)
        log.info(f"written: {config.json}")


def readable(name: str, source: Source, features: Features, config: KnnConfig) -> tuple[Source, Record]:
    """Return the readable images and their metadata; warn about unreadable ones."""
    unreadable = features.unreadable
    metadata = data_metadata(source, fingerprint_without(features.fingerprint, unreadable))
    if not len(unreadable):
        return source, metadata
    listed = f"; listed in {config.json}" if config.json else ""
    log.warning(unreadable_notice(name, source, unreadable) + listed)
    read = Subset(source, np.delete(np.arange(len(source)), unreadable))
    names = [source.name(int(index)) for index in unreadable]
    return read, metadata | {"images": len(read), "unreadable": unreadable_metadata(names)}


def scored(
    model: str, predictions: Predictions, known: Features, queries: Features, recalls: dict[str, float]
) -> tuple[list[Record], list[Metric]]:
    """Compute accuracies and metrics for each k and T. ``recalls``: recall of an approximate search by k."""
    records, metrics = [], []
    classes = len(np.unique(np.asarray(known.labels)))
    for (k, temperature), guesses in predictions.items():
        # Top-5 is trivial for up to 5 classes and undefined for fewer than 5 neighbours.
        tops = top_accuracies(guesses, queries.labels, classes > 5 and k >= 5)
        recall = {"recall": recalls[str(k)]} if recalls else {}
        settings: dict[str, Setting] = {"model": model, "k": k, "T": temperature}
        name, hits = f"{model} k={k} T={temperature:g} top-1", correct(guesses, queries.labels, 1)
        records.append({"model": model, "k": k, "temperature": temperature, **tops, **recall})
        metrics.append(metric(name, settings, hits, model != "trained"))
    return records, metrics


def protocol_of(config: KnnConfig, ks: list[int], indices: dict[str, Record]) -> Record:
    """Return the protocol for the result file."""
    protocol: Record = {
        "name": KNN_PROTOCOL, "ks": ks, "temperatures": list(config.temperatures),
        "interval": "95% Wilson score interval over the validation images",
    }  # fmt: skip
    if config.precision != "fp32":
        protocol["precision"] = config.precision
    if indices:
        protocol["name"] = KNN_PROTOCOL.replace("exact", "approximate")
        protocol["search"] = {"approximate": config.approximate, "probes": indices["trained"]["probes"]}
    return protocol


def by_class(predictions: Predictions, val: Source, config: KnnConfig, images: int) -> None:
    """Write the per-class table and the confusion matrix for the first of --ks and --temperatures."""
    k, temperature = min(config.ks[0], images), config.temperatures[0]
    guesses, labels = predictions[k, temperature][:, 0], np.asarray(val.labels)
    if config.per_class:
        write_per_class(Path(config.per_class).expanduser(), guesses, labels, val.classes)
    if config.confusion:
        path, title = Path(config.confusion).expanduser(), f"k-NN, k = {k}, T = {temperature:g}"
        draw_confusion(path, guesses, labels, val.classes, title)


def print_results(results: list[Record], few: list[Record], draws: int) -> None:
    """Log the result tables."""
    log.info(results_table(results))
    if few:
        log.info(f"few-shot, mean ± std of {draws} draws:\n{results_table(few)}")
    for shots in sorted({record["shots"] for record in few if record["classes_with_fewer"]}):
        log.warning(f"some classes have fewer than {shots} training images: all of their images are used")


def results_table(records: list[Record]) -> str:
    """Format one row per model, k and T, with interval or std over draws, and recall of an approximate search."""
    shown = {"model": "model", "shots": "images per class", "k": "k", "temperature": "T"}
    rows = []
    for record in records:
        cells = [f"{record[name]:g}" if name != "model" else record[name] for name in shown if name in record]
        for top in ("top1", "top5"):
            deviation = record.get(f"{top}_deviation")
            spread = "" if deviation is None else f" ± {deviation:.1f}"
            cells.append(percent(record[top], record.get(f"{top}_interval")) + spread)
        rows.append([*cells, *([f"{record['recall']:.1f}"] if "recall" in record else [])])
    interval = " [95% interval]" if "top1_interval" in records[0] else ""
    header = [title for name, title in shown.items() if name in records[0]]
    header += [f"top-1 %{interval}", f"top-5 %{interval}", "recall@k %"]
    return table(header[: len(rows[0])], rows)


def command() -> None:
    """Run :func:`main` with the exit codes of docs/reliability.md."""
    distributed.run_command(main)


if __name__ == "__main__":
    command()
