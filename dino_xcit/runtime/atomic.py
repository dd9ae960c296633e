"""Files that are whole or absent: written beside their target, flushed to the disk, read back, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch


@dataclass(frozen=True)
class Digest:
    """What a file must look like to be the one that was written."""

    size: int
    """Bytes."""
    sha256: str
    """In hexadecimal."""


class DamagedWrite(OSError):
    """What the disk gave back is not what was written."""


class _HashingFile:
    """A file being written that knows the digest of what it was given."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self._size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self._size += memoryview(data).nbytes
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> Digest:
        return Digest(self._size, self._hash.hexdigest())


def write(path: Path, fill: Callable[[Any], object]) -> Digest:
    """Let ``fill(file)`` write a file that appears at ``path`` whole or not at all, a crash of the machine included.

    Raises:
        OSError: it could not be written (a full disk, say), or reads back otherwise; ``path`` is as it was.
    """
    aside = aside_of(path)
    try:
        with open(aside, "wb") as file:
            hashing = _HashingFile(file)
            fill(hashing)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # so that what is read back comes from the disk, not from memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        written = hashing.digest()
        if digest_of(aside) != written:
            raise DamagedWrite(0, "the file reads back otherwise than it was written", str(aside))
        os.replace(aside, path)
    except BaseException as error:
        # Where the disk is broken even removing may fail: what went wrong first is what matters.
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        # torch.save hides the file's own error, such as a full disk, behind an "unexpected pos" of its archive.
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    flush_folder(path.parent)
    return written


def write_torch(path: Path, content: object) -> Digest:
    """``torch.save`` through :func:`write`."""
    return write(path, lambda file: torch.save(content, file))


def write_json(path: Path, value: object) -> Digest:
    """JSON through :func:`write`."""
    return write(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def give_name(file: Path, name: Path) -> None:
    """Make ``name`` another name of ``file``, in one step: a hard link, or a copy where the file system has none."""
    aside = aside_of(name)
    aside.unlink(missing_ok=True)
    try:
        os.link(file, aside)
    except OSError:
        with open(file, "rb") as original:
            write(name, lambda copy: shutil.copyfileobj(original, copy, 1 << 20))
        return
    os.replace(aside, name)
    aside.unlink(missing_ok=True)  # rename(2) leaves both names where they already are the same file
    flush_folder(name.parent)


def digest_of(path: Path) -> Digest:
    """Of a file on the disk."""
    with open(path, "rb") as file:
        return Digest(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


def aside_of(path: Path) -> Path:
    """Where a file stays until it is whole."""
    return path.with_name(f".{path.name}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half written. Call it only where nobody else writes."""
    for left in folder.glob(".*.tmp"):
        if left.is_file():
            left.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Make a rename durable: on POSIX the folder's entry is data too."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
