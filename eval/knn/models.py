"""Whose features are measured: the backbone's, and those of what it has to beat."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from dino_xcit.data import Source, UndecodableImage
from dino_xcit.errors import InputError
from dino_xcit.runtime import logging as log
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import LoadedBackbone, hash_state
from eval.baselines import Pixels, untrained
from eval.config import KnnConfig
from eval.features import Features, cached, extract
from eval.setup import cache_folder

Parts = tuple[Features, Features]
"""Of the training and the validation images."""

_PIXELS_AT_MOST = 4 << 30
"""Bytes of raw-pixel features that are still worth comparing with."""


def features_of_models(
    config: KnnConfig, loaded: LoadedBackbone, train: Source, val: Source, device: torch.device
) -> Iterator[tuple[str, Parts]]:
    """The backbone's features of both parts, by the name ``trained``; and, if asked for, those of the baselines, which
    are of the same images.

    Raises:
        InputError: an image cannot be read; or another one than for the backbone, where such are left out.
    """
    folder = cache_folder(config)

    def features(backbone: nn.Module, weights_hash: str) -> Parts:
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

    trained = features(loaded.backbone, loaded.hash)
    yield "trained", trained
    if config.baselines:
        start = untrained(loaded.arch).to(device)
        yield _same_images("untrained", features(start, hash_state(start.state_dict())), trained)
        for name, normalised in (("pixels", False), ("pixels_normalised", True)):
            pixels = _pixels((train, val), loaded.transform, normalised, device, config)
            if pixels:
                yield _same_images(name, pixels, trained)


def _same_images(model: str, parts: Parts, trained: Parts) -> tuple[str, Parts]:
    """The same again, if the same images could be read."""
    for part, before in zip(parts, trained, strict=True):
        if not np.array_equal(part.unreadable, before.unreadable):
            raise InputError(f"other images could be read for {model} than before: repeat the command with --no-cache")
    return model, parts


def _pixels(
    parts: tuple[Source, Source], transform: EvalTransform, normalised: bool, device: torch.device, config: KnnConfig
) -> Parts | None:
    """Pixels as features, kept nowhere: they are quicker to make than to read. None where they would be too many."""
    pixels = Pixels(transform, normalised).to(device)
    size = 4 * pixels.embed_dim * sum(map(len, parts))
    if size > _PIXELS_AT_MOST:
        if not normalised:
            log.warning(f"no raw-pixel row, its features would take {size / 2**30:.0f} GiB of memory")
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
