"""Features of a frozen backbone over a data set, extracted once and cached. B batch, D features of a vector."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dino_xcit.data import Source, UndecodableImage, decode
from dino_xcit.data.source import hash_lines
from dino_xcit.data.workers import choose_workers, worker_init
from dino_xcit.errors import InputError, printable
from dino_xcit.runtime import atomic, distributed, watchdog
from dino_xcit.runtime.logging import progress_bar
from dino_xcit.transform import EvalTransform, normalise
from eval.pooling import CLASS_TOKEN, Descriptor

CACHE_VERSION = "1"

Unreadable = Literal["refuse", "skip"]
"""What becomes of an image that cannot be read: an error that names it, or it is left out and counted."""
Rows = NDArray[np.float32]
Chunk = tuple[Rows, NDArray[np.bool_]]
"""Rows [some, D], and whether each image could be read, [some]."""

_MIN_FOR_WORKERS = 256
"""Fewer images are read in this process: starting another takes longer."""
_MAX_NAMES, _MAX_SHOWN = 100, 5
"""Of images that could not be read, in a result file and on the screen."""
_ABANDONED_SECONDS = 3600


@dataclass
class Features:
    """Rows in the order of the source, of the images that could be read."""

    features: Rows
    """[images, D], not normalised; memory-mapped where they come from the cache."""
    labels: NDArray[np.int64] | None
    """[images], or None for a source without labels."""
    fingerprint: str = ""
    """Of the source, from :func:`cached`."""
    unreadable: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Numbers of the source's images that could not be read and are left out, ascending."""


class TransformedImages(Dataset[Tensor | UndecodableImage]):
    """Source items as uint8 tensors [3, crop, crop]. An image that cannot be read is returned as its error: a loader
    process would bury the message of a raised one in a traceback."""

    def __init__(self, source: Source, transform: EvalTransform) -> None:
        self.source, self.transform = source, transform

    def __getitem__(self, index: int) -> Tensor | UndecodableImage:
        try:
            item, _ = self.source.read(index)
            return self.transform(decode(item, self.source.name(index), self.transform.white_level))
        except InputError as error:
            return error if isinstance(error, UndecodableImage) else UndecodableImage(str(error))


def _stack(images: list[Tensor | UndecodableImage]) -> tuple[Tensor, list[int], UndecodableImage | None]:
    """The images that could be read, their places among all, and the first error."""
    places = [place for place, image in enumerate(images) if isinstance(image, Tensor)]
    good = [image for image in images if isinstance(image, Tensor)]
    error = next((image for image in images if not isinstance(image, Tensor)), None)
    return torch.stack(good) if good else torch.empty(0), places, error


def image_batches(
    source: Source, transform: EvalTransform, indices: Iterable[list[int]], total: int, num_workers: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, list[int], UndecodableImage | None]]:  # fmt: skip
    """For each list of indices: its readable images [B, 3, crop, crop] uint8, their places in the list, an error.

    Args:
        indices: asked for some batches ahead of what is yielded.
        total: about how many images this process will read: few are not worth the start of loader processes.
        num_workers: loader processes; -1: chosen.
    """
    few = num_workers < 0 and total < _MIN_FOR_WORKERS
    workers = 0 if few else choose_workers(num_workers, distributed.processes_here())
    yield from DataLoader(
        TransformedImages(source, transform),
        batch_sampler=indices,  # type: ignore[arg-type]  # anything that can be iterated over once will do
        num_workers=workers,
        collate_fn=_stack,
        worker_init_fn=worker_init() if workers else None,
        pin_memory=device.type == "cuda",
    )


