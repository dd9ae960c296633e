"""Atomic file writes: write to a temporary file, flush to disk, read back, rename."""

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
    """Size and hash of a file."""

    size: int
    """Bytes."""
    sha256: str
    """Hexadecimal."""


class DamagedWrite(OSError):
    """The file read back differs from the data written."""


class _HashingFile:
    """A writable file that hashes its input."""

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
    """Write a file atomically with ``fill(file)``; a crash of the machine leaves the old file or the new one.

    Raises:
        OSError: the file cannot be written (such as on a full disk) or is damaged; ``path`` is unchanged.
    """
    aside = aside_of(path)
    try:
        with open(aside, "wb") as file:
            hashing = _HashingFile(file)
            fill(hashing)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # read back from the disk, not from the page cache
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        written = hashing.digest()
        if digest_of(aside) != written:
            raise DamagedWrite(0, "the file differs from the data written", str(aside))
        os.replace(aside, path)
    except BaseException as error:
        # On a broken disk, removing may fail too; report the first error.
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        # torch.save hides the OSError, such as a full disk, behind "unexpected pos".
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
    """Atomically make ``name`` a hard link to ``file``, or a copy if the file system has no hard links."""
    aside = aside_of(name)
    aside.unlink(missing_ok=True)
    try:
        os.link(file, aside)
    except OSError:
        with open(file, "rb") as original:
            write(name, lambda copy: shutil.copyfileobj(original, copy, 1 << 20))
        return
    os.replace(aside, name)
    aside.unlink(missing_ok=True)  # rename(2) does nothing if both names are the same file
    flush_folder(name.parent)


def digest_of(path: Path) -> Digest:
    """Return the digest of a file on disk."""
    with open(path, "rb") as file:
        return Digest(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


def aside_of(path: Path) -> Path:
    """Return the temporary path of a file while it is written."""
    return path.with_name(f".{path.name}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of killed processes. The caller must be the only writer."""
    for left in folder.glob(".*.tmp"):
        if left.is_file():
            left.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Flush a folder, which makes a rename in it durable on POSIX."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
