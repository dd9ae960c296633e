"""A set of images as vectors, extracted now or read from a finished collection, with the images where they are at hand.

N images, E features of a vector.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dino_xcit.data import Source, decode
from dino_xcit.errors import InputError
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import LoadedBackbone
from eval.collection import whitening as whitening_file
from eval.collection.card import data_of, differences, kind_of, settings_of
from eval.collection.contact_sheet import Tile
from eval.collection.images import changed_since, images_of
from eval.collection.store import CARD, Collection, open_collection, prepared
from eval.collection.whitening import Whitening
from eval.features import cached
from eval.pooling import Descriptor
from eval.results import Card, data_card, weights_card
from eval.retrieval.whole_image import LongerSide, longer_side, square
from eval.retrieval_config import RetrievalConfig
from eval.setup import cache_folder, open_backbone, open_weights

WHOLE_PIXELS, SQUARE_PIXELS = 224, 320
"""What DINO's scripts for landmarks and Copydays do when nobody says otherwise."""


@dataclass(frozen=True)
class VectorSet:
    """Vectors and what they are of."""

    vectors: NDArray[np.float32]
    """[N, E], not necessarily of length 1; perhaps memory-mapped and of float16."""
    names: list[str]
    """[N]."""
    source: Source | None
    """The images; None where a collection's are not where they were."""
    card: Mapping[str, Any]
    """What the vectors are, as a collection's card says it."""
    computed_by: tuple[LoadedBackbone, EvalTransform, torch.device] | None
    """What extracted them just now, or before into the cache; None for a finished collection."""

    @property
    def data(self) -> Card:
        """Which images, for a result file."""
        first, *added = data_of(self.card)
        return first | {"added": added} if added else first

    def tile(self, row: int) -> Tile:
        """An image for a contact sheet, titled by its place in the set; empty where it cannot be read any more."""
        image = None
        if self.source is not None:
            with contextlib.suppress(InputError):
                image = decode(self.source.read(row)[0], self.names[row])
        return Tile(image, f"image {row}", os.path.basename(self.names[row]))


def extracted(
    config: RetrievalConfig, loaded: LoadedBackbone, device: torch.device, source: Source, transform: EvalTransform
) -> VectorSet:
    """The vectors of a source's images, as the settings say; kept beside the weights or used from there; on every
    process.

    Raises:
        InputError: an image cannot be read, or the whitening was learned from other vectors.
    """
    whitening = whitening_file.load(Path(config.whiten).expanduser()) if config.whiten else None
    return _extracted(config, loaded, device, source, transform, config.descriptor(), whitening, normalised=True)


def extracted_like(
    collection: Collection, config: RetrievalConfig, loaded: LoadedBackbone, device: torch.device, source: Source
) -> VectorSet:
    """The vectors of a source's images, made as those of a collection were: its descriptor, preparation, whitening.

    Args:
        config: where features are kept, and how large batches are.
        loaded: what :func:`eval.collection.made_with.open_backbone_of` gave.

    Raises:
        InputError: an image cannot be read.
    """
    return _extracted(
        config, loaded, device, source, loaded.transform, collection.descriptor, collection.whitening,
        collection.card["normalised"],
    )  # fmt: skip


def _extracted(
    config: RetrievalConfig,
    loaded: LoadedBackbone,
    device: torch.device,
    source: Source,
    transform: EvalTransform,
    descriptor: Descriptor,
    whitening: Whitening | None,
    normalised: bool,
) -> VectorSet:
    card: dict[str, Any] = {
        "weights": weights_card(loaded),
        "transform": transform.to_dict(),
        "descriptor": descriptor.to_dict(),
        "normalised": normalised,
        "whitening": None,
    }
    if whitening is not None:
        if changed := differences(whitening.made_for, kind_of(card)):
            raise InputError(
                f"the whitening {config.whiten or 'of the collection'} was learned from other vectors: "
                f"{'; '.join(changed)}; learn one from vectors like these with run_extract.py --learn-whitening"
            )
        card["whitening"] = {"hash": whitening.hash, "learned_on": whitening.learned_on}
    # Pictures of many sizes cannot be in one batch.
    batch = 1 if isinstance(transform, LongerSide) else config.batch_size_per_gpu
    found = cached(
        loaded.backbone, loaded.hash, source, transform, device, cache_folder(config), batch, config.num_workers,
        descriptor,
    )  # fmt: skip
    card["data"] = data_card(source, found.fingerprint)
    vectors = found.features if whitening is None else prepared(found.features, normalised, whitening)
    names = [source.name(index) for index in range(len(source))]
    return VectorSet(vectors, names, source, card, (loaded, transform, device))


def open_fitted(config: RetrievalConfig, usual: str) -> tuple[LoadedBackbone, torch.device, EvalTransform]:
    """The backbone, and how images are prepared for it: as was asked for, else in the protocol's usual way.

    Args:
        usual: ``centre`` (as the weights say), ``whole`` or ``square``.
    """
    fit = usual if config.fit == "auto" else config.fit
    if fit == "centre":
        loaded, device = open_backbone(config)
        return loaded, device, loaded.transform
    loaded, device = open_weights(config)
    if fit == "whole":
        transform: EvalTransform = longer_side(loaded.transform, config.image_size or WHOLE_PIXELS)
        how = f"in their proportions, the longer side at most {transform.crop}"
    else:
        transform = square(loaded.transform, config.image_size or SQUARE_PIXELS)
        how = f"squeezed to {transform.crop} x {transform.crop}"
    log.info(f"images: whole, {how} (--fit, --image-size)")
    return loaded, device, transform


def collection_at(path: str) -> Collection | None:
    """What run_extract.py wrote into a folder; None where it holds images, or is another form of data.

    Raises:
        InputError: the collection is not complete, or damaged.
    """
    folder = Path(path).expanduser()
    return open_collection(folder) if (folder / CARD).is_file() else None


def collected(collection: Collection) -> VectorSet:
    """The vectors of a finished collection, memory-mapped, and its images if they still are where they were; a notice
    where other images are there now."""
    images = images_of(collection.card, collection.names)
    if images is not None and distributed.is_main():
        for url in changed_since(collection.card, images):
            log.warning(
                f"{url} is not as it was when the vectors in {collection.folder} were made of it: files came, "
                "went or were written anew; images and classes are taken as they are now, vectors as they were"
            )
    return VectorSet(collection.vectors, collection.names, images, collection.card, None)  # type: ignore[arg-type]


def check_comparable(first: VectorSet, second: VectorSet) -> None:
    """Refuse to compare what different weights or settings made.

    Raises:
        InputError: naming the differences.
    """
    there, here = (_deciding(images.card) for images in (first, second))
    if changed := differences(there, here):
        raise InputError(
            f"the second set's vectors cannot be compared with the first's: {'; '.join(changed)}; extract both alike"
        )


def _deciding(card: Mapping[str, Any]) -> dict[str, Any]:
    """What decides cosines: not how vectors are kept or indexed, nor, without whitening, whether they have length 1."""
    ignored = {"dtype", "index_type"} | (set() if card.get("whitening") else {"normalised"})
    return {name: value for name, value in settings_of(card).items() if name not in ignored}
