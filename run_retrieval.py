"""Measure a frozen backbone by what its vectors find.

    python run_retrieval.py oxford --weights ckpt.pth --data-path /data/roxford5k
    python run_retrieval.py paris --weights ckpt.pth --data-path /data/rparis6k --image-size 512 --scales 1 0.7071 0.5
    python run_retrieval.py oxford --weights ckpt.pth --data-path /data/roxford5k --distractors /data/revisitop1m/jpg
    python run_retrieval.py copydays --weights ckpt.pth --data-path /data/copydays --distractors /data/photos
    python run_retrieval.py folder --weights ckpt.pth --data-path /data/birds/test
    python run_retrieval.py duplicates --weights ckpt.pth --first /data/train --second /data/test --csv pairs.csv

Each protocol is told from top to bottom: images, vectors, figures, report. docs/retrieval.md says what is scored.
"""

from __future__ import annotations

# Import before torch: it sets how OpenMP threads wait.
import dino_xcit  # noqa: F401  # isort: skip

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dino_xcit.cli import parse
from dino_xcit.data import Source, open_source
from dino_xcit.errors import InputError
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import counted
from eval.collection.made_with import open_backbone_of, with_weights_of
from eval.collection.store import open_collection
from eval.results import FORMAT, Card, Figure, images_card, now, query_figure, result_card, versions, write_json
from eval.retrieval.average_precision import mean_interval, percent_of
from eval.retrieval.copydays import DEPTH, ORIGINAL, STRONG, average_precisions, open_blocks
from eval.retrieval.instance_recall import leave_one_out
from eval.retrieval.landmarks import (
    DATASETS,
    KS,
    SETUPS,
    find_ground_truth,
    open_images,
    read_ground_truth,
    refuse_known,
    score,
)
from eval.retrieval.near_duplicates import IDENTICAL, NEAR, UNKNOWN, draw_pairs, find_pairs, identical, write_pairs
from eval.retrieval.similarity import rows_of_similarity
from eval.retrieval.vector_set import (
    VectorSet,
    check_comparable,
    collected,
    collection_at,
    extracted,
    extracted_like,
    open_fitted,
)
from eval.retrieval_config import RetrievalConfig
from eval.setup import demand_writable
from eval.table import percent, table

INTERVAL = "95% percentile bootstrap over the queries"


def main() -> None:
    """Measure what the first word says."""
    config = parse(RetrievalConfig, sys.argv[1:], "run_retrieval.py")
    # Where there is nothing to extract, too, several processes have to know that one of them reports.
    distributed.start(distributed.choose_device(config.device))
    demand_writable(config.written())
    protocols: dict[str, Callable[[RetrievalConfig], None]] = {
        "oxford": landmarks,
        "paris": landmarks,
        "copydays": copydays,
        "folder": folder,
        "duplicates": duplicates,
    }
    protocols[config.protocol](config)


