"""What a k-NN measurement found, and its result file (``--json``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from dino_xcit.data import Source
from dino_xcit.weights import LoadedBackbone
from eval.config import KnnConfig
from eval.results import KNN_PROTOCOL, Card, Figure, images_card, result_card

Record = dict[str, object]


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


def knn_card(
    found: Found,
    config: KnnConfig,
    ks: Sequence[int],
    loaded: LoadedBackbone,
    data: Mapping[str, Card],
    parts: Mapping[str, Source],
    device: torch.device,
    seconds: float,
) -> Card:
    """All of the file.

    Args:
        ks: as they were measured: no more than there are training images.
        data: of ``train`` and ``val``, see :func:`eval.results.data_card`.
        parts: the images that were measured, under the same names.
    """
    data = {name: data[name] | images_card(part) for name, part in parts.items()}
    figures = [one.to_card() for one in found.figures]
    protocol = _protocol(found, config, ks)
    card = result_card("knn", protocol, found.records, loaded, data, loaded.transform, device, seconds, figures)
    if found.few_shot:
        card["few_shot"] = {"draws": config.draws, "seed": config.seed, "results": found.few_shot}
    if found.approximate:
        card["approximate"] = found.approximate
    return card


def _protocol(found: Found, config: KnnConfig, ks: Sequence[int]) -> Card:
    """Name and settings of what was measured."""
    protocol: Card = {
        "name": KNN_PROTOCOL,
        "ks": list(ks),
        "temperatures": list(config.temperatures),
        "interval": "95%, Wilson score, over the validation images",
    }
    if found.approximate:
        protocol["name"] = KNN_PROTOCOL.replace("exact", "approximate")
        probes = found.approximate["trained"]["probes"]  # as they were used; chosen, where the setting is 0
        protocol["search"] = {"approximate": config.approximate, "probes": probes}
    return protocol