def feature_rows(
    backbone: nn.Module, source: Source, transform: EvalTransform, device: torch.device, batch_size: int = 128,
    num_workers: int = -1, progress: bool = True, unreadable: Unreadable = "refuse",
    descriptor: Descriptor = CLASS_TOKEN, finite: bool = True,
) -> Iterator[Chunk]:  # fmt: skip
    """Features in the order of the source, some at a time.

    The backbone is in eval mode meanwhile; its mode is restored. Under torchrun the processes share the work and all
    get every row.

    Args:
        backbone: on ``device``, with the output of :class:`dino_xcit.models.BackboneOutput`.
        unreadable: an error, or a row of NaN.
        descriptor: how an image's vector is made.
        finite: refuse features that are not finite.

    Yields:
        Rows [some, D] float32, and whether each image could be read, [some].

    Raises:
        UndecodableImage: an image cannot be read; it is named.
        InputError: an image's features are not finite.
    """
    world, rank, total = distributed.world_size(), distributed.rank(), len(source)
    rounds = [range(start, min(start + batch_size * world, total)) for start in range(0, total, batch_size * world)]
    mine = [list(chunk[rank * batch_size : (rank + 1) * batch_size]) for chunk in rounds]
    images = image_batches(source, transform, filter(None, mine), sum(map(len, mine)), num_workers, device)
    width = descriptor.width(width_of(backbone))
    was_training = backbone.training
    backbone.eval()
    try:
        with progress_bar(total, f"features of {source.url}", shown=progress and rank == 0) as bar:
            for chunk, own in zip(rounds, mine, strict=True):
                with torch.inference_mode():
                    rows = torch.full((len(own), width), torch.nan, device=device)
                    # A row of NaN would not tell: a network that diverged has such for every image.
                    read = torch.zeros(len(own), dtype=torch.uint8, device=device)
                    if own:
                        readable, places, error = next(images)
                        if error and unreadable == "refuse":
                            raise error
                        if places:
                            batch = normalise(readable.to(device, non_blocking=True), transform.mean, transform.std)
                            rows[places] = descriptor(backbone, batch)
                            if finite:
                                refuse_not_finite(rows[places], source, [own[place] for place in places])
                            read[places] = 1
                    gathered, all_read = (distributed.gather_rows(part).cpu().numpy() for part in (rows, read))
                yield gathered, all_read > 0
                bar.update(len(chunk))
    finally:
        backbone.train(was_training)


def refuse_not_finite(rows: Tensor, source: Source, indices: Sequence[int]) -> None:
    """Check features where they are made.

    Args:
        rows: [some, D].
        indices: [some], which images of ``source`` these are.

    Raises:
        InputError: NaN or an infinite number; the image is named.
    """
    wrong = (~torch.isfinite(rows).all(dim=1)).nonzero()
    if len(wrong):
        raise InputError(
            f"the features of {source.name(indices[int(wrong[0])])} are not finite: the weights are damaged, or their "
            "training diverged; measure another checkpoint"
        )


def extract(
    backbone: nn.Module, source: Source, transform: EvalTransform, device: torch.device, num_workers: int = -1,
    progress: bool = True, unreadable: Unreadable = "refuse", finite: bool = True,
) -> Features:  # fmt: skip
    """The class tokens of :func:`feature_rows` in one array, on every process, without images that cannot be read."""
    chunks = feature_rows(
        backbone, source, transform, device, 128, num_workers, progress, unreadable, CLASS_TOKEN, finite
    )
    return _in_memory(chunks, source, width_of(backbone))


def cached(
    backbone: nn.Module, weights_hash: str, source: Source, transform: EvalTransform, device: torch.device,
    cache_dir: Path | None, batch_size: int = 128, num_workers: int = -1, descriptor: Descriptor = CLASS_TOKEN,
    unreadable: Unreadable = "refuse", half: bool = False, whole: bool = True,
) -> Features:  # fmt: skip
    """As :func:`extract`, but kept below ``cache_dir`` under a key of weights, data, preprocessing and descriptor.

    A folder is complete or absent: it is written aside and renamed. With several processes, ``cache_dir`` is one that
    all of them see. Rows that lack images are extracted anew where unreadable images are refused.

    Args:
        weights_hash: identifies the backbone's weights (:func:`dino_xcit.weights.hash_state`).
        cache_dir: None: extract anew and keep nothing.
        half: keep float16, and return it.
        whole: ``source`` is all of the data, so that one image at least must be readable.

    Raises:
        UndecodableImage: an image cannot be read, and such are refused.
        InputError: no image can be read, or the disk is too small for the features.
    """
    fingerprint = distributed.on_main(source.fingerprint)
    shape = (len(source), descriptor.width(width_of(backbone)))
    chunks = feature_rows(backbone, source, transform, device, batch_size, num_workers, True, unreadable, descriptor)
    if unreadable == "skip" and whole:
        chunks = _any_readable(chunks, source)
    if cache_dir is None:
        return _in_memory(chunks, source, shape[1], fingerprint)
    metadata, folder = _cache_slot(cache_dir, weights_hash, fingerprint, shape, transform, descriptor, half)
    complete = unreadable == "refuse"
    # All processes do as the main one says: they must not disagree about whether there is work to share.
    if not distributed.broadcast_from_main(_read_rows(folder, shape, complete, half) is not None):
        if distributed.is_main():
            _write_rows(folder, chunks, shape, metadata | {"source": source.url}, half)
        else:
            for _ in chunks:
                pass
        distributed.barrier()
    kept = _read_rows(folder, shape, complete, half)
    if kept is None:
        raise InputError(f"the features just kept in {folder} are gone: name a --cache-dir that all processes see")
    return _features(*kept, source, fingerprint)