def landmarks(config: RetrievalConfig) -> None:
    """Revisited Oxford or Paris."""
    # ---- what is right, and the images
    started = time.perf_counter()
    place, dataset = Path(config.data_path).expanduser(), DATASETS[config.protocol]
    given = Path(config.ground_truth).expanduser() if config.ground_truth else find_ground_truth(place, dataset)
    truth = read_ground_truth(given)
    sources = dict(zip(("database", "queries"), open_images(truth, place, config.queries == "box"), strict=True))
    if config.distractors:
        sources["distractors"] = open_source(config.distractors)
        refuse_known(truth, sources["distractors"])

    # ---- vectors
    loaded, device, transform = open_fitted(config, "whole")
    sets = {name: extracted(config, loaded, device, source, transform) for name, source in sources.items()}
    if not distributed.is_main():
        return

    # ---- figures
    searched = [sets[name].vectors for name in ("database", "distractors") if name in sets]
    scores = score(truth, rows_of_similarity(sets["queries"].vectors, *searched))
    results: list[Card] = []
    kept: list[Figure] = []
    for setup in SETUPS:
        aps = percent_of(scores[setup].ap)
        row: Card = {"setup": setup, "queries": len(aps), "database": sum(map(len, searched))}
        row |= {"map": _mean(aps), "map_interval": mean_interval(aps)}
        row |= {f"mp@{k}": _mean(percent_of(scores[setup].precision[k])) for k in KS}
        row["ap"] = {
            query.name: None if np.isnan(ap) else 100.0 * ap
            for query, ap in zip(truth.queries, scores[setup].ap, strict=True)
        }
        results.append(row)
        asked_here = np.flatnonzero(~np.isnan(scores[setup].ap))
        kept.append(query_figure(f"{setup} mAP", {"setup": setup}, aps, asked_here))

    # ---- report
    figures = {"map": "mAP % [95% interval]"} | {f"mp@{k}": f"mP@{k} %" for k in KS}
    _say_table(results, {"setup": "setup", "queries": "queries", "database": "database"}, figures)
    protocol: Card = {
        "name": f"Revisited {config.protocol.title()} (arXiv 1803.11285), mAP and mP@k as revisitop scores them",
        "ground_truth": {"file": truth.path.name, "sha256": truth.sha256},
        "queries": "cut to their box" if config.queries == "box" else "whole pictures",
        "distractors": len(sources["distractors"]) if config.distractors else 0,
        "interval": INTERVAL,
    }
    _write(config, protocol, results, sets, started, kept)


def copydays(config: RetrievalConfig) -> None:
    """Copies that find their original, as DINO's script has it; and originals that find their strong copies."""
    # ---- images
    started = time.perf_counter()
    blocks = open_blocks(Path(config.data_path).expanduser())
    distractors = open_source(config.distractors) if config.distractors else None

    # ---- vectors
    loaded, device, transform = open_fitted(config, "square")
    sets = {
        name: extracted(config, loaded, device, source, transform)
        for name, source in (
            *((name, block.source) for name, block in blocks.items()),
            *((("distractors", distractors),) if distractors else ()),
        )
    }
    if not distributed.is_main():
        return

    # ---- figures
    others = [sets["distractors"].vectors] if distractors else []
    nobody = np.full(sum(map(len, others)), -1, dtype=np.int64)
    results: list[Card] = []
    kept: list[Figure] = []
    for database, asking in ((ORIGINAL, [name for name in blocks if name != ORIGINAL]), (STRONG, [ORIGINAL])):
        vectors = np.concatenate([sets[database].vectors, *others])
        scenes = np.concatenate([blocks[database].scenes, nobody])
        depth = min(DEPTH, len(scenes)) if database == ORIGINAL else len(scenes)
        for name in asking:
            answered = np.isin(blocks[name].scenes, scenes)  # an original without a strong copy is no query
            queries = sets[name].vectors[answered], blocks[name].scenes[answered]
            aps = 100.0 * average_precisions(*queries, vectors, scenes, depth)
            row: Card = {
                "search": f"{name} -> {database}",
                "queries": len(aps),
                "database": len(scenes),
                "depth": depth,
            }
            results.append(row | {"map": _mean(aps), "map_interval": mean_interval(aps)})
            search = f"{name} -> {database}"
            kept.append(query_figure(f"{search} mAP", {"search": search}, aps, np.flatnonzero(answered)))

    # ---- report
    left = {"search": "search", "queries": "queries", "database": "database", "depth": "looked at"}
    _say_table(results, left, {"map": "mAP % [95% interval]"})
    protocol: Card = {
        "name": "Copydays, mAP by trapezoids",
        "X -> original": f"X searches originals and distractors; the first {DEPTH} count, as in DINO's script",
        "original -> strong": "originals search strong copies and distractors; all of the ranking counts",
        "interval": INTERVAL,
    }
    _write(config, protocol, results, sets, started, kept)


