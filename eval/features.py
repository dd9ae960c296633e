"""Features of a frozen backbone over a data set, extracted once and kept. B batch, D features."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dino_xcit import distributed
from dino_xcit.data import Source, UndecodableImage, decode
from dino_xcit.data.loader import choose_workers
from dino_xcit.errors import InputError
from dino_xcit.transform import EvalTransform, normalise

CACHE_VERSION = "1"


@dataclass
class Features:
    """Rows in the order of the source."""

    features: NDArray[np.float32]
    """[images, D], not normalised; memory-mapped where they come from the cache."""
    labels: NDArray[np.int64] | None
    """[images], or None for a source without labels."""


class TransformedImages(Dataset[Tensor]):
    """Source items as uint8 tensors [3, crop, crop]; an image that cannot be read is handed over as its error."""

    def __init__(self, source: Source, transform: EvalTransform) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor | InputError:  # type: ignore[override]
        try:
            return self.transform(decode(self.source.read(index)[0], self.source.name(index)))
        except InputError as error:
            return UndecodableImage(str(error))


def _stack(images: list[Tensor | InputError]) -> Tensor | InputError:
    for image in images:
        if isinstance(image, InputError):
            return image
    return torch.stack(images)  # type: ignore[arg-type]


def batches(
    source: Source, transform: EvalTransform, indices: list[list[int]], num_workers: int, device: torch.device
) -> Iterator[Tensor]:
    """The images of each list of indices: [B, 3, crop, crop] uint8.

    Raises:
        UndecodableImage: an image cannot be read; it is named.
    """
    workers = choose_workers(num_workers, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    loader: DataLoader[Tensor] = DataLoader(
        TransformedImages(source, transform),
        batch_sampler=indices,
        num_workers=min(workers, len(indices)),
        collate_fn=_stack,
        pin_memory=device.type == "cuda",
    )
    for images in loader:
        if isinstance(images, InputError):
            raise images
        yield images


@torch.inference_mode()
def extract(
    backbone: nn.Module,
    source: Source,
    transform: EvalTransform,
    device: torch.device,
    batch_size: int = 128,
    num_workers: int = -1,
    progress: bool = True,
    out: NDArray[np.float32] | None = None,
) -> Features:
    """Class-token features of every image, in float32, with the backbone in eval mode (its mode is restored).

    Under torchrun the processes share the work and all get the result.

    Args:
        backbone: on ``device``, with ``embed_dim`` and the output of :class:`dino_xcit.models.BackboneOutput`.
        out: [images, D] to write into (a memory map, say); default: a new array.
    """
    was_training = backbone.training
    backbone.eval()
    world, rank, total = distributed.world_size(), distributed.rank(), len(source)
    if out is None:
        out = np.empty((total, int(backbone.embed_dim)), dtype=np.float32)  # type: ignore[arg-type]
    rounds = [range(start, min(start + batch_size * world, total)) for start in range(0, total, batch_size * world)]
    mine = [list(chunk[rank * batch_size : (rank + 1) * batch_size]) for chunk in rounds]
    images = batches(source, transform, [chunk for chunk in mine if chunk], num_workers, device)
    with tqdm(
        total=total, unit="img", desc=f"features of {source.url}", disable=not (progress and rank == 0), leave=False
    ) as bar:
        for chunk, own in zip(rounds, mine, strict=True):
            if own:
                batch = normalise(next(images).to(device, non_blocking=True), transform.mean, transform.std)
                rows = backbone(batch).cls_token.float()
            else:
                rows = torch.empty((0, out.shape[1]), device=device)
            out[chunk.start : chunk.stop] = distributed.gather_rows(rows).cpu().numpy()
            bar.update(len(chunk))
    backbone.train(was_training)
    return Features(out, source.labels)


def cached(
    backbone: nn.Module,
    weights_hash: str,
    source: Source,
    transform: EvalTransform,
    device: torch.device,
    cache_dir: Path | None,
    batch_size: int = 128,
    num_workers: int = -1,
) -> Features:
    """As :func:`extract`, but kept below ``cache_dir`` under a key of weights, data and preprocessing.

    A file is complete or absent: it is written aside and renamed.

    Args:
        weights_hash: identifies the backbone's weights (:func:`dino_xcit.weights.hash_state`).
        cache_dir: None: extract anew and keep nothing.
    """
    if cache_dir is None:
        return extract(backbone, source, transform, device, batch_size, num_workers)
    card = {
        "version": CACHE_VERSION,
        "weights": weights_hash,
        "data": source.fingerprint(),
        "images": len(source),
        "dimension": int(backbone.embed_dim),  # type: ignore[arg-type]
        "transform": transform.to_dict(),
    }
    key = hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()[:20]
    folder = cache_dir / key
    found = distributed.main_decides("yes" if (folder / "features.npy").exists() else None)
    if not found:
        aside = cache_dir / f".{key}.tmp"
        out: NDArray[np.float32] | None = None
        if distributed.is_main():
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            shape = (len(source), int(backbone.embed_dim))  # type: ignore[arg-type]
            out = np.lib.format.open_memmap(aside / "features.npy", mode="w+", dtype=np.float32, shape=shape)
        extract(backbone, source, transform, device, batch_size, num_workers, out=out)
        if distributed.is_main():
            assert isinstance(out, np.memmap)
            out.flush()
            (aside / "card.json").write_text(json.dumps(card | {"source": source.url}, indent=1))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(aside, folder)
        distributed.barrier()
    return Features(np.load(folder / "features.npy", mmap_mode="r"), source.labels)
