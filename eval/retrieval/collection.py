"""Collections: folders with the vectors of images, their names, a search index and metadata.

``vectors.npy`` has one row per image, ``paths.txt`` the image names in the same order, ``index.faiss`` the search
index, ``metadata.json`` the metadata, and ``whitening.npz`` the whitening, if any.

N images, E features of a backbone's descriptor, W features of a stored vector (E without whitening).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from dino_xcit.data import Source, UndecodableImage, open_source
from dino_xcit.data.source import Item, Subset, hash_lines
from dino_xcit.errors import InputError, one_line
from dino_xcit.runtime import atomic, distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.run_lock import locked
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import LoadedBackbone
from eval.config import BackboneConfig
from eval.features import cached, find_kept, width_of, write_rows
from eval.pooling import Descriptor
from eval.results import data_metadata, now, versions, weights_metadata
from eval.retrieval import whitening as whitening_file
from eval.retrieval.whitening import Whitening, differences, kind_of
from eval.retrieval_config import ExtractConfig
from eval.search_index import Found, add_rows, build, describe, l2_normalised, read_index
from eval.setup import beside_weights, open_backbone

VECTORS, NAMES, INDEX, METADATA = "vectors.npy", "paths.txt", "index.faiss", "metadata.json"
FILES = (VECTORS, NAMES, INDEX, METADATA)
WHITENING = "whitening.npz"
NEW = ".new"
"""Subfolder with the files of a collection until all of them are complete."""
PARTS = ".parts"
"""Subfolder with the shards of an unfinished extraction."""
FORMAT = "dino-xcit-vectors-2"

_ROWS_AT_ONCE = 8192
_NOT_FINITE = "the vectors are not finite (NaN or infinite): the weights are damaged or their training diverged"

Metadata = dict[str, Any]


# ---- metadata


def read_metadata(path: Path) -> Metadata:
    """Read the metadata of a collection.

    Raises:
        Exception: of any type, as the JSON file is untrusted.
    """
    metadata: Metadata = json.loads(path.read_bytes())
    if metadata["format"] != FORMAT:
        raise ValueError(f"its format is {metadata['format']!r:.40}, expected {FORMAT}")
    text = str | None
    _check_types(metadata, {"count": int, "normalised": bool, "dtype": str, "weights": dict, "index": dict})
    _check_types(metadata["weights"], {"hash": str, "path": str, "network": text, "arch": text, "allowed": list | None})
    for part in parts_of(metadata):
        _check_types(part, {"url": str, "images": int, "fingerprint": str, "names_start_from": str})
    EvalTransform.from_dict(metadata["transform"])
    Descriptor.from_dict(metadata["descriptor"])
    if metadata["count"] != sum(map(images_in, parts_of(metadata))):
        raise ValueError(f"its count is {metadata['count']}, but its sources have another number of images")
    return metadata


def _check_types(values: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    for name, kind in types.items():
        if not isinstance(values.get(name), kind):
            raise TypeError(f"its {name} is of type {type(values.get(name)).__name__}")


def new_metadata(
    config: ExtractConfig, loaded: LoadedBackbone, source: Source, fingerprint: str, whitening: Whitening | None
) -> Metadata:
    """Build the metadata of an extraction. ``fingerprint`` is that of ``source``."""
    descriptor, dim = config.descriptor(), config.descriptor().width(width_of(loaded.backbone))
    feature, whitened = descriptor.describe(), None
    if whitening is not None:
        dim = whitening.projection.shape[1]
        feature += f"; PCA-whitened to {dim} numbers"
        whitened = {"hash": whitening.hash, "dimension": dim, "learned_on": whitening.learned_on}
    metadata: Metadata = {
        "format": FORMAT,
        "count": len(source),
        "dimension": dim,
        "normalised": config.normalise,
        "dtype": config.dtype,
        "feature": feature,
        "descriptor": descriptor.to_dict(),
        "whitening": whitened,
        "index": {"type": config.index_type},
        "weights": weights_metadata(loaded),
        "data": data_metadata(source, fingerprint) | {"names_start_from": os.getcwd()},
        "added": [],
        "transform": loaded.transform.to_dict(),
        "date": now(),
        "versions": versions(),
    }
    return dict(json.loads(json.dumps(metadata)))


def settings_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings that determine the vectors and the index, by name."""
    whitening = metadata["whitening"]
    descriptor = Descriptor.from_dict(metadata["descriptor"])
    return kind_of(metadata["weights"]["hash"], descriptor, metadata["normalised"]) | {
        "transform": metadata["transform"],
        "whitening": whitening["hash"] if whitening else None,
        "dtype": metadata["dtype"],
        "index_type": metadata["index"]["type"],
    }


