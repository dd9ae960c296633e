"""Feature extraction with a frozen backbone, and the feature cache. B is the batch size, D the number of features."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dino_xcit.data import Source, UndecodableImage
from dino_xcit.data.decode import read_image
from dino_xcit.data.source import hash_lines
from dino_xcit.data.workers import PREFETCHED, choose_workers, fit_shared_memory, worker_init
from dino_xcit.errors import InputError, printable
from dino_xcit.runtime import atomic, distributed, watchdog
from dino_xcit.runtime.logging import progress_bar
from dino_xcit.transform import EvalTransform, normalise
from eval.pooling import CLASS_TOKEN, Descriptor

CACHE_VERSION = "1"

Unreadable = Literal["refuse", "skip"]
"""Handling of unreadable images: raise an error that names the image, or skip it."""
Rows = NDArray[np.float32]
Chunk = tuple[Rows, NDArray[np.bool_]]
"""Rows [n, D] and a mask [n] of the readable images."""

_MIN_FOR_WORKERS = 256
"""Minimum number of images for which starting workers saves time."""
_MAX_NAMES, _MAX_SHOWN = 100, 5
"""Maximum number of unreadable images named in a result file and in the log."""
_ABANDONED_SECONDS = 3600
"""Age at which temporary folders of killed processes are deleted."""


@dataclass
class Features:
    """Features and labels of the readable images, in the order of the source."""

    features: Rows
    """[images, D], not normalised; memory-mapped if read from the cache."""
    labels: NDArray[np.int64] | None
    """[images], or None for a source without labels."""
    fingerprint: str = ""
    """Fingerprint of the source, set by :func:`cached`."""
    unreadable: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Indices of the skipped unreadable images, ascending."""


class TransformedImages(Dataset[Tensor | UndecodableImage]):
    """Images of a source as tensors [channels, crop, crop], see :class:`EvalTransform`.

    Errors of unreadable images are returned: raised ones would come out of a worker inside a traceback.
    """

    def __init__(self, source: Source, transform: EvalTransform) -> None:
        self.source, self.transform = source, transform

    def __getitem__(self, index: int) -> Tensor | UndecodableImage:
        try:
            return self.transform(read_image(self.source, index, self.transform.pixel_format))
        except InputError as error:
            return error if isinstance(error, UndecodableImage) else UndecodableImage(str(error))


def _stack(images: list[Tensor | UndecodableImage]) -> tuple[Tensor, list[int], UndecodableImage | None]:
    """Stack the readable images and return them with their positions in the batch and the first error."""
    places = [place for place, image in enumerate(images) if isinstance(image, Tensor)]
    good = [image for image in images if isinstance(image, Tensor)]
    error = next((image for image in images if not isinstance(image, Tensor)), None)
    return torch.stack(good) if good else torch.empty(0), places, error


def image_batches(
    source: Source, transform: EvalTransform, indices: Iterable[list[int]], total: int, num_workers: int,
    device: torch.device, batch_size: int,
) -> Generator[tuple[Tensor, list[int], UndecodableImage | None], None, None]:  # fmt: skip
    """Yield for each list of indices the readable images [B, channels, crop, crop], their positions, and an error.

    Args:
        indices: consumed a few batches ahead of the output.
        total: approximate number of images on this rank; few are read without workers.
        num_workers: loader workers; -1: chosen.
        batch_size: maximum length of the lists.
    """
    few = num_workers < 0 and total < _MIN_FOR_WORKERS
    workers = 0 if few else choose_workers(num_workers, distributed.processes_here(), on_gpu=device.type == "cuda")
    workers = fit_shared_memory(workers, min(batch_size, total), [transform.pixel_format.rgb_side(transform.crop)])
    yield from DataLoader(
        TransformedImages(source, transform),
        batch_sampler=indices,  # type: ignore[arg-type]  # iterated over once
        num_workers=workers,
        prefetch_factor=PREFETCHED if workers else None,
        collate_fn=_stack,
        worker_init_fn=worker_init() if workers else None,
        pin_memory=device.type == "cuda",
    )


