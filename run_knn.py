"""Measure a frozen backbone by weighted k-NN, DINO's protocol.

    python run_knn.py --weights runs/sample-xcit_pico_4_p4/checkpoint.pth
    torchrun --nproc-per-node 8 run_knn.py --weights ckpt.pth --data-path /data/imagenet

Read top to bottom: settings, backbone, data, features, votes, report.
"""

from __future__ import annotations

# Before torch: it decides how threads wait for each other.
import dino_xcit  # noqa: F401  # isort: skip

import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dino_xcit import distributed
from dino_xcit.data import Source
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import hash_state
from eval.baselines import Pixels, untrained
from eval.config import KnnConfig, settings
from eval.features import Features, cached, extract
from eval.figures import Figure, figure
from eval.knn import bootstrap_interval, clamp_ks, correct, knn_predict
from eval.protocol import KNN_PROTOCOL, data_card, images_card, result_card, write_json
from eval.setup import cache_folder, labelled_parts, open_backbone
from eval.table import percent, table

Record = dict[str, object]

_PIXELS_AT_MOST = 4 << 30
"""Bytes of raw-pixel features that are still worth comparing with."""


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
    transform = loaded.transform
    distributed.say(
        f"k-NN: {len(train):,} training images of {train.url}, {len(val):,} validation images of {val.url}; "
        "features of length 1, vote weight exp(cosine / T)"
    )

    # ---- features and votes: this backbone, then what it has to beat
    folder = cache_folder(config)

    def features(backbone: nn.Module, weights_hash: str) -> tuple[Features, Features]:
        batch, workers = config.batch_size_per_gpu, config.num_workers
        first, second = (
            cached(backbone, weights_hash, part, transform, device, folder, batch, workers) for part in (train, val)
        )
        return first, second

    trained = features(loaded.backbone, loaded.hash)
    figures: list[Figure] = []
    results = _measure("trained", trained, config, ks, figures)
    if config.baselines:
        start = untrained(loaded.arch).to(device)
        results += _measure("untrained", features(start, hash_state(start.state_dict())), config, ks, figures)
        for name, normalised in (("pixels", False), ("pixels_normalised", True)):
            pixels = _pixels((train, val), transform, normalised, device, config)
            if pixels:
                results += _measure(name, pixels, config, ks, figures)
    if not distributed.is_main():
        return

    # ---- report
    rows = [
        [
            str(row["model"]),
            str(row["k"]),
            f"{row['temperature']:g}",
            percent(row["top1"], row["top1_interval"]),  # type: ignore[arg-type]
            percent(row["top5"], row["top5_interval"]),  # type: ignore[arg-type]
        ]
        for row in results
    ]
    distributed.say(table(["model", "k", "T", "top-1 % [95% interval]", "top-5 % [95% interval]"], rows))
    if config.json:
        protocol = {
            "name": KNN_PROTOCOL,
            "ks": ks,
            "temperatures": list(config.temperatures),
            "interval": "95% percentile bootstrap over the validation images",
        }
        data = {
            name: data_card(part, found.fingerprint) | images_card(part)
            for name, part, found in zip(("train", "val"), (train, val), trained, strict=True)
        }
        seconds = time.perf_counter() - started
        cards = [one.to_card() for one in figures]
        card = result_card("knn", protocol, results, loaded, data, transform, device, seconds, cards)
        write_json(Path(config.json), card)
        distributed.say(f"written: {config.json}")


def _measure(
    model: str, parts: tuple[Features, Features], config: KnnConfig, ks: list[int], figures: list[Figure]
) -> list[Record]:
    """One record a pair of k and T, whose top-1 joins ``figures``; none on the processes that do not report."""
    if not distributed.is_main():
        return []
    train, val = parts
    predictions = knn_predict(
        train.features, train.labels, val.features, ks, config.temperatures, progress=len(val.features) > 4096
    )
    # Of five classes every one is among the first five, and k < 5 neighbours name fewer.
    five = train.labels is not None and len(np.unique(train.labels)) > 5
    records: list[Record] = []
    for k in ks:
        for temperature in config.temperatures:
            record: Record = {"model": model, "k": k, "temperature": temperature}
            for top, meant in ((1, True), (5, five and k >= 5)):
                hits = correct(predictions[k, temperature], val.labels, top)
                record[f"top{top}"] = 100.0 * float(hits.mean()) if meant else None
                record[f"top{top}_interval"] = bootstrap_interval(hits) if meant else None
                if top == 1:
                    name, baseline = f"{model} k={k} T={temperature:g} top-1", model != "trained"
                    figures.append(figure(name, {"model": model, "k": k, "T": temperature}, hits, baseline))
            records.append(record)
    return records


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
        extract(pixels, part, transform, device, config.batch_size_per_gpu, config.num_workers) for part in parts
    )
    return train, val


def command() -> None:
    """The console entry."""
    distributed.run_command(main)


if __name__ == "__main__":
    command()
