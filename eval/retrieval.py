"""Collections for retrieval: vectors, row-aligned names, an exact index, and a card that says what they are.

N images, D features.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from dino_xcit.errors import InputError
from eval.features import write_rows
from eval.knn import unit_rows
from eval.protocol import Card, write_json

VECTORS, NAMES, INDEX, CARD = "vectors.npy", "paths.txt", "index.faiss", "card.json"
FILES = (VECTORS, NAMES, INDEX, CARD)

FORMAT = "dino-xcit-vectors-1"


@dataclass
class Collection:
    """What :func:`write_collection` wrote."""

    folder: Path
    card: dict[str, Any]
    names: list[str]
    """[N], in the order of the rows."""
    index: faiss.Index

    def search(self, queries: NDArray[np.float32], top: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The nearest rows by inner product: scores and row numbers, [queries, min(top, N)] each, best first.

        Args:
            queries: [queries, D], as the backbone gives them; normalised here if the collection's vectors are.
        """
        rows = unit_rows(queries) if self.card["normalised"] else np.ascontiguousarray(queries, dtype=np.float32)
        scores, found = self.index.search(rows, min(top, len(self.names)))
        return scores, found


def existing(folder: Path, card: Card) -> str | None:
    """What ``folder`` holds: ``same`` as ``card`` describes, ``other``, or None.

    Raises:
        InputError: ``folder`` is a file, or cannot be looked into.
    """
    try:
        there = sorted(set(os.listdir(folder)) & set(FILES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"output_dir is {folder}, which is no folder to write to: {error.strerror}") from error
    if not there:
        return None
    if there != sorted(FILES):
        return "other"
    try:
        stored = json.loads((folder / CARD).read_text(encoding="utf-8"))
        return "same" if all(_deciding(stored)[name] == value for name, value in _deciding(card).items()) else "other"
    except (ValueError, KeyError, TypeError):
        return "other"


def _deciding(card: dict[str, Any]) -> dict[str, Any]:
    """The part of a card that decides what the vectors are, as JSON has it."""
    parts = {
        "format": card["format"],
        "weights": card["weights"]["hash"],
        "data": card["data"]["fingerprint"],
        "transform": card["transform"],
        "normalised": card["normalised"],
    }
    plain: dict[str, Any] = json.loads(json.dumps(parts))
    return plain


def write_collection(
    folder: Path, rows: Iterator[NDArray[np.float32]], names: Iterable[str], shape: tuple[int, int], card: Card
) -> None:
    """Write all four files aside, then rename them; the card last, so that a folder with a card is complete.

    The vectors pass through once and are held only by the index.

    Args:
        rows: [some, D] at a time, in the order of ``names``; they are scaled to length 1 if ``card["normalised"]``.
        shape: (N, D) in all.

    Raises:
        InputError: the folder cannot be made or written to.
    """
    index = faiss.IndexFlatIP(shape[1])

    def indexed() -> Iterator[NDArray[np.float32]]:
        for chunk in rows:
            vectors = unit_rows(chunk) if card["normalised"] else chunk
            index.add(vectors)
            yield vectors

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create {folder}: {error.strerror}; choose another --output-dir") from error
    aside = {name: folder / f".{name}.tmp" for name in FILES}
    try:
        write_rows(aside[VECTORS], indexed(), shape)
        _write_names(aside[NAMES], names)
        _write_index(aside[INDEX], index)
        write_json(aside[CARD], card)
        (folder / CARD).unlink(missing_ok=True)
        for name in FILES:
            os.replace(aside[name], folder / name)
    except PermissionError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; choose another --output-dir") from error
    finally:
        for path in aside.values():
            path.unlink(missing_ok=True)


def open_collection(folder: Path) -> Collection:
    """Read what :func:`write_collection` wrote.

    Raises:
        InputError: it is not there, not complete, or its files disagree.
    """
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder} is no complete collection, it lacks {', '.join(missing)}: write one with run_extract.py "
            f"--weights ... --data-path ... --output-dir {folder}"
        )
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        names = read_names(folder / NAMES)
        index = faiss.read_index(str(folder / INDEX))
        counts = {"card": int(card["count"]), "paths": len(names), "index": int(index.ntotal)}
        card["weights"]["hash"], card["weights"]["path"], card["transform"], card["normalised"], card["data"]["url"]
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()
        raise InputError(f"{folder} is damaged ({reason[0][:150] if reason else error}): extract it anew") from error
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} in the {name}" for name, count in counts.items())
        raise InputError(f"the files in {folder} do not belong together ({found} images): extract it anew")
    return Collection(folder, card, names, index)


def escape(name: str) -> str:
    """A name on one line: backslash, line feed and carriage return as in a Python string."""
    return name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


def unescape(line: str) -> str:
    """The inverse of :func:`escape`."""
    parts = line.split("\\\\")
    return "\\".join(part.replace("\\n", "\n").replace("\\r", "\r") for part in parts)


def read_names(path: Path) -> list[str]:
    """The names in a ``paths.txt``, one a row of the vectors."""
    # Not splitlines(): that would also split at characters which are legal in names.
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    return [unescape(line) for line in text.split("\n")[:-1]]


def _write_names(path: Path, names: Iterable[str]) -> None:
    with open(path, "wb") as file:
        for name in names:
            file.write(escape(name).encode("utf-8", "surrogateescape") + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _write_index(path: Path, index: faiss.Index) -> None:
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    with open(path, "rb") as file:
        os.fsync(file.fileno())