def feature_rows(
    backbone: nn.Module, source: Source, transform: EvalTransform, device: torch.device, batch_size: int = 128,
    num_workers: int = -1, progress: bool = True, unreadable: Unreadable = "refuse",
    descriptor: Descriptor = CLASS_TOKEN, finite: bool = True,
) -> Iterator[Chunk]:  # fmt: skip
    """Yield features in the order of the source, in chunks.

    The backbone runs in eval mode; its mode is restored afterwards. All ranks share the work and get all rows.

    Args:
        backbone: module on ``device`` that returns :class:`dino_xcit.models.BackboneOutput`.
        unreadable: raise an error, or give a row of NaN.
        descriptor: descriptor of the vectors.
        finite: raise an error if features are not finite.

    Yields:
        Rows [n, D] float32 and a mask [n] of the readable images.

    Raises:
        UndecodableImage: an image is unreadable; the message names it.
        InputError: the features of an image are not finite.
    """
    world, rank, total = distributed.world_size(), distributed.rank(), len(source)
    rounds = [range(start, min(start + batch_size * world, total)) for start in range(0, total, batch_size * world)]
    mine = [list(chunk[rank * batch_size : (rank + 1) * batch_size]) for chunk in rounds]
    images = image_batches(source, transform, filter(None, mine), sum(map(len, mine)), num_workers, device, batch_size)
    width = descriptor.width(width_of(backbone))
    was_training = backbone.training
    backbone.eval()
    try:
        with progress_bar(total, f"features of {source.url}", shown=progress and rank == 0) as bar:
            for chunk, own in zip(rounds, mine, strict=True):
                with torch.inference_mode():
                    # The last column is 1 for readable images, NaN otherwise: their features can be NaN too.
                    rows = torch.full((len(own), width + 1), torch.nan, device=device)
                    if own:
                        readable, places, error = next(images)
                        if error and unreadable == "refuse":
                            raise error
                        if places:
                            batch = normalise(readable.to(device, non_blocking=True), transform.mean, transform.std)
                            # Indexing with a host list waits for the device: write directly if all are readable.
                            found = rows if len(places) == len(own) else rows.new_empty(len(places), width + 1)
                            found[:, :width], found[:, width] = descriptor(backbone, batch), 1
                            if found is not rows:
                                rows[places] = found
                    gathered = distributed.gather_rows(rows).cpu().numpy()
                read = ~np.isnan(gathered[:, width])
                if finite:
                    refuse_not_finite(gathered[read, :width], source, np.array(chunk)[read])
                yield gathered[:, :width], read
                bar.update(len(chunk))
    finally:
        images.close()  # stops the workers
        backbone.train(was_training)


def refuse_not_finite(rows: NDArray[np.float32], source: Source, indices: Sequence[int] | NDArray[np.int64]) -> None:
    """Check that features are finite.

    Args:
        rows: [n, D].
        indices: [n], indices of the images in ``source``.

    Raises:
        InputError: a feature is NaN or infinite; the message names the image.
    """
    wrong = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(wrong):
        raise InputError(
            f"the features of {source.name(indices[int(wrong[0])])} are not finite: the weights are damaged or their "
            "training diverged; give another checkpoint"
        )


def extract(
    backbone: nn.Module, source: Source, transform: EvalTransform, device: torch.device, num_workers: int = -1,
    progress: bool = True, unreadable: Unreadable = "refuse", finite: bool = True,
) -> Features:  # fmt: skip
    """Extract the class tokens of all readable images into one array, on every rank."""
    chunks = feature_rows(
        backbone, source, transform, device, 128, num_workers, progress, unreadable, CLASS_TOKEN, finite
    )
    return _in_memory(chunks, source, width_of(backbone))


