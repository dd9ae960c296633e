"""Measure a frozen backbone by weighted k-NN, DINO's protocol.

    python run_knn.py --weights runs/sample-xcit_pico_4_p4/checkpoint.pth
    torchrun --nproc-per-node 8 run_knn.py --weights ckpt.pth --data-path /data/imagenet
    python run_knn.py --weights ckpt.pth --few-shot 1 2 5 10 --per-class classes.csv --confusion classes.png

Processes share the extraction; the search is the main one's, with all cores of its machine.

Read top to bottom: settings, backbone, data, features, votes, report.
"""

from __future__ import annotations

# Before torch: it decides how threads wait for each other.
import dino_xcit  # noqa: F401  # isort: skip

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dino_xcit import distributed
from dino_xcit.data import Source, Subset, UndecodableImage
from dino_xcit.data.each_image import cores
from dino_xcit.errors import InputError
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import LoadedBackbone, hash_state
from eval.accuracy import bootstrap_interval, correct
from eval.baselines import Pixels, untrained
from eval.config import KnnConfig, settings
from eval.features import Features, cached, extract, fingerprint_without, unreadable_card
from eval.figures import Figure, few_shot_figure, figure
from eval.knn.approximate import approximate_index, refuse_few
from eval.knn.classify import Predictions, clamp_ks, knn_predict
from eval.knn.confusion import per_class, write_per_class
from eval.knn.confusion_figure import draw_confusion
from eval.knn.few_shot import few_shot
from eval.knn.report import few_shot_table, results_table, short_classes_notices, unreadable_notices
from eval.protocol import KNN_PROTOCOL, Card, data_card, images_card, result_card, write_json
from eval.setup import cache_folder, labelled_parts, open_backbone

Record = dict[str, object]

_PIXELS_AT_MOST = 4 << 30
"""Bytes of raw-pixel features that are still worth comparing with."""


@dataclass
class Found:
    """What was measured."""

    records: list[Record] = field(default_factory=list)
    """One for each model, k and T."""
    figures: list[Figure] = field(default_factory=list)
    """The top-1 of each, image by image; of few shots, draw by draw."""
    few_shot: list[Record] = field(default_factory=list)
    """One for each model, number of images a class, k and T."""
    approximate: dict[str, Card] = field(default_factory=dict)
    """For each model what index was searched, and its recall."""


def main() -> None:
    """The whole measurement."""
    # ---- settings, backbone, data
    started = time.perf_counter()
    config = settings(KnnConfig, sys.argv[1:], "run_knn.py")
    loaded, device = open_backbone(config)
    train, val = labelled_parts(config, loaded)
    ks, notice = clamp_ks(config.ks, len(train))
    if notice:
        distributed.say(f"notice: {notice}")
    if config.approximate != "no":
        refuse_few(config.approximate, len(train))
    transform = loaded.transform
    distributed.say(
        f"k-NN: {len(train):,} training images of {train.url}, {len(val):,} validation images of {val.url}; "
        "features of length 1, vote weight exp(cosine / T)"
    )

    # ---- features and votes: this backbone, then what it has to beat
    found, data, lacking = Found(), dict[str, Card](), list[NDArray[np.int64]]()
    for model, parts in _models(config, loaded, train, val, device):
        if model == "trained":
            lacking = [part.unreadable for part in parts]
            (train, val), data = _measured((train, val), parts, config)
            ks, notice = clamp_ks(ks, len(train))
            if notice:
                distributed.say(f"notice: {notice}")
        elif not all(map(np.array_equal, lacking, (part.unreadable for part in parts))):
            raise InputError(f"other images could be read for {model} than before: repeat the command with --no-cache")
        if distributed.is_main():  # all processes have every feature, but one search is enough
            predictions = _sweep(model, parts, config, ks, found)
            if model == "trained" and (config.per_class or config.confusion):
                _by_class(predictions, val, config, len(train))
            if config.few_shot:
                _few_shot(model, parts, config, found)
    if not distributed.is_main():
        return

    # ---- report
    distributed.say(results_table(found.records))
    if found.few_shot:
        for notice in short_classes_notices(train.labels, train.classes, config.few_shot):
            distributed.say(f"notice: {notice}")
        distributed.say(few_shot_table(found.few_shot, config.draws))
    if config.json:
        protocol: Card = {
            "name": KNN_PROTOCOL,
            "ks": ks,
            "temperatures": list(config.temperatures),
            "interval": "95% percentile bootstrap over the validation images; of all or no hits Clopper-Pearson",
        }
        if found.approximate:
            protocol["name"] = KNN_PROTOCOL.replace("exact", "approximate")
            probes = found.approximate["trained"]["probes"]  # as they were used; chosen, where the setting is 0
            protocol["search"] = {"approximate": config.approximate, "probes": probes}
        data = {name: data[name] | images_card(part) for name, part in (("train", train), ("val", val))}
        seconds = time.perf_counter() - started
        cards = [one.to_card() for one in found.figures]
        card = result_card("knn", protocol, found.records, loaded, data, transform, device, seconds, cards)
        if found.few_shot:
            card["few_shot"] = {"draws": config.draws, "seed": config.seed, "results": found.few_shot}
        if found.approximate:
            card["approximate"] = found.approximate
        write_json(Path(config.json).expanduser(), card)
        distributed.say(f"written: {config.json}")