def find_kept(
    weights_hash: str, fingerprint: str, shape: tuple[int, int], transform: EvalTransform, cache_dir: Path | None,
    descriptor: Descriptor = CLASS_TOKEN,
) -> Rows | None:  # fmt: skip
    """The features [images, D] = ``shape`` that :func:`cached` kept earlier, memory-mapped, or None.

    Never those that lack images.
    """
    if cache_dir is None:
        return None
    _, folder = _cache_slot(cache_dir, weights_hash, fingerprint, shape, transform, descriptor)
    found = _read_rows(folder, shape, complete=True)
    return found[0] if found else None


def write_rows(
    path: Path, rows: Iterable[Rows] | Iterable[NDArray[np.float16]], shape: tuple[int, int], half: bool = False,
    fewer: bool = False,
) -> None:  # fmt: skip
    """A ``.npy`` file of ``shape`` from its rows, some at a time; float32, or float16 if ``half``; flushed to the disk.

    Written in order rather than through a memory map: on a full disk that is an error, not a killed process.

    Args:
        fewer: there may be fewer rows than ``shape`` says; the file has the shape that they are.

    Raises:
        ValueError: ``rows`` were fewer or more than ``shape`` says.
    """
    count, kind = 0, "<f2" if half else "<f4"
    header = {"descr": kind, "fortran_order": False}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header | {"shape": shape})
        for chunk in rows:
            file.write(np.ascontiguousarray(chunk, dtype=kind).data)
            count += len(chunk)
        if fewer and count < shape[0]:
            file.seek(0)  # numpy leaves room for the longest count
            np.lib.format.write_array_header_1_0(file, header | {"shape": (count, shape[1])})
        file.flush()
        os.fsync(file.fileno())
    if count > shape[0] or (count < shape[0] and not fewer):
        raise ValueError(f"{path} got {count} rows, expected {shape[0]}")


def width_of(backbone: nn.Module) -> int:
    """D of the class token, the width of a backbone's features."""
    return int(backbone.embed_dim)  # type: ignore[arg-type]


def fingerprint_without(fingerprint: str, unreadable: NDArray[np.int64]) -> str:
    """Of a source without some of its images: another than that of all of them, or than without others."""
    if not len(unreadable):
        return fingerprint
    return hash_lines([fingerprint, *(f"without {number}" for number in unreadable.tolist())])


def unreadable_card(names: Sequence[str]) -> dict[str, object]:
    """What a result file says of the images that were left out: how many, and the names of the first."""
    return {"count": len(names), "first": list(names[:_MAX_NAMES])}


def unreadable_notice(name: str, source: Source, numbers: NDArray[np.int64]) -> str:
    """How many images of a part (``training``, ``validation``) could not be read, and the names of the first."""
    names = ", ".join(printable(source.name(int(number))) for number in numbers[:_MAX_SHOWN])
    more = " ..." if len(numbers) > _MAX_SHOWN else ""
    return f"{len(numbers):,} of {len(source):,} {name} images could not be read and are left out: {names}{more}"


# ---- the cache: CACHE_DIR/KEY/ with features.npy, metadata in card.json, and unreadable.npy where images are lacking


def _cache_slot(
    cache_dir: Path, weights_hash: str, fingerprint: str, shape: tuple[int, int], transform: EvalTransform,
    descriptor: Descriptor, half: bool = False,
) -> tuple[dict[str, Any], Path]:  # fmt: skip
    """All that decides what features are, and the folder that is named by it."""
    metadata = {
        "version": CACHE_VERSION, "weights": weights_hash, "data": fingerprint, "images": shape[0],
        "dimension": shape[1], "transform": transform.to_dict(),
    }  # fmt: skip
    if descriptor != CLASS_TOKEN:  # which is not named: features were cached before there was a choice
        metadata["descriptor"] = descriptor.to_dict()
    if half:
        metadata["type"] = "float16"
    return metadata, cache_dir / hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()[:20]