def cached(
    backbone: nn.Module, weights_hash: str, source: Source, transform: EvalTransform, device: torch.device,
    cache_dir: Path | None, batch_size: int = 128, num_workers: int = -1, descriptor: Descriptor = CLASS_TOKEN,
    unreadable: Unreadable = "refuse", half: bool = False, whole: bool = True,
) -> Features:  # fmt: skip
    """Extract features or read them from the feature cache, whose key is weights, data, transform and descriptor.

    Entries are written atomically. Several ranks need a ``cache_dir`` that is visible to all of them. With
    ``unreadable="refuse"``, cached features without the unreadable images are not reused.

    Args:
        weights_hash: hash of the backbone's weights (:func:`dino_xcit.weights.hash_state`).
        cache_dir: folder of the cache; None: do not cache.
        half: store and return float16.
        whole: ``source`` is the whole data set, in which at least one image must be readable.

    Raises:
        UndecodableImage: an image is unreadable and ``unreadable`` is ``"refuse"``.
        InputError: all images are unreadable, or the disk is too small for the features.
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
    # Rank 0 decides for all ranks, which must agree on whether to extract.
    if not distributed.broadcast_from_main(_read_rows(folder, shape, complete, half) is not None):
        if distributed.is_main():
            _write_rows(folder, chunks, shape, metadata | {"source": source.url}, half)
        else:
            for _ in chunks:
                pass
        distributed.barrier()
    stored = _read_rows(folder, shape, complete, half)
    if stored is None:
        raise InputError(f"the features just cached in {folder} are missing: give a --cache-dir visible to all ranks")
    return _features(*stored, source, fingerprint)


def find_kept(
    weights_hash: str, fingerprint: str, shape: tuple[int, int], transform: EvalTransform, cache_dir: Path | None,
    descriptor: Descriptor = CLASS_TOKEN,
) -> Rows | None:  # fmt: skip
    """Return complete features of ``shape`` [images, D] from the feature cache, memory-mapped, or None."""
    if cache_dir is None:
        return None
    _, folder = _cache_slot(cache_dir, weights_hash, fingerprint, shape, transform, descriptor)
    found = _read_rows(folder, shape, complete=True)
    return found[0] if found else None


def write_rows(
    path: Path, rows: Iterable[Rows] | Iterable[NDArray[np.float16]], shape: tuple[int, int], half: bool = False,
    fewer: bool = False,
) -> None:  # fmt: skip
    """Write chunks of rows to a ``.npy`` file of ``shape`` in float32, or float16 if ``half``, and flush it to disk.

    Sequential writes raise an error on a full disk, where a memory map would kill the process.

    Args:
        fewer: accept fewer rows than ``shape``; the file then has the actual shape.

    Raises:
        ValueError: the number of rows differs from ``shape``.
    """
    count, kind = 0, "<f2" if half else "<f4"
    header = {"descr": kind, "fortran_order": False}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header | {"shape": shape})
        for chunk in rows:
            file.write(np.ascontiguousarray(chunk, dtype=kind).data)
            count += len(chunk)
        if fewer and count < shape[0]:
            file.seek(0)  # numpy pads the header for larger shapes
            np.lib.format.write_array_header_1_0(file, header | {"shape": (count, shape[1])})
        file.flush()
        os.fsync(file.fileno())
    if count > shape[0] or (count < shape[0] and not fewer):
        raise ValueError(f"{path} got {count} rows, expected {shape[0]}")


def width_of(backbone: nn.Module) -> int:
    """Return D, the width of a backbone's class token."""
    return int(backbone.embed_dim)  # type: ignore[arg-type]


def fingerprint_without(fingerprint: str, unreadable: NDArray[np.int64]) -> str:
    """Return the fingerprint of a source without its unreadable images."""
    if not len(unreadable):
        return fingerprint
    return hash_lines([fingerprint, *(f"without {number}" for number in unreadable.tolist())])


def unreadable_metadata(names: Sequence[str]) -> dict[str, object]:
    """Describe the skipped images in a result file: their count and the first names."""
    return {"count": len(names), "first": list(names[:_MAX_NAMES])}


def unreadable_notice(name: str, source: Source, numbers: NDArray[np.int64]) -> str:
    """Describe the unreadable images of a part (``training``, ``validation``) in a log message."""
    names = ", ".join(printable(source.name(int(number))) for number in numbers[:_MAX_SHOWN])
    more = " ..." if len(numbers) > _MAX_SHOWN else ""
    return f"{len(numbers):,} of {len(source):,} {name} images are unreadable and skipped: {names}{more}"