def _models(
    config: KnnConfig, loaded: LoadedBackbone, train: Source, val: Source, device: torch.device
) -> Iterator[tuple[str, tuple[Features, Features]]]:
    """The backbone's features of both parts, by the name ``trained``; and, if asked for, those of the baselines."""
    folder = cache_folder(config)

    def features(backbone: nn.Module, weights_hash: str) -> tuple[Features, Features]:
        batch, workers = config.batch_size_per_gpu, config.num_workers
        try:
            first, second = (
                cached(
                    backbone, weights_hash, part, loaded.transform, device, folder, batch, workers,
                    unreadable=config.unreadable,
                )
                for part in (train, val)
            )  # fmt: skip
        except UndecodableImage as error:
            raise InputError(f"{error}; or add --unreadable skip to measure without such images") from error
        return first, second

    yield "trained", features(loaded.backbone, loaded.hash)
    if config.baselines:
        start = untrained(loaded.arch).to(device)
        yield "untrained", features(start, hash_state(start.state_dict()))
        for name, normalised in (("pixels", False), ("pixels_normalised", True)):
            pixels = _pixels((train, val), loaded.transform, normalised, device, config)
            if pixels:
                yield name, pixels


def _measured(
    sources: tuple[Source, Source], parts: tuple[Features, Features], config: KnnConfig
) -> tuple[tuple[Source, Source], dict[str, Card]]:
    """The images that could be read, and the cards of the data; says how many could not."""
    read, cards = list(sources), dict[str, Card]()
    for place, (name, meant) in enumerate((("train", "training"), ("val", "validation"))):
        source, part = sources[place], parts[place]
        cards[name] = data_card(source, fingerprint_without(part.fingerprint, part.unreadable))
        if len(part.unreadable):
            for notice in unreadable_notices(meant, source, part.unreadable):
                distributed.say(f"notice: {notice}{f'; {config.json} names them' if config.json else ''}")
            read[place] = Subset(source, np.delete(np.arange(len(source)), part.unreadable))
            names = [source.name(int(number)) for number in part.unreadable]
            cards[name] |= {"images": len(read[place]), "unreadable": unreadable_card(names)}
    return (read[0], read[1]), cards


def _sweep(model: str, parts: tuple[Features, Features], config: KnnConfig, ks: list[int], found: Found) -> Predictions:
    """One search; a record, and a figure to compare image by image, for each pair of k and T."""
    if distributed.world_size() > 1:
        # torchrun leaves a process one thread; the others of this machine are waiting, or have ended.
        faiss.omp_set_num_threads(cores())
    train, val = parts
    shown = len(val.features) > 4096
    approximate = None
    if config.approximate != "no":
        approximate = approximate_index(
            train.features, val.features, config.approximate, ks, config.probes, config.seed
        )
        found.approximate[model] = approximate.to_card()
        distributed.say(approximate.describe(model))
        for notice in approximate.notices(config.probes):
            distributed.say(f"notice: {notice}")
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
                record[f"top{top}_interval"] = bootstrap_interval(hits) if meant else None
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
        distributed.say(f"written: {config.per_class}, the classes ({title})")
    if config.confusion:
        draw_confusion(Path(config.confusion).expanduser(), guesses, val.labels, val.classes, title)
        distributed.say(f"written: {config.confusion}, which classes are taken for which ({title})")


def _few_shot(model: str, parts: tuple[Features, Features], config: KnnConfig, found: Found) -> None:
    """Records and figures with a few images a class."""
    train, val = parts
    records = few_shot(
        train.features, train.labels, val.features, val.labels, config.few_shot, config.draws, config.ks,
        config.temperatures, config.seed, progress=True,
    )  # fmt: skip
    found.few_shot += [{"model": model, **record} for record in records]
    found.figures += [few_shot_figure(model, record, config.draws, config.seed) for record in records]


def _pixels(
    parts: tuple[Source, Source], transform: EvalTransform, normalised: bool, device: torch.device, config: KnnConfig
) -> tuple[Features, Features] | None:
    """Pixels as features, kept nowhere: they are quicker to make than to read. None where they would be too many."""
    pixels = Pixels(transform, normalised).to(device)
    size = 4 * pixels.embed_dim * sum(map(len, parts))
    if size > _PIXELS_AT_MOST:
        if not normalised:
            distributed.say(f"notice: no raw-pixel row, its features would take {size / 2**30:.0f} GiB of memory")
        return None
    train, val = (
        extract(
            pixels,
            part,
            transform,
            device,
            config.batch_size_per_gpu,
            config.num_workers,
            unreadable=config.unreadable,
        )
        for part in parts
    )
    return train, val


def command() -> None:
    """The console entry."""
    distributed.run_command(main)


if __name__ == "__main__":
    command()
