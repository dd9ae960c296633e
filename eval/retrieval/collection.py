"""Collections: a folder with the vectors of images, their names, a search index, and what they were made of.

``vectors.npy`` has a row an image, ``paths.txt`` the images' names in that order, ``index.faiss`` the search index,
``card.json`` the metadata, and ``whitening.npz`` the whitening where there is one.

N images, E features of a backbone's descriptor, W features of a stored vector (E without whitening).
"""

from __future__ import annotations

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
from dino_xcit.data.storage import is_remote
from dino_xcit.errors import InputError, one_line
from dino_xcit.runtime import atomic, distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.run_lock import locked
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import LoadedBackbone
from eval.config import BackboneConfig
from eval.features import cached, find_kept, width_of, write_rows
from eval.index import MIN_IVFPQ, Found, WithVectors, add_rows, build, describe, read_index, unit_rows
from eval.pooling import CLASS_TOKEN, Descriptor
from eval.results import data_card, now, versions, weights_card
from eval.retrieval import whitening as whitening_file
from eval.retrieval.whitening import Whitening, differences, kind_of
from eval.retrieval_config import ExtractConfig
from eval.setup import beside_weights, open_backbone

VECTORS, NAMES, INDEX, METADATA = "vectors.npy", "paths.txt", "index.faiss", "card.json"
FILES = (VECTORS, NAMES, INDEX, METADATA)
WHITENING = "whitening.npz"
NEW = ".new"
"""Inside the folder: the files of a collection until all of them are there."""
PARTS = ".parts"
"""Inside the folder: the parts of an extraction that is under way."""
FORMATS = ("dino-xcit-vectors-1", "dino-xcit-vectors-2")
"""The first had the class token alone, float32, and an exact index."""

_ROWS_AT_ONCE = 8192
_NOT_FINITE = (
    "the vectors are not finite numbers (NaN or infinite): the weights are damaged, or their training diverged"
)

Metadata = dict[str, Any]


# ---- metadata


def read_metadata(path: Path) -> Metadata:
    """A collection's metadata; what the first format lacks is filled in.

    Raises:
        Exception: of any type where the file is damaged: it is JSON that anybody may have written.
    """
    metadata: Metadata = {
        "descriptor": CLASS_TOKEN.to_dict(), "dtype": "fp32", "index": {"type": "flat"}, "whitening": None, "added": [],
    } | json.loads(path.read_bytes())  # fmt: skip
    if metadata["format"] not in FORMATS:
        raise ValueError(f"its format is {metadata['format']!r:.40}, expected one of {', '.join(FORMATS)}")
    text = str | None
    _check_types(metadata, {"count": int, "normalised": bool, "dtype": str, "weights": dict, "index": dict})
    _check_types(metadata["weights"], {"hash": str, "path": str, "network": text, "arch": text, "allowed": list | None})
    for part in parts_of(metadata):
        _check_types(part, {"url": str, "images": int, "fingerprint": str})
        _check_types(part, {"absolute_url": text, "names_start_from": text})
    EvalTransform.from_dict(metadata["transform"])
    Descriptor.from_dict(metadata["descriptor"])
    if metadata["count"] != sum(map(images_in, parts_of(metadata))):
        raise ValueError(f"its count is {metadata['count']}, and its sources have other numbers of images")
    return metadata


