"""Evaluate a frozen backbone on image retrieval.

    python run_retrieval.py paris --weights ckpt.pth --data-path /data/rparis6k --image-size 512 --scales 1 0.7071 0.5
    python run_retrieval.py oxford --weights ckpt.pth --data-path /data/roxford5k --distractors /data/revisitop1m/jpg
    python run_retrieval.py copydays --weights ckpt.pth --data-path /data/copydays --distractors /data/photos
    python run_retrieval.py folder --weights ckpt.pth --data-path /data/birds/test
    python run_retrieval.py duplicates --weights ckpt.pth --first /data/train --second /data/test --csv pairs.csv

docs/retrieval.md describes the protocols.
"""

from __future__ import annotations

from dino_xcit.cli import check_flags, parse  # before torch: dino_xcit sets how OpenMP threads wait
from eval.retrieval_config import RetrievalConfig

if __name__ == "__main__":
    check_flags(RetrievalConfig, "run_retrieval.py")

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino_xcit.data import open_source
from dino_xcit.errors import InputError
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import counted
from eval.results import JsonObject, query_metric
from eval.retrieval import benchmarks
from eval.retrieval.benchmarks import Answer, extracted, means, open_fitted
from eval.setup import demand_writable
from eval.table import percent, table


def main() -> None:
    """Run one protocol; rank 0 reports."""
    started = time.perf_counter()
    config = parse(RetrievalConfig, sys.argv[1:], "run_retrieval.py")
    distributed.start(distributed.choose_device(config.device))
    demand_writable(config.written())
    protocols = {"copydays": copydays, "folder": folder, "duplicates": duplicates}
    answer = protocols.get(config.protocol, landmarks)(config)
    if answer is None or not config.json:
        return
    benchmarks.write_result(config, answer, time.perf_counter() - started)
    log.info(f"written: {config.json}")


def landmarks(config: RetrievalConfig) -> Answer | None:
    """Evaluate on Revisited Oxford or Paris."""
    # ---- ground truth and images
    published = Path(config.data_path, f"gnd_{benchmarks.DATASETS[config.protocol]}.pkl")
    truth = benchmarks.read_ground_truth(Path(config.ground_truth or published))
    database, queries = benchmarks.open_landmarks(truth, Path(config.data_path), config.queries == "box")
    sources = {"database": database, "queries": queries}
    if config.distractors:
        sources["distractors"] = open_source(config.distractors)
        benchmarks.refuse_known(truth, sources["distractors"])

    # ---- vectors
    loaded, device = open_fitted(config)
    sets = {name: extracted(config, loaded, device, source) for name, source in sources.items()}
    if not distributed.is_main():
        return None

    # ---- metrics
    searched = [sets[name].vectors for name in ("database", "distractors") if name in sets]
    similarities = benchmarks.rows_of_similarity(sets["queries"].vectors, *searched)
    names, results, metrics = [query.name for query in truth.queries], [], []
    for setup, scores in benchmarks.score_landmarks(truth, similarities).items():
        scored = np.flatnonzero(~np.isnan(scores["map"]))
        row: JsonObject = {"setup": setup, "queries": len(scored), "database": sum(map(len, searched))}
        row |= means({name: values[scored] for name, values in scores.items()})
        aps = [None if np.isnan(ap) else ap for ap in scores["map"].tolist()]
        results.append(row | {"ap": dict(zip(names, aps, strict=True))})
        metrics.append(query_metric(f"{setup} mAP", {"setup": setup}, scores["map"][scored], scored))
    _print(results, ("setup", "queries", "database"), tuple(scores))
    protocol: JsonObject = {
        "name": f"Revisited {config.protocol.title()} (arXiv 1803.11285), mAP and mP@k as revisitop scores them",
        "ground_truth": {"file": truth.path.name, "sha256": truth.sha256},
        "queries": "cut to their box" if config.queries == "box" else "whole pictures",
        "distractors": len(sources["distractors"]) if config.distractors else 0,
    }
    return protocol, results, sets, metrics


def copydays(config: RetrievalConfig) -> Answer | None:
    """Evaluate on Copydays: copies search their original, as in DINO's script, and originals their strong copies."""
    # ---- images and vectors
    blocks = benchmarks.open_copydays(Path(config.data_path))
    sources = {name: source for name, (source, _) in blocks.items()}
    if config.distractors:
        sources["distractors"] = open_source(config.distractors)
    loaded, device = open_fitted(config)
    sets = {name: extracted(config, loaded, device, source) for name, source in sources.items()}
    if not distributed.is_main():
        return None

    # ---- metrics
    results, metrics = [], []
    for search, aps, queries, counts in benchmarks.score_copydays(blocks, sets):
        results.append({"search": search} | counts | means({"map": aps}))
        metrics.append(query_metric(f"{search} mAP", {"search": search}, aps, queries))
    _print(results, ("search", "queries", "database", "depth"), ("map",))
    protocol: JsonObject = {
        "name": "Copydays, mAP by trapezoids",
        "X -> original": "X searches originals and distractors; the first 20 count, as in DINO's script",
        "original -> strong": "originals search strong copies and distractors; all of the ranking counts",
    }
    return protocol, results, sets, metrics