# ---- the cache: CACHE_DIR/KEY/ with features.npy, metadata in metadata.json, and unreadable.npy if images were skipped


def _cache_slot(
    cache_dir: Path, weights_hash: str, fingerprint: str, shape: tuple[int, int], transform: EvalTransform,
    descriptor: Descriptor, half: bool = False,
) -> tuple[dict[str, Any], Path]:  # fmt: skip
    """Return the metadata that determines the features, and the cache folder, named by its hash."""
    metadata = {
        "version": CACHE_VERSION, "weights": weights_hash, "data": fingerprint, "images": shape[0],
        "dimension": shape[1], "transform": transform.to_dict(),
    }  # fmt: skip
    if descriptor != CLASS_TOKEN:  # omitted for the class token, so that older cache entries remain valid
        metadata["descriptor"] = descriptor.to_dict()
    if half:
        metadata["type"] = "float16"
    return metadata, cache_dir / hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()[:20]


def _read_rows(
    folder: Path, shape: tuple[int, int], complete: bool, half: bool = False
) -> tuple[Rows, NDArray[np.int64]] | None:
    """Read a cache entry: rows and indices of the skipped images; None if absent or damaged.

    Args:
        shape: shape of the rows of all images.
        complete: reject an entry with skipped images.
    """
    skipped, file = np.empty(0, dtype=np.int64), folder / "unreadable.npy"
    try:
        path = folder / "features.npy"
        rows: Rows = np.load(path, mmap_mode="r" if path.stat().st_size > 128 else None)  # mmap refuses empty arrays
        if not complete and file.exists():
            skipped = np.load(file)
    except (OSError, ValueError, EOFError):
        return None
    dtype = np.float16 if half else np.float32
    whole = rows.shape == (shape[0] - len(skipped), shape[1]) and rows.dtype == dtype
    return (rows, skipped) if whole else None


def _write_rows(
    folder: Path, chunks: Iterator[Chunk], shape: tuple[int, int], metadata: dict[str, Any], half: bool
) -> None:
    """Write the rows of the readable images to the cache.

    Raises:
        InputError: the disk is too small, or a feature exceeds the range of float16.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    size, free = shape[0] * shape[1] * (2 if half else 4), shutil.disk_usage(folder.parent).free
    if size > free:
        raise InputError(
            f"the features of {metadata['source']} take {size / 2**30:.1f} GiB, but {folder.parent} has "
            f"{free / 2**30:.1f} GiB free: give another --cache-dir"
        )
    for left in folder.parent.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - max(file.stat().st_mtime for file in (left, *left.rglob("*"))) > _ABANDONED_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    masks: list[NDArray[np.bool_]] = []

    def readable_rows() -> Iterator[Rows]:
        for rows, read in chunks:
            masks.append(read)
            if half and (largest := float(np.abs(rows[read]).max(initial=0))) > float(np.finfo(np.float16).max):
                raise InputError(f"a feature is {largest:g}, too large for float16: give --cached-precision float32")
            yield rows[read]

    # A temporary folder per process, as several runs may write the same entry at the same time.
    with tempfile.TemporaryDirectory(".tmp", ".", folder.parent, ignore_cleanup_errors=True) as temporary:
        aside = Path(temporary) / folder.name
        aside.mkdir()
        write_rows(aside / "features.npy", readable_rows(), shape, half, fewer=True)
        skipped = np.flatnonzero(~np.concatenate([*masks, np.empty(0, dtype=np.bool_)]))
        if len(skipped):
            np.save(aside / "unreadable.npy", skipped)
        (aside / "metadata.json").write_text(json.dumps(metadata, indent=1))
        if _read_rows(folder, shape, not len(skipped), half) is None:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another run was faster
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
    """Pass chunks through and raise an error at the end, on every rank, if all images are unreadable."""
    found = not len(source)
    for rows, read in chunks:
        found |= bool(read.any())
        yield rows, read
    if not found:
        raise InputError(f"all {len(source):,} images of {source.url} are unreadable: check --data-path")