def folder(config: RetrievalConfig) -> None:
    """Leave-one-out among labelled images."""
    # ---- images and vectors
    started = time.perf_counter()
    images: VectorSet
    if config.index:
        images = collected(open_collection(Path(config.index).expanduser()))
        if images.source is None:
            raise InputError(
                f"the images of {config.index} are not where they were ({images.data.get('url')}), and their classes "
                "are known from there: give --data-path and --weights instead of --index"
            )
    else:
        loaded, device, transform = open_fitted(config, "centre")
        place = config.data_path or loaded.data
        if not place:
            raise InputError("no data_path given: folder needs --data-path DIR, the folder of its images")
        source = open_source(place, "val")
        _labels(source)
        images = extracted(config, loaded, device, source, transform)
    if not distributed.is_main():
        return
    assert images.source is not None
    if too_large := sorted({k for k in config.ks if k > len(images.names) - 1}):
        log.warning(
            f"k = {', '.join(map(str, too_large))} exceeds the {len(images.names) - 1:,} other images: using "
            "all of them"
        )
    found = leave_one_out(images.vectors, _labels(images.source), config.ks, progress=True)

    # ---- figures
    figures = {f"recall@{k}": 100.0 * found.hits[k] for k in config.ks}
    figures |= {"r_precision": 100.0 * found.r_precision, "map@r": 100.0 * found.map_at_r}
    by_query: dict[str, NDArray[np.bool_] | NDArray[np.floating]] = {f"recall@{k}": found.hits[k] for k in config.ks}
    by_query |= {"R-precision": figures["r_precision"], "mAP@R": figures["map@r"]}
    kept = [query_figure(name, {"figure": name}, values, found.queries) for name, values in by_query.items()]
    row: Card = {"queries": len(found.queries), "left_out": found.alone}
    for name, values in figures.items():
        row |= {name: _mean(values), f"{name}_interval": mean_interval(values.astype(np.float64))}

    # ---- report
    if found.alone:
        log.info(f"{counted(found.alone, 'image')} alone in a class: no query, but among what is searched")
    log.info(f"{counted(len(found.queries), 'query')}, each among the {len(images.names) - 1:,} other images")
    names = {"r_precision": "R-precision", "map@r": "mAP@R"} | {f"recall@{k}": f"recall@{k}" for k in config.ks}
    rows = [[names[name], percent(row[name], row[f"{name}_interval"])] for name in figures]  # type: ignore[arg-type]
    log.info(table(["figure", "% [95% interval]"], rows))
    protocol: Card = {
        "name": "leave-one-out by cosine, exact; recall@k, R-precision, mAP@R (arXiv 2003.08505), means over queries",
        "ks": list(config.ks),
        "interval": INTERVAL,
    }
    _write(config, protocol, [row], {"images": images}, started, kept)