def parts_of(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the metadata of a collection's sources, in the order of its rows."""
    return [metadata["data"], *metadata["added"]]


def images_in(part: Mapping[str, Any]) -> int:
    """Return the number of readable images of a source, which is its number of rows."""
    return int(part["images"]) - int((part.get("unreadable") or {"count": 0})["count"])


# ---- reading


@dataclass
class Collection:
    """A collection on disk."""

    folder: Path
    metadata: Metadata
    names: list[str]
    """[N], in the order of the rows."""
    vectors: NDArray[np.float16] | NDArray[np.float32]
    """[N, W], memory-mapped, in the stored precision."""
    index: faiss.Index
    whitening: Whitening | None = None

    @property
    def descriptor(self) -> Descriptor:
        """Descriptor of the vectors before whitening."""
        return Descriptor.from_dict(self.metadata["descriptor"])

    @property
    def normalised(self) -> bool:
        """Whether vectors have unit length."""
        return bool(self.metadata["normalised"])

    def prepared(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Convert outputs of :attr:`descriptor` [n, E] to vectors of the collection [n, W]."""
        width = len(self.whitening.mean) if self.whitening else self.vectors.shape[1]
        if rows.shape[1] != width:
            raise InputError(f"{self.folder} is damaged: {METADATA} does not match its {width}-dimensional vectors")
        return prepared(rows, self.normalised, self.whitening)

    def search(self, queries: NDArray[np.float32], top: int) -> Found:
        """Search the nearest rows by inner product: scores and row numbers, [Q, min(top, N)] each, best first.

        Args:
            queries: outputs of the collection's descriptor [Q, E]; whitened and normalised here if the collection is.
        """
        ready = self.prepared(queries)
        top, index = min(top, len(self.names)), faiss.downcast_index(self.index)
        if isinstance(index, faiss.IndexHNSW):  # finds at most as many as it visits
            index.hnsw.efSearch = max(index.hnsw.efSearch, top)
        scores, rows = index.search(ready, top)
        if self.normalised:  # float16 rounding may give cosines of 1.0001
            scores = np.clip(scores, -1, 1)
        return scores, rows


def prepared(rows: NDArray[np.float32], normalised: bool, whitening: Whitening | None) -> NDArray[np.float32]:
    """Convert vectors [n, E] to [n, W]: whiten, and if ``normalised``, scale to unit length before and after.

    Raises:
        InputError: a vector is not finite.
    """
    found = l2_normalised(rows) if normalised else np.ascontiguousarray(rows, dtype=np.float32)
    if whitening is not None:
        found = whitening(found)
        found = l2_normalised(found) if normalised else found
    if not np.isfinite(found).all():
        raise InputError(_NOT_FINITE)
    return found


def open_collection(folder: Path) -> Collection:
    """Open a collection.

    Raises:
        InputError: the collection is missing or incomplete, or its files are inconsistent.
    """
    missing = [name for name in FILES if not (folder / name).is_file()]
    if len(missing) == len(FILES):
        raise InputError(f"{folder} is no collection: expected a folder written by run_extract.py --output-dir")
    if missing:
        lacks = f"it lacks {', '.join(missing)}: repeat the run_extract.py command that wrote it"
        raise InputError(f"{folder} is no complete collection, {lacks}")
    try:
        metadata = read_metadata(folder / METADATA)
        names = read_names(folder / NAMES)
        vectors = np.load(folder / VECTORS, mmap_mode="r")
        index = read_index(folder / INDEX, metadata["index"]["type"])
        whitening = whitening_file.load(folder / WHITENING) if metadata["whitening"] else None
        if vectors.dtype != {"fp32": np.float32, "fp16": np.float16}[metadata["dtype"]]:
            raise ValueError(f"its vectors are of {vectors.dtype}, expected {metadata['dtype']}")
        if vectors.shape != (index.ntotal, index.d) or not index.ntotal == len(names) == metadata["count"]:
            counts = f"{len(names)} paths, {index.ntotal} in the index, {metadata['count']} in {METADATA}"
            raise ValueError(f"its files do not belong together: vectors {vectors.shape}, {counts}")
        if whitening and (whitening.hash != metadata["whitening"]["hash"] or whitening.projection.shape[1] != index.d):
            raise ValueError(f"{WHITENING} does not match {METADATA}")
    except Exception as error:  # the files are untrusted
        raise InputError(f"{folder} is damaged ({one_line(error)}): extract it again") from error
    return Collection(folder, metadata, names, vectors, index, whitening)


def read_names(path: Path) -> list[str]:
    """Read the names in a ``paths.txt``, one per row of the vectors."""
    # Not splitlines(), which also splits at characters that names may contain.
    return [unescape(line) for line in path.read_bytes().decode("utf-8", "surrogateescape").split("\n")[:-1]]


def escape(name: str) -> str:
    """Escape backslash, line feed and carriage return as in a Python string."""
    return name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


def unescape(line: str) -> str:
    """Invert :func:`escape`."""
    return "\\".join(part.replace("\\n", "\n").replace("\\r", "\r") for part in line.split("\\\\"))


# ---- writing


def write_collection(
    folder: Path,
    rows: Iterable[NDArray[np.float32]],
    names: Iterable[str],
    metadata: Metadata,
    whitening: Whitening | None = None,
) -> Metadata:
    """Write a collection in one pass over the vectors and build the index from the file.

    Args:
        rows: chunks [n, E] of descriptor outputs, in the order of ``names``; normalised if ``metadata["normalised"]``,
            and whitened.
        metadata: ``count`` is N, ``dimension`` is W.

    Returns:
        The written metadata, with the recall of the index.

    Raises:
        InputError: a vector is not finite or exceeds the range of float16.
    """
    ready = (prepared(chunk, metadata["normalised"], whitening) for chunk in _pieces(rows))
    return _write(folder, ready, names, metadata, whitening, None)


def add_to_collection(
    collection: Collection, rows: Iterable[NDArray[np.float32]], names: Iterable[str], part: Metadata
) -> Metadata:
    """Append images to a collection; arguments and return value as in :func:`write_collection`.

    Args:
        part: metadata of the images' source.
    """
    old = collection.vectors
    ready = itertools.chain(_pieces([old]), map(collection.prepared, _pieces(rows)))
    metadata = collection.metadata | {"added": [*collection.metadata["added"], part]}
    metadata |= {"count": len(old) + images_in(part), "dimension": old.shape[1]}
    names = [*collection.names, *names]
    return _write(collection.folder, ready, names, metadata, collection.whitening, collection.index)


def _write(
    folder: Path,
    rows: Iterator[NDArray[np.float32]],
    names: Iterable[str],
    metadata: Metadata,
    whitening: Whitening | None,
    index: faiss.Index | None,
) -> Metadata:
    """Write all files to a subfolder, metadata last, and rename them. ``index`` has the first rows already, if any."""
    half, kind, new = metadata["dtype"] == "fp16", metadata["index"]["type"], folder / NEW
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    write_rows(new / VECTORS, _in_half(rows) if half else rows, (metadata["count"], metadata["dimension"]), half)
    vectors = np.load(new / VECTORS, mmap_mode="r")
    lines = "".join(f"{escape(name)}\n" for name in names)
    atomic.write(new / NAMES, lambda file: file.write(lines.encode("utf-8", "surrogateescape")))
    if index is None:
        index = build(kind, vectors)
    else:
        add_rows(index, vectors[index.ntotal :])
    atomic.write(new / INDEX, lambda file: faiss.write_index(index, faiss.PyCallbackIOWriter(file.write)))  # type: ignore[attr-defined]
    if whitening is not None:
        whitening_file.save(whitening, new / WHITENING)
    metadata = metadata | {"index": describe(index, kind, vectors)}
    atomic.write_json(new / METADATA, metadata)
    finish_renaming(folder)
    return metadata


def finish_renaming(folder: Path) -> None:
    """Move complete files out of the subfolder :data:`NEW`, also after an interruption.

    The folder has no metadata during the move, so that it cannot be opened.
    """
    new = folder / NEW
    if (new / METADATA).exists():
        (folder / METADATA).unlink(missing_ok=True)
        if json.loads((new / METADATA).read_bytes())["whitening"] is None:
            (folder / WHITENING).unlink(missing_ok=True)
        for name in (VECTORS, NAMES, INDEX, WHITENING, METADATA):
            if (new / name).exists():
                os.replace(new / name, folder / name)
        atomic.flush_folder(folder)
    shutil.rmtree(new, ignore_errors=True)


def _pieces(arrays: Iterable[NDArray[Any]]) -> Iterator[NDArray[np.float32]]:
    for array in arrays:
        for start in range(0, len(array), _ROWS_AT_ONCE):
            yield np.asarray(array[start : start + _ROWS_AT_ONCE], dtype=np.float32)


def _in_half(rows: Iterator[NDArray[np.float32]]) -> Iterator[NDArray[np.float16]]:
    for chunk in rows:
        if np.abs(chunk).max(initial=0) > np.finfo(np.float16).max:
            raise InputError("a vector has a value beyond 65,504, the maximum of float16: give --dtype fp32")
        yield chunk.astype(np.float16)


# ---- the output folder


def claim(folder: Path, metadata: Metadata, source: Source, config: ExtractConfig, locks: ExitStack) -> str:
    """Lock a folder for an extraction and complete an interrupted rename. Call it on rank 0 only.

    Args:
        metadata: metadata of the extraction.
        locks: holds the lock until it is closed.

    Returns:
        A log message if there is nothing to do, else an empty string.

    Raises:
        InputError: the folder holds something else, is in use, or is not writable.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir is {folder}, which is not a folder")
    if os.path.realpath(folder) == os.path.realpath(source.url):  # data/folder.py ignores collections in subfolders
        raise InputError(f"output_dir is {folder}, the folder of the images: choose another, such as {folder}/vectors")
    work = folder / PARTS
    unfinished = work.exists() or (folder / NEW).exists()
    if not unfinished and (reason := _nothing_to_do(folder, metadata, source, config)):
        return reason
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create {folder}: {error.strerror}; choose another --output-dir") from error
    locks.enter_context(locked(work))
    finish_renaming(folder)
    reason = _nothing_to_do(folder, metadata, source, config)
    if reason:
        shutil.rmtree(work, ignore_errors=True)
    return reason


def _nothing_to_do(folder: Path, metadata: Metadata, source: Source, config: ExtractConfig) -> str:
    """Return a log message if there is nothing to do, else an empty string; refuse a folder with other content."""
    if not config.add and (config.overwrite or not any((folder / name).exists() for name in FILES)):
        return ""
    another = InputError(f"{folder} holds another extraction: choose another --output-dir, or --overwrite")
    try:
        collection = open_collection(folder)
    except InputError as error:
        if config.add:
            raise
        raise another from error
    here, print_here = settings_of(metadata), metadata["data"]["fingerprint"]
    changed = differences(settings_of(collection.metadata), here)
    prints = [part["fingerprint"] for part in parts_of(collection.metadata)]
    if not changed and print_here in (prints if config.add else prints[:1]):
        return f"already there: {folder} holds the vectors of these images; nothing to do"
    if not config.add:
        raise another
    if changed:
        raise InputError(f"cannot add to {folder}: {changed}; give the settings with which it was written")
    there = set(collection.names)
    if again := [name for name in map(source.name, range(len(source))) if name in there]:
        raise InputError(f"cannot add to {folder}: it already has an image {again[0]}; give other images")
    return ""


# ---- extraction in shards


class Part(Subset):
    """Consecutive images of a source with a given fingerprint, as computing it visits every file."""

    def __init__(self, source: Source, start: int, stop: int, fingerprint: str) -> None:
        super().__init__(source, np.arange(start, stop))
        self.url = f"{source.url} [{start:,} to {stop:,} of {len(source):,}]"
        self._fingerprint = hash_lines([fingerprint, f"{start} {stop}"])

    def fingerprint(self) -> str:
        return self._fingerprint


def extract_rows(
    folder: Path, loaded: LoadedBackbone, source: Source, fingerprint: str, device: torch.device, config: ExtractConfig
) -> tuple[list[NDArray[np.float32]], list[int]]:
    """Extract memory-mapped chunks of rows [n, E] of the readable images, and the indices of unreadable ones.

    Rows in the feature cache of k-NN or linear probe are reused. Others are extracted in shards. All ranks share the
    images of a shard, and complete shards are stored below ``folder`` for resuming. Batches are independent of ranks
    and shards, so the vectors are identical bit for bit.

    Raises:
        InputError: an image is unreadable and ``--unreadable`` is refuse, all images are unreadable, or a vector is not
            finite.
    """
    batch, descriptor = config.batch_size_per_gpu, config.descriptor()
    if config.cache:
        shape = (len(source), descriptor.width(width_of(loaded.backbone)))
        beside = beside_weights(config, config.cache_dir, "features")
        stored = find_kept(loaded.hash, fingerprint, shape, loaded.transform, beside, descriptor)
        if distributed.broadcast_from_main(stored is not None):
            return [] if stored is None else [stored], []
    size = max(1, round(config.shard_images / batch)) * batch
    if any(folder.glob("*/features.npy")):
        log.info(f"resuming from the shards of an earlier extraction in {folder}")
    rows, unreadable = [], []
    for start in range(0, len(source), size):
        part = Part(source, start, min(start + size, len(source)), fingerprint)
        try:
            found = cached(
                loaded.backbone, loaded.hash, part, loaded.transform, device, folder, batch, config.num_workers,
                descriptor, config.unreadable, whole=False,
            )  # fmt: skip
        except UndecodableImage as error:
            raise InputError(f"{error} (--unreadable skip skips unreadable images)") from error
        if not np.isfinite(found.features).all():
            raise InputError(_NOT_FINITE)
        rows.append(found.features)
        unreadable += (start + found.unreadable).tolist()
    if len(unreadable) == len(source):
        raise InputError(f"all {len(source):,} images of {source.url} are unreadable: check --data-path")
    return rows, unreadable


# ---- images and weights of a collection


class CollectedImages:
    """Images of a collection as a source, located by name in the original sources."""

    classes: tuple[str, ...] | None = None
    labels: NDArray[np.int64] | None = None

    def __init__(self, metadata: Metadata, names: Sequence[str]) -> None:
        """``names`` [N] are those of the collection."""
        self._names, self._parts = names, parts_of(metadata)
        self._ends = np.cumsum([images_in(part) for part in self._parts])
        self._opened: dict[int, tuple[Source, dict[str, int]]] = {}
        self.url = ", ".join(part["url"] for part in self._parts)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> tuple[Item, int | None]:
        """Read an image.

        Raises:
            InputError: the image has been moved or deleted.
        """
        number = int(np.searchsorted(self._ends, index, side="right"))
        part, name = self._parts[number], self._names[index]
        base = part["names_start_from"]
        with contextlib.chdir(base if os.path.isdir(base) else "."):
            if ":" not in part["url"].partition("/")[0] and os.path.isfile(name):  # avoids listing a large folder
                return Path(name).read_bytes(), None
            if number not in self._opened:
                source = open_source(part["url"])
                self._opened[number] = source, {source.name(row): row for row in range(len(source))}
            source, rows = self._opened[number]
            if name not in rows:
                raise InputError(f"the image {name} has been moved or deleted")
            return source.read(rows[name])

    def name(self, index: int) -> str:
        return self._names[index]

    def fingerprint(self) -> str:
        return hash_lines(self._names)


def open_backbone_of(collection: Collection, config: BackboneConfig) -> tuple[LoadedBackbone, torch.device]:
    """Open the backbone of a collection with its transform.

    Args:
        config: ``weights`` is the current path of the collection's weights. Default: the path at the extraction. Keys
            allowed at the extraction are allowed again.

    Raises:
        InputError: the weights are invalid or not those of the collection.
    """
    made_by = collection.metadata["weights"]
    network = made_by.get("network")
    allowed = [word.split(" ", 1) for word in made_by.get("allowed") or []]
    config = dataclasses.replace(
        config,
        weights=config.weights or made_by["path"],
        network=network if network in ("teacher", "student") else config.network,
        arch=config.arch or made_by.get("arch") or "",
        allow_missing=(*config.allow_missing, *(key for kind, key in allowed if kind == "missing")),
        allow_unexpected=(*config.allow_unexpected, *(key for kind, key in allowed if kind == "unexpected")),
    )
    loaded, device = open_backbone(config, EvalTransform.from_dict(collection.metadata["transform"]), rgb=False)
    if loaded.hash != made_by["hash"]:
        raise InputError(f"{loaded.path} is not the backbone of {collection.folder}: give its --weights")
    return loaded, device
