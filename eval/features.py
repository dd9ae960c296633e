"""Features of a frozen backbone over a data set, extracted once and kept. B batch, D features of an image's vector."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dino_xcit import distributed
from dino_xcit.console import progress_bar
from dino_xcit.data import Source, UndecodableImage, decode
from dino_xcit.data.loader import choose_workers, loader_process_setup
from dino_xcit.errors import InputError
from dino_xcit.transform import EvalTransform, normalise
from eval.pooling import CLASS_TOKEN, Descriptor
from eval.protocol import write_json

CACHE_VERSION = "1"

_TOO_FEW_FOR_WORKERS = 256
"""So few images are read in this process: starting another takes longer."""

_ABANDONED_SECONDS = 3600


@dataclass
class Features:
    """Rows in the order of the source."""

    features: NDArray[np.float32]
    """[images, D], not normalised; memory-mapped where they come from the cache."""
    labels: NDArray[np.int64] | None
    """[images], or None for a source without labels."""
    fingerprint: str = ""
    """Of the source, where it was asked for (:func:`cached`)."""


class TransformedImages(Dataset[Tensor | InputError]):
    """Source items as uint8 tensors [3, crop, crop]; an image that cannot be read is handed over as its error."""

    def __init__(self, source: Source, transform: EvalTransform) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor | InputError:
        try:
            return self.transform(decode(self.source.read(index)[0], self.source.name(index)))
        except UndecodableImage as error:
            # Handed over rather than raised: a loader process would bury the sentence in a traceback.
            return error
        except InputError as error:
            return UndecodableImage(str(error))


def _stack(images: list[Tensor | InputError]) -> tuple[Tensor, list[int], InputError | None]:
    """The images that could be read, their places among all, and the first error."""
    places = [place for place, image in enumerate(images) if not isinstance(image, InputError)]
    errors = [image for image in images if isinstance(image, InputError)]
    good = [image for image in images if isinstance(image, Tensor)]
    return torch.stack(good) if good else torch.empty(0), places, errors[0] if errors else None


def image_batches(
    source: Source,
    transform: EvalTransform,
    indices: Iterable[list[int]],
    total: int,
    num_workers: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, list[int], InputError | None]]:
    """For each list of indices: its readable images [B, 3, crop, crop] uint8, their places in the list, an error.

    Args:
        indices: asked for some batches ahead of what is yielded.
        total: about how many images this process will read: few are not worth the start of loader processes.
        num_workers: loader processes; -1: chosen.
    """
    workers = choose_workers(num_workers, distributed.processes_here())
    if num_workers < 0 and total < _TOO_FEW_FOR_WORKERS:
        workers = 0
    loader: DataLoader[Tensor | InputError] = DataLoader(
        TransformedImages(source, transform),
        batch_sampler=indices,  # type: ignore[arg-type]  # anything that can be iterated over once will do
        num_workers=workers,
        collate_fn=_stack,
        worker_init_fn=loader_process_setup() if workers else None,
        pin_memory=device.type == "cuda",
    )
    yield from loader


def feature_rows(
    backbone: nn.Module,
    source: Source,
    transform: EvalTransform,
    device: torch.device,
    batch_size: int = 128,
    num_workers: int = -1,
    progress: bool = True,
    unreadable: Literal["refuse", "nan"] = "refuse",
    descriptor: Descriptor = CLASS_TOKEN,
) -> Iterator[NDArray[np.float32]]:
    """Features in the order of the source, [some, D] float32 at a time, so that nobody need hold them all.

    The backbone is in eval mode meanwhile; its mode is restored. Under torchrun the processes share the work and all
    get every row.

    Args:
        backbone: on ``device``, with the output of :class:`dino_xcit.models.BackboneOutput`.
        unreadable: what becomes of an image that cannot be read: an error, or a row of NaN.
        descriptor: how an image's vector is made.

    Raises:
        UndecodableImage: an image cannot be read; it is named.
    """
    world, rank, total = distributed.world_size(), distributed.rank(), len(source)
    rounds = [range(start, min(start + batch_size * world, total)) for start in range(0, total, batch_size * world)]
    mine = [list(chunk[rank * batch_size : (rank + 1) * batch_size]) for chunk in rounds]
    width = descriptor.width(width_of(backbone))
    own_lists = [chunk for chunk in mine if chunk]
    images = image_batches(source, transform, own_lists, sum(map(len, mine)), num_workers, device)
    was_training = backbone.training
    backbone.eval()
    try:
        with progress_bar(total, f"features of {source.url}", shown=progress and rank == 0) as bar:
            for chunk, own in zip(rounds, mine, strict=True):
                with torch.inference_mode():
                    rows = torch.full((len(own), width), torch.nan, device=device)
                    if own:
                        readable, places, error = next(images)
                        if error and unreadable == "refuse":
                            raise error
                        if places:
                            batch = normalise(readable.to(device, non_blocking=True), transform.mean, transform.std)
                            rows[places] = descriptor(backbone, batch)
                    gathered = distributed.gather_rows(rows).cpu().numpy()
                yield gathered
                bar.update(len(chunk))
    finally:
        backbone.train(was_training)


def extract(
    backbone: nn.Module,
    source: Source,
    transform: EvalTransform,
    device: torch.device,
    batch_size: int = 128,
    num_workers: int = -1,
    progress: bool = True,
    unreadable: Literal["refuse", "nan"] = "refuse",
    between_batches: Callable[[], None] = lambda: None,
    descriptor: Descriptor = CLASS_TOKEN,
) -> Features:
    """All of :func:`feature_rows` in one array, on every process.

    Args:
        unreadable, descriptor: as there.
        between_batches: called after each batch, on all processes equally often; it may raise to end this.
    """
    rows = np.empty((len(source), descriptor.width(width_of(backbone))), dtype=np.float32)
    start = 0
    for chunk in feature_rows(
        backbone, source, transform, device, batch_size, num_workers, progress, unreadable, descriptor
    ):
        rows[start : start + len(chunk)] = chunk
        start += len(chunk)
        between_batches()
    return Features(rows, source.labels)


def cached(
    backbone: nn.Module,
    weights_hash: str,
    source: Source,
    transform: EvalTransform,
    device: torch.device,
    cache_dir: Path | None,
    batch_size: int = 128,
    num_workers: int = -1,
    descriptor: Descriptor = CLASS_TOKEN,
) -> Features:
    """As :func:`extract`, but kept below ``cache_dir`` under a key of weights, data, preprocessing and descriptor.

    A file is complete or absent: it is written aside and renamed. With several processes, ``cache_dir`` is one that
    all of them see.

    Args:
        weights_hash: identifies the backbone's weights (:func:`dino_xcit.weights.hash_state`).
        cache_dir: None: extract anew and keep nothing.
    """
    fingerprint = distributed.main_decides(source.fingerprint() if distributed.is_main() else None) or ""
    if cache_dir is None:
        found = extract(backbone, source, transform, device, batch_size, num_workers, descriptor=descriptor)
        return Features(found.features, found.labels, fingerprint)
    shape = (len(source), descriptor.width(width_of(backbone)))
    card = cache_card(weights_hash, fingerprint, shape, transform, descriptor)
    folder = cache_dir / _key(card)
    # One process looks, and all do as it says: they must not disagree about whether there is work to share.
    there = distributed.main_decides("yes" if distributed.is_main() and _rows_in(folder, shape) is not None else None)
    if not there:
        rows = feature_rows(backbone, source, transform, device, batch_size, num_workers, descriptor=descriptor)
        if distributed.is_main():
            _keep(folder, rows, shape, card | {"source": source.url})
        else:
            for _ in rows:
                pass
        distributed.barrier()
    kept = _rows_in(folder, shape)
    if kept is None:
        raise InputError(f"the features that were just kept in {folder} are gone: name a --cache-dir that all can see")
    return Features(kept, source.labels, fingerprint)


def find_kept(
    weights_hash: str,
    fingerprint: str,
    shape: tuple[int, int],
    transform: EvalTransform,
    cache_dir: Path | None,
    descriptor: Descriptor = CLASS_TOKEN,
) -> NDArray[np.float32] | None:
    """The features [images, D] = ``shape`` that :func:`cached` kept earlier, memory-mapped, or None."""
    if cache_dir is None:
        return None
    return _rows_in(cache_dir / _key(cache_card(weights_hash, fingerprint, shape, transform, descriptor)), shape)


def cache_card(
    weights_hash: str,
    fingerprint: str,
    shape: tuple[int, int],
    transform: EvalTransform,
    descriptor: Descriptor = CLASS_TOKEN,
) -> dict[str, object]:
    """All that decides what features are: two cards are equal where the features are."""
    # The class token is not named, so that what was kept before there was a choice is found.
    other = {} if descriptor == CLASS_TOKEN else {"descriptor": descriptor.to_dict()}
    return other | {
        "version": CACHE_VERSION,
        "weights": weights_hash,
        "data": fingerprint,
        "images": shape[0],
        "dimension": shape[1],
        "transform": transform.to_dict(),
    }


def width_of(backbone: nn.Module) -> int:
    """D of the class token, the width of a backbone's features."""
    return int(backbone.embed_dim)  # type: ignore[arg-type]