def folder(config: RetrievalConfig) -> Answer | None:
    """Evaluate by leave-one-out search among labelled images."""
    # ---- images and vectors
    loaded, device = open_fitted(config)
    if not (place := config.data_path or loaded.data):
        raise InputError("no data_path given: folder needs --data-path DIR, the folder of the images")
    source = open_source(place, "val")
    if source.labels is None:
        raise InputError(f"{source.url} has no labels: expected one sub-folder per class")
    images = extracted(config, loaded, device, source)
    if not distributed.is_main():
        return None
    if max(config.ks) >= len(source):
        log.warning(f"k = {max(config.ks)} exceeds the {len(source) - 1:,} other images: using all of them")

    # ---- metrics
    found = benchmarks.leave_one_out(images.vectors, source.labels, config.ks, progress=True)
    values: dict[str, NDArray[Any]] = {f"recall@{k}": found.hits[k] for k in config.ks}
    values |= {"R-precision": found.r_precision, "mAP@R": found.map_at_r}
    metrics = [query_metric(name, {"metric": name}, one, found.queries) for name, one in values.items()]
    shares = {name: 100.0 * one if one.dtype == np.bool_ else one for name, one in values.items()}
    shares = {name.lower().replace("-", "_"): one for name, one in shares.items()}
    results: list[JsonObject] = [{"queries": len(found.queries), "left_out": found.alone} | means(shares)]
    if found.alone:
        log.info(f"{counted(found.alone, 'image')} alone in a class: in the database, but not used as a query")
    log.info(f"{counted(len(found.queries), 'query')}, each against the {len(source) - 1:,} other images")
    _print(results, (), tuple(shares))
    name = "leave-one-out by cosine, exact; recall@k, R-precision, mAP@R (arXiv 2003.08505), means over queries"
    return {"name": name, "ks": list(config.ks)}, results, {"images": images}, metrics


def duplicates(config: RetrievalConfig) -> Answer | None:
    """Find near duplicates between two sets or within one."""
    # ---- images and vectors
    sources = {name: open_source(url) for name, url in (("first", config.first), ("second", config.second)) if url}
    loaded, device = open_fitted(config)
    sets = {name: extracted(config, loaded, device, source) for name, source in sources.items()}
    if not distributed.is_main():
        return None

    # ---- pairs
    first, second = sets["first"], sets.get("second")
    others = second.vectors if second else None
    pairs = benchmarks.find_pairs(first.vectors, others, config.threshold, config.most_pairs)
    both = first.source, (second or first).source
    same = (kinds := benchmarks.kinds_of(pairs, *both)).count(benchmarks.IDENTICAL)
    log.info(f"{counted(len(pairs), 'pair')} of at least {config.threshold:g}, {same:,} of them identical files")
    row: JsonObject = {"pairs": len(pairs), "identical": same}
    paired = {"first": pairs.first, "second": pairs.second}
    if second is None:
        paired = {"first": np.concatenate([pairs.first, pairs.second])}
    for name, rows in paired.items():
        count, total = len(np.unique(rows)), len(sources[name])
        log.info(f"{name} set: {count:,} of {total:,} images ({100 * count / total:.2f} %) are in a pair")
        row |= {f"{name}_images": total, f"{name}_with_a_pair": count}
    if config.csv:
        benchmarks.write_pairs(Path(config.csv), pairs, kinds, *both)
        log.info(f"pairs: {config.csv}")
    if config.sheet and len(pairs):
        benchmarks.draw_pairs(Path(config.sheet), pairs, kinds, *both, loaded.transform.pixel_format)
        log.info(f"contact sheet: {config.sheet}")
    elif config.sheet:
        log.warning(f"no pairs found: {config.sheet} is not written")
    name = "all pairs of cosine similarity of at least the threshold, exact; identical: the same bytes"
    return {"name": name, "threshold": config.threshold, "within_one_set": not second}, [row], sets, []


def _print(results: Sequence[Any], labels: Sequence[str], metrics: Sequence[str]) -> None:
    """Log a table: columns of labels, then percentages with intervals."""
    rows = []
    for row in results:
        shares = [percent(row[name], row[f"{name}_interval"]) for name in metrics]
        rows.append([*(str(row[name]) for name in labels), *shares])
    log.info(table([*labels, *(f"{name} % [95%]" for name in metrics)], rows))


def command() -> None:
    """Run :func:`main` with the exit codes of docs/reliability.md."""
    distributed.run_command(main)


if __name__ == "__main__":
    command()
