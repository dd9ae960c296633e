"""Collections for retrieval: vectors, row-aligned names, an index, and a card that says what they are.

N images, E features of a backbone's descriptor, W features of a stored vector (E without whitening).
"""

from __future__ import annotations

import errno
import functools
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from dino_xcit.errors import InputError, one_line
from dino_xcit.runtime import atomic
from eval.collection import index as search_index
from eval.collection import whitening as whitening_file
from eval.collection.card import FORMAT, same
from eval.collection.card_file import read_card
from eval.collection.index import IndexType
from eval.collection.paths_file import read_names, write_names
from eval.collection.whitening import Whitening
from eval.features import write_rows
from eval.pooling import CLASS_TOKEN, Descriptor
from eval.results import Card, write_json
from eval.search import unit_rows

VECTORS, NAMES, INDEX, CARD = "vectors.npy", "paths.txt", "index.faiss", "card.json"
FILES = (VECTORS, NAMES, INDEX, CARD)
WHITENING = "whitening.npz"
"""Only there where the vectors are whitened."""

NEW = ".new"
"""Inside the folder: the files of a collection until all of them are there."""
_ROWS_AT_ONCE = 8192


@dataclass
class Collection:
    """What :func:`write_collection` wrote."""

    folder: Path
    card: dict[str, Any]
    names: list[str]
    """[N], in the order of the rows."""
    index: faiss.Index
    whitening: Whitening | None = None

    @functools.cached_property
    def vectors(self) -> NDArray[np.float16] | NDArray[np.float32]:
        """[N, W], memory-mapped, in the numbers that they are kept in."""
        vectors: NDArray[np.float16] | NDArray[np.float32] = np.load(self.folder / VECTORS, mmap_mode="r")
        return vectors

    @property
    def descriptor(self) -> Descriptor:
        """How the vector of an image is made, before whitening."""
        return Descriptor.from_dict(self.card.get("descriptor", CLASS_TOKEN.to_dict()))

    @property
    def width(self) -> int:
        """E: numbers in an image's vector before whitening."""
        return len(self.whitening.mean) if self.whitening else int(self.vectors.shape[1])

    def prepared(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """What became of the images' vectors on their way into the collection: [queries, E] to [queries, W]."""
        return prepared(queries, bool(self.card["normalised"]), self.whitening)

    def search(self, queries: NDArray[np.float32], top: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The nearest rows by inner product: scores and row numbers, [queries, min(top, N)] each, best first.

        Args:
            queries: [queries, E], as the collection's descriptor gives them; whitened and normalised here if the
                collection's vectors are.
        """
        scores, rows = search_index.search(self.index, self.vectors, self.prepared(queries), min(top, len(self.names)))
        if self.card["normalised"]:  # cosines: the half precision of kept vectors can make 1.0001
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
        raise InputError(
            "the vectors are not finite numbers (NaN or infinite): the weights are damaged, or their training diverged"
        )
    return found


def existing(folder: Path, card: Card) -> str | None:
    """What ``folder`` holds: ``same`` as ``card`` describes, ``other``, or None.

    Raises:
        InputError: ``folder`` is a file, or cannot be looked into.
    """
    try:
        there = set(os.listdir(folder)) & set(FILES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"output_dir is {folder}, which is no folder to write to: {error.strerror}") from error
    if not there:
        return None
    if there != set(FILES):
        return "other"
    try:
        return "same" if same(read_card(folder / CARD), card) else "other"
    except (OSError, ValueError):
        return "other"


# ---- writing


def write_collection(
    folder: Path,
    rows: Iterator[NDArray[np.float32]],
    names: Iterable[str],
    shape: tuple[int, int],
    card: Card,
    whitening: Whitening | None = None,
) -> dict[str, Any]:
    """Write all files aside, then rename them; the card last, so that a folder with a card is complete.

    The vectors pass through once; the index is then built from the file. A process that is killed leaves what was
    there before, or what :func:`finish_renaming` completes.

    Args:
        rows: [some, E] at a time, in the order of ``names``, as the backbone gives them; they are brought to length 1
            if ``card["normalised"]``, and whitened.
        shape: (N, W) in all.
        card: what the vectors are; ``dtype`` is fp32 or fp16, ``index`` names its ``type``.

    Returns:
        The card as it was written, with the index's recall.

    Raises:
        InputError: the folder cannot be made or written to, or a vector cannot be kept.
    """
    ready = (prepared(chunk, bool(card["normalised"]), whitening) for chunk in rows)
    return _write(folder, ready, names, shape, card, whitening, None)


def add_to_collection(
    collection: Collection, rows: Iterator[NDArray[np.float32]], names: Iterable[str], count: int, data: Card
) -> dict[str, Any]:
    """Write a collection anew with more images behind those that it has.

    Args:
        rows: as for :func:`write_collection`, ``count`` in all.
        data: card of the source that they are from.

    Returns:
        The card as it was written.
    """
    card = collection.card
    total, width = len(collection.names) + count, collection.vectors.shape[1]

    def ready() -> Iterator[NDArray[np.float32]]:
        for start in range(0, len(collection.vectors), _ROWS_AT_ONCE):
            yield collection.vectors[start : start + _ROWS_AT_ONCE].astype(np.float32)
        for chunk in rows:
            yield collection.prepared(chunk)

    everything = card | {"format": FORMAT, "count": total, "added": [*card.get("added", []), data]}
    return _write(
        collection.folder, ready(), [*collection.names, *names], (total, width), everything, collection.whitening,
        collection.index,
    )  # fmt: skip


def _write(
    folder: Path,
    rows: Iterator[NDArray[np.float32]],
    names: Iterable[str],
    shape: tuple[int, int],
    card: Card,
    whitening: Whitening | None,
    index: faiss.Index | None,
) -> dict[str, Any]:
    """``rows`` as they are kept; ``index``: one that holds the first of them."""
    half, stated = card.get("dtype", "fp32") == "fp16", card.get("index")
    kind: IndexType = stated["type"] if isinstance(stated, dict) else "flat"
    new = folder / NEW
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create {folder}: {error.strerror}; choose another --output-dir") from error
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        write_rows(new / VECTORS, _in_half(rows) if half else rows, shape, half)
        vectors = np.load(new / VECTORS, mmap_mode="r")
        write_names(new / NAMES, names)
        if index is None:
            index = search_index.build_index(kind, vectors)
        else:
            search_index.add_rows(index, vectors[index.ntotal :])
        _write_index(new / INDEX, index)
        if whitening is not None:
            whitening_file.save(whitening, new / WHITENING)
        whole = dict(card) | {"index": search_index.describe(index, kind, vectors)}
        write_json(new / CARD, whole)
        atomic.flush_folder(new)
        finish_renaming(folder)
    except PermissionError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; choose another --output-dir") from error
    finally:
        if not (new / CARD).exists():
            shutil.rmtree(new, ignore_errors=True)
    return whole


def is_half_renamed(folder: Path) -> bool:
    """Whether a process was killed when all files were written, before all had their names."""
    try:
        read_card(folder / NEW / CARD)
    except (OSError, ValueError):  # damaged since, it is worth nothing
        return False
    return True


def finish_renaming(folder: Path) -> None:
    """Give the files of a collection that was written aside their names, also where a killed process had begun to.

    Nobody can open the folder meanwhile: it has no card.
    """
    new = folder / NEW
    (folder / CARD).unlink(missing_ok=True)
    if read_card(new / CARD).get("whitening") is None:
        (folder / WHITENING).unlink(missing_ok=True)
    for name in (VECTORS, NAMES, INDEX, WHITENING, CARD):
        if (new / name).exists():
            os.replace(new / name, folder / name)
    atomic.flush_folder(folder)
    shutil.rmtree(new, ignore_errors=True)


def _in_half(rows: Iterator[NDArray[np.float32]]) -> Iterator[NDArray[np.float16]]:
    for chunk in rows:
        with np.errstate(over="ignore"):
            half = chunk.astype(np.float16)
        if not np.isfinite(half).all():
            raise InputError(
                f"a vector has the number {np.abs(chunk).max():.3g}, and float16 ends at 65,504: use --dtype fp32, or "
                "leave out --no-normalise"
            )
        yield half


# ---- reading


def open_collection(folder: Path) -> Collection:
    """Read what :func:`write_collection` wrote.

    Raises:
        InputError: it is not there, not complete, or its files disagree.
    """
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing and is_half_renamed(folder):
        raise InputError(
            f"{folder} was left while its files got their names: run the run_extract.py command that wrote it again"
        )
    if missing:
        raise InputError(
            f"{folder} is no complete collection, it lacks {', '.join(missing)}: write one with run_extract.py "
            f"--weights ... --data-path ... --output-dir {folder}"
        )
    try:
        card = read_card(folder / CARD)
        names = read_names(folder / NAMES)
        stated = card.get("index")
        vectors = _map_vectors(folder / VECTORS, card.get("dtype", "fp32"))
        index = search_index.read_index(folder / INDEX, stated["type"] if stated else "flat", vectors)
        whitening = whitening_file.load(folder / WHITENING) if card.get("whitening") else None
        collection = Collection(folder, card, names, index, whitening)
        counts = {
            "card": card["count"],
            "paths": len(names),
            "index": int(index.ntotal),
            "vectors": len(vectors),
        }
        if vectors.shape[1] != index.d:
            raise ValueError(f"vectors of {vectors.shape[1]} numbers, an index of {index.d}")
        if whitening and (whitening.hash != card["whitening"]["hash"] or whitening.projection.shape[1] != index.d):
            raise ValueError(f"{WHITENING} is another than the card names")
    except (OSError, ValueError, RuntimeError, EOFError, MemoryError) as error:  # faiss's are RuntimeErrors
        raise InputError(f"{folder} is damaged ({one_line(error)[:150]}): extract it anew") from error
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} in the {name}" for name, count in counts.items())
        raise InputError(f"the files in {folder} do not belong together ({found} images): extract it anew")
    return collection


def _map_vectors(path: Path, dtype: str) -> NDArray[np.float16] | NDArray[np.float32]:
    """The array of a ``.npy`` file, memory-mapped, so that no more of it is believed than the file is long.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no table of the numbers that ``dtype`` (fp32, fp16) says.
    """
    try:
        found = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # NumPy reads the header as Python's literals, of which anything may be wrong
        raise ValueError(f"{path.name} is no array: {one_line(error)}") from error
    if found.ndim != 2 or found.dtype != {"fp32": np.float32, "fp16": np.float16}[dtype]:
        raise ValueError(f"{path.name} is an array {found.shape} of {found.dtype}, expected a table of {dtype}")
    return found


def _write_index(path: Path, index: faiss.Index) -> None:
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    with open(path, "rb") as file:
        os.fsync(file.fileno())
