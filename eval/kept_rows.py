"""Rows of features in a folder of their own, ``features.npy`` and ``card.json``: whole or absent, whoever is killed.

D features.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dino_xcit.errors import InputError
from dino_xcit.runtime import atomic
from eval.protocol import write_json

Chunk = tuple[NDArray[np.float32], NDArray[np.bool_]]
"""Rows [some, D], and whether each image could be read, [some]."""

SKIPPED: dict[str, object] = {"unreadable": "skipped"}
"""What the card of rows that lack images has besides."""

_ABANDONED_SECONDS = 3600
_MOST_CARD_BYTES = 64_000_000
"""Of a card that is read: room for millions of images that could not be read."""
_ROWS_AT_ONCE = 16_384


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


def key_of(card: dict[str, object]) -> str:
    """The name of the folder of rows that a card describes."""
    return hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()[:20]


def rows_in(folder: Path, shape: tuple[int, int], half: bool = False) -> NDArray[np.float32] | None:
    """The kept rows, float32 or float16 if ``half``; None where there are none, or where the file was damaged."""
    try:
        rows: NDArray[np.float32] = np.load(folder / "features.npy", mmap_mode="r")
    except (FileNotFoundError, NotADirectoryError, ValueError, EOFError):
        return None
    return rows if rows.shape == shape and rows.dtype == (np.float16 if half else np.float32) else None


def kept_in(
    folder: Path, shape: tuple[int, int], complete: bool, half: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.int64]] | None:
    """The kept rows and the numbers of the images that they lack; None where they are not there, or not whole.

    Args:
        shape: of the rows of all images.
        complete: no image may be lacking.
    """
    lacking = np.empty(0, dtype=np.int64)
    if not complete:
        try:
            if (folder / "card.json").stat().st_size > _MOST_CARD_BYTES:
                return None
            stated = json.loads((folder / "card.json").read_bytes())["unreadable"]
            if not all(type(number) is int and 0 <= number < shape[0] for number in stated):
                return None
            lacking = np.unique(np.asarray(stated, dtype=np.int64))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
    rows = rows_in(folder, (shape[0] - len(lacking), shape[1]), half)
    return None if rows is None else (rows, lacking)


def keep(
    cache_dir: Path,
    chunks: Iterator[Chunk],
    shape: tuple[int, int],
    card: dict[str, object],
    url: str,
    half: bool = False,
) -> str:
    """Keep the rows of the images that could be read; the name of their folder.

    Raises:
        InputError: the disk has no room for them, or a feature does not fit ``half``'s float16.
    """
    # A name of its own keeps two runners that want the same features at the same time out of each other's way.
    aside = cache_dir / f".{key_of(card)}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    _sweep(cache_dir)
    readable: list[NDArray[np.bool_]] = []

    def rows() -> Iterator[NDArray[np.float32]]:
        for chunk, read in chunks:
            readable.append(read)
            if half and (largest := float(np.abs(chunk).max(initial=0))) > float(np.finfo(np.float16).max):
                raise InputError(f"a feature of {largest:g} does not fit float16: use --cached-precision float32")
            yield chunk

    try:
        aside.mkdir(parents=True)
        size, free = shape[0] * shape[1] * (2 if half else 4), shutil.disk_usage(cache_dir).free
        if size > free:
            raise InputError(
                f"the features of {url} take {size / 2**30:.1f} GiB, and {cache_dir} has {free / 2**30:.1f} GiB free: "
                "name another --cache-dir"
            )
        file = aside / "features.npy"
        write_rows(file, rows(), shape, half)
        read = np.concatenate(readable or [np.empty(0, dtype=np.bool_)])
        more: dict[str, object] = {"source": url}
        if not read.all():
            _leave_out(file, read)
            card = card | SKIPPED
            more["unreadable"] = np.flatnonzero(~read).tolist()
        write_json(aside / "card.json", card | more)
        atomic.flush_folder(aside)
        folder = cache_dir / key_of(card)
        if kept_in(folder, shape, bool(read.all()), half) is None:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(aside, folder)
            atomic.flush_folder(cache_dir)
        return folder.name
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _leave_out(file: Path, read: NDArray[np.bool_]) -> None:
    """Write a file of rows anew without those that are not in ``read`` [rows]."""
    rows: NDArray[np.float32] = np.load(file, mmap_mode="r")
    parts = [slice(start, start + _ROWS_AT_ONCE) for start in range(0, len(rows), _ROWS_AT_ONCE)]
    shorter = file.with_name("shorter.npy")
    write_rows(shorter, (rows[part][read[part]] for part in parts), (int(read.sum()), rows.shape[1]))
    os.replace(shorter, file)


def _sweep(cache_dir: Path) -> None:
    """Remove what a killed process left half-written: a folder in which nobody has written for an hour."""
    for left in cache_dir.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            written = [file.stat().st_mtime for file in left.iterdir()] or [left.stat().st_mtime]
            if time.time() - max(written) > _ABANDONED_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