def write_rows(
    path: Path,
    rows: Iterator[NDArray[np.float32]] | Iterator[NDArray[np.float16]],
    shape: tuple[int, int],
    half: bool = False,
) -> None:
    """A ``.npy`` file of ``shape`` from its rows, some at a time; float32, or float16 if ``half``; flushed to the disk.

    Written in order rather than through a memory map: on a full disk that is an error, not a killed process.

    Raises:
        ValueError: ``rows`` were fewer or more than ``shape`` says.
    """
    count, kind = 0, "<f2" if half else "<f4"
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
        for chunk in rows:
            file.write(np.ascontiguousarray(chunk, dtype=kind).data)
            count += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    if count != shape[0]:
        raise ValueError(f"{path} got {count} rows, expected {shape[0]}")


def _key(card: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()[:20]


def _rows_in(folder: Path, shape: tuple[int, int]) -> NDArray[np.float32] | None:
    """The kept rows, or None where there are none, or where the file was damaged: then they are extracted anew."""
    try:
        rows: NDArray[np.float32] = np.load(folder / "features.npy", mmap_mode="r")
    except (FileNotFoundError, NotADirectoryError, ValueError, EOFError):
        return None
    return rows if rows.shape == shape and rows.dtype == np.float32 else None


def _keep(folder: Path, rows: Iterator[NDArray[np.float32]], shape: tuple[int, int], card: dict[str, object]) -> None:
    # The process number keeps two runners that want the same features at the same time out of each other's way.
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    _sweep(folder.parent)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write_rows(aside / "features.npy", rows, shape)
        write_json(aside / "card.json", card)
        if _rows_in(folder, shape) is None:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sweep(cache_dir: Path) -> None:
    """Remove what a killed process left half-written: a file that nobody has written to for an hour."""
    for left in cache_dir.glob(".*.tmp/features.npy"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(left.parent, ignore_errors=True)