def duplicates(config: RetrievalConfig) -> None:
    """What two sets share, or what one has twice."""
    # ---- images and vectors
    started = time.perf_counter()
    given = [config.first, *([config.second] if config.second else [])]
    collections = [collection_at(path) for path in given]
    made = next((collection for collection in collections if collection is not None), None)
    if made is None:
        sources = [open_source(path) for path in given]
        loaded, device, transform = open_fitted(config, "centre")
        sets = [extracted(config, loaded, device, source, transform) for source in sources]
    elif all(collections):
        config.check_for_collections()
        sets = [collected(collection) for collection in collections if collection is not None]
    else:  # the images' vectors are made as the collection's were
        config.check_for_collections(weights_given=True)
        source = open_source(given[collections.index(None)])
        config = with_weights_of(made, config)
        loaded, device = open_backbone_of(made, config)
        log.info(f"vectors: as the card of {made.folder} says, {made.descriptor.describe()}")
        sets = [
            extracted_like(made, config, loaded, device, source) if collection is None else collected(collection)
            for collection in collections
        ]
    if not distributed.is_main():
        return
    first, second = sets[0], sets[-1]
    check_comparable(first, second)

    # ---- pairs
    others = second.vectors if config.second else None
    pairs = find_pairs(first.vectors, others, config.threshold, config.most_pairs, progress=True)
    if first.source is None or second.source is None:
        log.warning("the images are not where they were, so that identical files cannot be told from near ones")
        kinds = [UNKNOWN] * len(pairs)
    else:
        kinds = [IDENTICAL if same else NEAR for same in identical(pairs, first.source, second.source, progress=True)]
    row: Card = {"pairs": len(pairs), "identical": None if UNKNOWN in kinds else kinds.count(IDENTICAL)}
    if config.second:
        paired = {"first": (first, pairs.first), "second": (second, pairs.second)}
    else:
        paired = {"first": (first, np.concatenate([pairs.first, pairs.second]))}

    # ---- report
    near = f"{counted(len(pairs), 'pair')} of at least {config.threshold:g}"
    log.info(near if UNKNOWN in kinds else f"{near}, {kinds.count(IDENTICAL):,} of them identical files")
    for name, (images, rows) in paired.items():
        count, total = len(np.unique(rows)), len(images.names)
        log.info(f"{name} set: {count:,} of {total:,} images ({100 * count / total:.2f} %) are in a pair")
        row |= {f"{name}_images": total, f"{name}_with_a_pair": count}
    if config.csv:
        write_pairs(Path(config.csv).expanduser(), pairs, kinds, first.names, second.names)
        log.info(f"pairs: {config.csv}")
    if config.sheet and len(pairs):
        draw_pairs(pairs, kinds, first.tile, second.tile, Path(config.sheet).expanduser())
        log.info(f"contact sheet: {config.sheet}")
    elif config.sheet:
        old = ", and the file of that name is an older one" if Path(config.sheet).expanduser().exists() else ""
        log.warning(f"there is no pair to draw: {config.sheet} is not written{old}")
    protocol: Card = {
        "name": "all pairs of cosine similarity of at least the threshold, exact; identical: the same bytes",
        "threshold": config.threshold,
        "within_one_set": not config.second,
    }
    _write(config, protocol, [row], {name: images for name, (images, _) in paired.items()}, started)


# ---- what they share


def _labels(source: Source) -> NDArray[np.int64]:
    if source.labels is None:
        raise InputError(f"{source.url} has no labels, which this needs: expected one sub-folder a class")
    return source.labels


def _mean(values: NDArray[np.floating]) -> float | None:
    return float(values.mean()) if len(values) else None


def _say_table(results: Sequence[Card], left: Mapping[str, str], figures: Mapping[str, str]) -> None:
    """Columns of words and counts, then of percentages, each by its key in the results and its title."""
    rows = [
        [str(row[key]) for key in left] + [percent(row[key], row.get(f"{key}_interval")) for key in figures]  # type: ignore[arg-type]
        for row in results
    ]
    log.info(table([*left.values(), *figures.values()], rows))


def _write(
    config: RetrievalConfig,
    protocol: Card,
    results: Sequence[Card],
    sets: Mapping[str, VectorSet],
    started: float,
    kept: Sequence[Figure] = (),
) -> None:
    """The figures with everything that is needed to repeat them, and to compare them query by query."""
    if config.json:
        seconds, measure = time.perf_counter() - started, f"retrieval {config.protocol}"
        first, figures = next(iter(sets.values())), [one.to_card() for one in kept if one.units]
        data = {
            name: images.data | (images_card(images.source) if figures and images.source is not None else {})
            for name, images in sets.items()
        }
        made = {name: first.card.get(name) for name in ("descriptor", "whitening")}
        computed = next((images.computed_by for images in sets.values() if images.computed_by), None)
        if computed:
            loaded, transform, device = computed
            card = result_card(measure, protocol | made, results, loaded, data, transform, device, seconds, figures)
        else:  # vectors that were there already: the collection's own card says what they are
            card = {"format": FORMAT, "measure": measure, "protocol": protocol | made, "results": results, "data": data}
            card |= {"weights": first.card["weights"], "figures": figures}
            card["transform"] = first.card["transform"] | {"antialias": True}  # as Pillow's resize always is
            card |= {"seconds": round(seconds, 2), "date": now(), "versions": versions()}
        write_json(Path(config.json).expanduser(), card)
        log.info(f"written: {config.json}")


def command() -> None:
    """The console entry."""
    distributed.run_command(main)


if __name__ == "__main__":
    command()