def _read_rows(
    folder: Path, shape: tuple[int, int], complete: bool, half: bool = False
) -> tuple[Rows, NDArray[np.int64]] | None:
    """The rows in a cache folder and the numbers of the images that they lack; None if absent or damaged.

    Args:
        shape: of the rows of all images.
        complete: no image may be lacking.
    """
    lacking, file = np.empty(0, dtype=np.int64), folder / "unreadable.npy"
    try:
        path = folder / "features.npy"
        rows: Rows = np.load(path, mmap_mode="r" if path.stat().st_size > 128 else None)  # no rows cannot be mapped
        if not complete and file.exists():
            lacking = np.load(file)
    except (OSError, ValueError, EOFError):
        return None
    dtype = np.float16 if half else np.float32
    whole = rows.shape == (shape[0] - len(lacking), shape[1]) and rows.dtype == dtype
    return (rows, lacking) if whole else None


def _write_rows(
    folder: Path, chunks: Iterator[Chunk], shape: tuple[int, int], metadata: dict[str, Any], half: bool
) -> None:
    """Keep the rows of the images that could be read.

    Raises:
        InputError: the disk has no room for them, or a feature does not fit ``half``'s float16.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    size, free = shape[0] * shape[1] * (2 if half else 4), shutil.disk_usage(folder.parent).free
    if size > free:
        raise InputError(
            f"the features of {metadata['source']} take {size / 2**30:.1f} GiB, and {folder.parent} has "
            f"{free / 2**30:.1f} GiB free: name another --cache-dir"
        )
    for left in folder.parent.glob(".*.tmp"):  # by killed processes
        with contextlib.suppress(OSError):
            if time.time() - max(file.stat().st_mtime for file in (left, *left.rglob("*"))) > _ABANDONED_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    masks: list[NDArray[np.bool_]] = []

    def readable_rows() -> Iterator[Rows]:
        for rows, read in chunks:
            masks.append(read)
            if half and (largest := float(np.abs(rows[read]).max(initial=0))) > float(np.finfo(np.float16).max):
                raise InputError(f"a feature of {largest:g} does not fit float16: use --cached-precision float32")
            yield rows[read]

    # A folder of its own for each process: several may want the same features at the same time.
    with tempfile.TemporaryDirectory(".tmp", ".", folder.parent, ignore_cleanup_errors=True) as temporary:
        aside = Path(temporary) / folder.name
        aside.mkdir()
        write_rows(aside / "features.npy", readable_rows(), shape, half, fewer=True)
        lacking = np.flatnonzero(~np.concatenate([*masks, np.empty(0, dtype=np.bool_)]))
        if len(lacking):
            np.save(aside / "unreadable.npy", lacking)
        (aside / "card.json").write_text(json.dumps(metadata, indent=1))
        if _read_rows(folder, shape, not len(lacking), half) is None:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process was faster
                os.replace(aside, folder)
            atomic.flush_folder(folder.parent)


def _in_memory(chunks: Iterator[Chunk], source: Source, width: int, fingerprint: str = "") -> Features:
    rows, readable = np.empty((len(source), width), dtype=np.float32), np.empty(len(source), dtype=np.bool_)
    start = 0
    for chunk, read in chunks:
        rows[start : start + len(chunk)], readable[start : start + len(chunk)] = chunk, read
        start += len(chunk)
        watchdog.progress()
    return _features(rows if readable.all() else rows[readable], np.flatnonzero(~readable), source, fingerprint)


def _features(rows: Rows, unreadable: NDArray[np.int64], source: Source, fingerprint: str) -> Features:
    labels = source.labels if source.labels is None else np.delete(source.labels, unreadable)
    return Features(rows, labels, fingerprint, unreadable)


def _any_readable(chunks: Iterator[Chunk], source: Source) -> Iterator[Chunk]:
    """The same; an error at their end, on every process, where no image could be read."""
    found = not len(source)
    for rows, read in chunks:
        found |= bool(read.any())
        yield rows, read
    if not found:
        raise InputError(f"none of the {len(source):,} images of {source.url} can be read: check --data-path")