def _check_types(values: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    for name, kind in types.items():
        if not isinstance(values.get(name), kind):
            raise TypeError(f"its {name} is of type {type(values.get(name)).__name__}")


def new_metadata(
    config: ExtractConfig, loaded: LoadedBackbone, source: Source, fingerprint: str, whitening: Whitening | None
) -> Metadata:
    """What an extraction is of. ``loaded``'s transform prepares the images; ``fingerprint`` is the source's."""
    descriptor, dim = config.descriptor(), config.descriptor().width(width_of(loaded.backbone))
    feature, whitened = descriptor.describe(), None
    if whitening is not None:
        dim = whitening.projection.shape[1]
        feature += f"; PCA-whitened to {dim} numbers"
        whitened = {"hash": whitening.hash, "dimension": dim, "learned_on": whitening.learned_on}
    place = {"absolute_url": _absolute(source.url), "names_start_from": os.getcwd()}
    metadata: Metadata = {
        "format": FORMATS[-1],
        "count": len(source),
        "dimension": dim,
        "normalised": config.normalise,
        "dtype": config.dtype,
        "feature": feature,
        "descriptor": descriptor.to_dict(),
        "whitening": whitened,
        "index": {"type": config.index_type},
        "weights": weights_card(loaded),
        "data": data_card(source, fingerprint) | place,
        "added": [],
        "transform": loaded.transform.to_dict(),
        "date": now(),
        "versions": versions(),
    }
    return dict(json.loads(json.dumps(metadata)))


def _absolute(url: str) -> str:
    """A source's URL, so that it can be opened from another folder."""
    scheme, _, rest = url.partition(":")
    path = os.path.abspath(os.path.expanduser(rest))
    if (scheme in ("tar", "parquet", "imagenet") and not is_remote(rest)) or (scheme == "hf" and os.path.isdir(path)):
        return f"{scheme}:{path}"
    return os.path.abspath(url) if os.path.exists(url) else url


def settings_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """All but the images that decides what is in a collection, by name."""
    whitening = metadata["whitening"]
    descriptor = Descriptor.from_dict(metadata["descriptor"])
    return kind_of(metadata["weights"]["hash"], descriptor, metadata["normalised"]) | {
        "transform": metadata["transform"],
        "whitening": whitening["hash"] if whitening else None,
        "dtype": metadata["dtype"],
        "index_type": metadata["index"]["type"],
    }


def parts_of(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sources whose images a collection has, in the order of its rows."""
    return [metadata["data"], *metadata["added"]]


def place_of(part: Mapping[str, Any]) -> str:
    """The URL of a source, from whichever folder it is opened."""
    here = part.get("names_start_from") == os.getcwd()
    return str(part["url"] if here else part.get("absolute_url") or part["url"])


def images_in(part: Mapping[str, Any]) -> int:
    """How many rows a collection has of a source: its images without those that could not be read."""
    return int(part["images"]) - int((part.get("unreadable") or {"count": 0})["count"])


# ---- reading


@dataclass
class Collection:
    """What :func:`write_collection` wrote."""

    folder: Path
    metadata: Metadata
    names: list[str]
    """[N], in the order of the rows."""
    vectors: NDArray[np.float16] | NDArray[np.float32]
    """[N, W], memory-mapped, in the precision that they are kept in."""
    index: faiss.Index
    whitening: Whitening | None = None

    @property
    def descriptor(self) -> Descriptor:
        """How the vector of an image is made, before whitening."""
        return Descriptor.from_dict(self.metadata["descriptor"])

    @property
    def normalised(self) -> bool:
        """Whether vectors have length 1."""
        return bool(self.metadata["normalised"])

    def prepared(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Vectors [some, E] as :attr:`descriptor` gives them to [some, W] as the collection keeps them."""
        width = len(self.whitening.mean) if self.whitening else self.vectors.shape[1]
        if rows.shape[1] != width:
            raise InputError(f"{self.folder} is damaged: it has vectors of {width} numbers, {METADATA} says otherwise")
        return prepared(rows, self.normalised, self.whitening)

    def search(self, queries: NDArray[np.float32], top: int) -> Found:
        """The nearest rows by inner product: scores and row numbers, [queries, min(top, N)] each, best first.

        Args:
            queries: [queries, E], as the collection's descriptor gives them; whitened and normalised here if the
                collection's vectors are.
        """
        ready = self.prepared(queries)
        scores, rows = WithVectors(self.index, self.vectors).search(ready, min(top, len(self.names)))
        if self.normalised:  # cosines: the half precision of kept vectors can make 1.0001
            scores = np.clip(scores, -1, 1)
        return scores, rows


def prepared(rows: NDArray[np.float32], normalised: bool, whitening: Whitening | None) -> NDArray[np.float32]:
    """Vectors [some, E] as they are compared, [some, W]: to length 1 if ``normalised``, before whitening and after it.

    Raises:
        InputError: they are not finite numbers.
    """
    found = unit_rows(rows) if normalised else np.ascontiguousarray(rows, dtype=np.float32)
    if whitening is not None:
        found = whitening(found)
        found = unit_rows(found) if normalised else found
    if not np.isfinite(found).all():
        raise InputError(_NOT_FINITE)
    return found


def open_collection(folder: Path) -> Collection:
    """Read what :func:`write_collection` wrote.

    Raises:
        InputError: it is not there, not complete, or its files disagree.
    """
    missing = [name for name in FILES if not (folder / name).is_file()]
    if len(missing) == len(FILES):
        raise InputError(f"{folder} is no collection: expected a folder that run_extract.py --output-dir wrote")
    if missing:
        lacks = f"it lacks {', '.join(missing)}: run the run_extract.py command that wrote it again"
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
            raise ValueError(f"{WHITENING} is another than {METADATA} names")
    except Exception as error:  # anybody may have written it: anything may be wrong
        raise InputError(f"{folder} is damaged ({one_line(error)}): extract it anew") from error
    return Collection(folder, metadata, names, vectors, index, whitening)


def read_names(path: Path) -> list[str]:
    """The names in a ``paths.txt``, one a row of the vectors."""
    # Not splitlines(): that would also split at characters which are legal in names.
    return [unescape(line) for line in path.read_bytes().decode("utf-8", "surrogateescape").split("\n")[:-1]]


def escape(name: str) -> str:
    """A name on one line: backslash, line feed and carriage return as in a Python string."""
    return name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


def unescape(line: str) -> str:
    """The inverse of :func:`escape`."""
    return "\\".join(part.replace("\\n", "\n").replace("\\r", "\r") for part in line.split("\\\\"))


# ---- writing


def write_collection(
    folder: Path,
    rows: Iterable[NDArray[np.float32]],
    names: Iterable[str],
    metadata: Metadata,
    whitening: Whitening | None = None,
) -> Metadata:
    """Write a collection; the vectors pass through once, and the index is built from the file.

    Args:
        rows: [some, E] at a time, in the order of ``names``, as the backbone gives them; they are brought to length 1
            if ``metadata["normalised"]``, and whitened.
        metadata: ``count`` is N, ``dimension`` W.

    Returns:
        The metadata as it was written, with the index's recall.

    Raises:
        InputError: the folder cannot be written to, or a vector cannot be kept.
    """
    ready = (prepared(chunk, metadata["normalised"], whitening) for chunk in _pieces(rows))
    return _write(folder, ready, names, metadata, whitening, None)


def add_to_collection(
    collection: Collection, rows: Iterable[NDArray[np.float32]], names: Iterable[str], part: Metadata
) -> Metadata:
    """Write a collection anew with more images behind those that it has; arguments and return value as above.

    Args:
        part: the metadata of the images' source.
    """
    old = collection.vectors
    ready = itertools.chain(_pieces([old]), map(collection.prepared, _pieces(rows)))
    metadata = collection.metadata | {"format": FORMATS[-1], "added": [*collection.metadata["added"], part]}
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
    """Write all files aside, metadata last, then rename them. ``index``: one that holds the first of the rows."""
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
    """Rename the files of a collection that are all written, also where a killed process had begun to.

    The folder has no metadata meanwhile, so that nothing can open it.
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
            raise InputError("a vector has a number beyond 65,504, where float16 ends: use --dtype fp32")
        yield chunk.astype(np.float16)


# ---- the folder that an extraction goes into


def claim(folder: Path, metadata: Metadata, source: Source, config: ExtractConfig, locks: ExitStack) -> str:
    """Lock a folder for an extraction, and finish what a killed process had all files of. Call it on one process.

    Args:
        metadata: what is to be extracted.
        locks: holds the folder until it is closed.

    Returns:
        Why there is nothing to do, for the screen; empty: go on.

    Raises:
        InputError: the folder holds something else, is in use, or cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir is {folder}, which is no folder to write to")
    if os.path.realpath(folder) == os.path.realpath(source.url):  # a folder within it is no data, see data/folder.py
        raise InputError(f"output_dir is {folder}, the folder of the images: choose another, such as {folder}/vectors")
    refuse_too_few(len(source), config)
    work = folder / PARTS
    under_way = work.exists() or (folder / NEW).exists()
    if not under_way and (reason := _nothing_to_do(folder, metadata, source, config)):
        return reason  # nothing is created
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


def refuse_too_few(images: int, config: ExtractConfig) -> None:
    """Raise InputError where so many images are too few for a new index of the type that is wanted."""
    if config.index_type == "ivfpq" and images < MIN_IVFPQ and not config.add:
        raise InputError(f"index_type is ivfpq, which takes {MIN_IVFPQ:,} images or more, found {images:,}")


def _nothing_to_do(folder: Path, metadata: Metadata, source: Source, config: ExtractConfig) -> str:
    """Why, or empty. Refuses a folder that holds something else."""
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
        raise InputError(f"cannot add to {folder}: {changed}; repeat the settings that it was written with")
    there = set(collection.names)
    if again := [name for name in map(source.name, range(len(source))) if name in there]:
        raise InputError(f"cannot add to {folder}: it has an image {again[0]} already; give other images")
    return ""


# ---- an extraction in parts


class Part(Subset):
    """Consecutive images of a source, whose fingerprint is known: to take it looks at every file."""

    def __init__(self, source: Source, start: int, stop: int, fingerprint: str) -> None:
        super().__init__(source, np.arange(start, stop))
        self.url = f"{source.url} [{start:,} to {stop:,} of {len(source):,}]"
        self._fingerprint = hash_lines([fingerprint, f"{start} {stop}"])

    def fingerprint(self) -> str:
        return self._fingerprint


def extract_rows(
    folder: Path, loaded: LoadedBackbone, source: Source, fingerprint: str, device: torch.device, config: ExtractConfig
) -> tuple[list[NDArray[np.float32]], list[int]]:
    """The rows [some, E] of the images that can be read, memory-mapped, and the numbers of those that cannot.

    Rows that k-NN or probe kept beside the weights are used again. Others are made in parts, of which the processes
    share the images. A part is kept below ``folder`` when it is whole, and is not made again. Which images are in a
    batch depends on neither the processes nor the parts, so that the bits do not either.

    Raises:
        InputError: an image cannot be read, and shall be; or the vectors are not finite numbers.
    """
    batch, descriptor = config.batch_size_per_gpu, config.descriptor()
    if config.cache:
        shape = (len(source), descriptor.width(width_of(loaded.backbone)))
        beside = beside_weights(config, config.cache_dir, "features")
        kept = find_kept(loaded.hash, fingerprint, shape, loaded.transform, beside, descriptor)
        if distributed.broadcast_from_main(kept is not None):
            return [] if kept is None else [kept], []
    size = max(1, round(config.shard_images / batch)) * batch
    if any(folder.glob("*/features.npy")):
        log.info(f"resuming: parts of an earlier extraction are in {folder}")
    rows, unreadable = [], []
    for start in range(0, len(source), size):
        part = Part(source, start, min(start + size, len(source)), fingerprint)
        try:
            found = cached(
                loaded.backbone, loaded.hash, part, loaded.transform, device, folder, batch, config.num_workers,
                descriptor, config.unreadable, whole=False,
            )  # fmt: skip
        except UndecodableImage as error:
            raise InputError(f"{error} (--unreadable skip leaves such images out)") from error
        if not np.isfinite(found.features).all():
            raise InputError(_NOT_FINITE)
        rows.append(found.features)
        unreadable += (start + found.unreadable).tolist()
    if len(unreadable) == len(source):
        raise InputError(f"none of the {len(source):,} images of {source.url} can be read: check --data-path")
    refuse_too_few(len(source) - len(unreadable), config)
    return rows, unreadable


# ---- the images and the weights of a collection, found again


class CollectedImages:
    """The images of a collection as a source: found again by their names in the sources it was made of."""

    classes: tuple[str, ...] | None = None
    labels: NDArray[np.int64] | None = None

    def __init__(self, metadata: Metadata, names: Sequence[str]) -> None:
        """``names`` [N], as the collection has them."""
        self._names, self._parts = names, parts_of(metadata)
        self._ends = np.cumsum([images_in(part) for part in self._parts])
        self._opened: dict[int, tuple[Source, dict[str, int]]] = {}
        self.url = ", ".join(part["url"] for part in self._parts)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> tuple[Item, int | None]:
        """Raises:
        InputError: the image is not where it was.
        """
        part, base = self._part(index)
        path = Path(base, self._names[index])
        if ":" not in part["url"].partition("/")[0] and path.is_file():  # no folder of millions has to be listed
            return path.read_bytes(), None
        source, place = self._find(index)
        return source.read(place)

    def name(self, index: int) -> str:
        return self._names[index]

    def fingerprint(self) -> str:
        return hash_lines(self._names)

    def _find(self, index: int) -> tuple[Source, int]:
        part, base = self._part(index)
        key = id(part)
        if key not in self._opened:
            source = open_source(place_of(part))
            self._opened[key] = source, {os.path.normpath(source.name(row)): row for row in range(len(source))}
        source, rows = self._opened[key]
        for name in (self._names[index], os.path.join(base, self._names[index])):
            if (row := rows.get(os.path.normpath(name))) is not None:
                return source, row
        raise InputError(f"the image {self._names[index]} is not where it was")

    def _part(self, index: int) -> tuple[dict[str, Any], str]:
        """The source of an image, and the folder from which its relative names start."""
        part = self._parts[int(np.searchsorted(self._ends, index, side="right"))]
        return part, part.get("names_start_from") or "."


def open_backbone_of(collection: Collection, config: BackboneConfig) -> tuple[LoadedBackbone, torch.device]:
    """The backbone that made a collection, with its preparation of images, on this process's device.

    Args:
        config: its weights, where given, have to be those of the collection, and may lie elsewhere now. Keys that were
            allowed to be missing or left over then may be so again.

    Raises:
        InputError: the weights cannot be used, or are others than those that made the collection.
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
    loaded, device = open_backbone(config, EvalTransform.from_dict(collection.metadata["transform"]))
    if loaded.hash != made_by["hash"]:
        raise InputError(f"{loaded.path} did not make the vectors in {collection.folder}: --weights names the file")
    return loaded, device
