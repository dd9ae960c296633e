"""The index of a data set: location, name and label of each item. Stored on disk and memory-mapped by all processes.

A million items take about 100 MB. Pickling an index stores the path of its file only.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from dino_xcit.errors import InputError
from dino_xcit.runtime import atomic
from dino_xcit.runtime import logging as log

MAX_AGE = 30 * 24 * 3600
"""Seconds since the last use after which an outdated index is removed."""


class Strings:
    """A sequence of strings, such as paths, stored as two arrays."""

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        """``ends[i]`` is the end of string i in ``text``."""
        self.text, self.ends = text, ends

    @classmethod
    def pack(cls, texts: Iterable[str]) -> Strings:
        """Pack strings. Bytes that are not UTF-8 may be surrogates, as in Python's paths."""
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        ends = np.cumsum([len(one) for one in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        index = range(len(self.ends))[index]
        start = self.ends[index - 1] if index else 0
        return self.text[start : self.ends[index]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class Index:
    """Columns of integers and of strings. Lengths may differ."""

    numbers: Mapping[str, NDArray[np.int64]]
    strings: Mapping[str, Strings]
    keep: bool = True
    """Whether :func:`cached` stores it."""
    file: str = ""
    """File of a stored index; else empty."""

    def __reduce__(self) -> tuple[Any, ...]:
        if self.file:
            return _load_again, (self.file,)
        return Index, (self.numbers, self.strings, self.keep)


def cached(
    source: str, build: Callable[[], Index], accept: Callable[[Index], bool], cache: Path | None = None
) -> Index:
    """Load the stored index of a source, or build and store it.

    Of several concurrent processes one builds the index and the others wait.

    Args:
        source: Key of the index, such as a URL.
        build: Builds the index. For ``accept``, the index should contain its dependencies (sizes and times of files).
        accept: Whether a stored index is up to date.
        cache: Folder of the cache; None: :func:`cache_folder`.

    Returns:
        The index, memory-mapped if it could be stored.
    """
    folder = (cache or cache_folder()) / "index"
    prefix = hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:20]
    found = _find(folder, prefix, accept)
    if found is not None:
        return found
    index: Index | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{prefix}.lock", source):
            found = _find(folder, prefix, accept)  # another process may have built it meanwhile
            if found is not None:
                return found
            index = build()
            if not index.keep:
                return index
            stored = _store(index, folder, prefix)
            _remove_outdated(folder, prefix, stored)
        return _load(stored)
    except (OSError, NotImplementedError) as error:  # no lock, no permission, no space
        reason = getattr(error, "strerror", None) or error
        log.warn_once(f"cannot store an index in {folder} ({reason}): set DINO_XCIT_CACHE to a writable folder")
        return build() if index is None else index


def cache_folder() -> Path:
    """Return ``$DINO_XCIT_CACHE``, or ``~/.cache/dino-xcit``."""
    return Path(os.path.expanduser(os.environ.get("DINO_XCIT_CACHE") or "~/.cache/dino-xcit"))


@contextmanager
def _locked(path: Path, source: str) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info(f"another process is indexing {source}: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _find(folder: Path, prefix: str, accept: Callable[[Index], bool]) -> Index | None:
    """Return a stored index of the source that is intact and accepted, or None."""
    for file in sorted(folder.glob(f"{prefix}-*.safetensors")):
        try:
            if _digest(np.memmap(file, mode="r")) != file.stem.rpartition("-")[2]:
                continue
            index = _load(file)
            if accept(index):
                os.utime(file)
                return index
        except Exception:  # any exception: unusable files are replaced
            continue
    return None


def _load(file: Path) -> Index:
    """Memory-map a file written by :func:`_store`."""
    data = np.memmap(file, dtype=np.uint8, mode="r").view(np.ndarray)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")  # safetensors: length, JSON, arrays
    header = json.loads(data[8:start].tobytes())
    arrays: dict[str, NDArray[Any]] = {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        arrays[name] = data[start + first : start + end].view({"I64": np.int64, "U8": np.uint8}[entry["dtype"]])
    numbers = {name.removeprefix("numbers."): array for name, array in arrays.items() if name.startswith("numbers.")}
    names = [name.removeprefix("ends.") for name in arrays if name.startswith("ends.")]
    strings = {name: Strings(arrays[f"text.{name}"], arrays[f"ends.{name}"]) for name in names}
    return Index(numbers, strings, True, str(file))


def _load_again(file: str) -> Index:
    """Unpickle an index in another process."""
    try:
        return _load(Path(file))
    except OSError as error:
        raise InputError(f"the index {file} was removed while it was in use: start the same command again") from error


def _store(index: Index, folder: Path, prefix: str) -> Path:
    arrays: dict[str, NDArray[Any]] = {f"numbers.{name}": values for name, values in index.numbers.items()}
    for name, texts in index.strings.items():
        arrays |= {f"text.{name}": texts.text, f"ends.{name}": texts.ends}
    content = safetensors.numpy.save(arrays)
    file = folder / f"{prefix}-{_digest(content)}.safetensors"
    atomic.write(file, lambda out: out.write(content))
    return file


def _digest(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()[:20]


def _remove_outdated(folder: Path, prefix: str, stored: Path) -> None:
    """Remove indices of the source unused for :data:`MAX_AGE`. A running process may still open newer ones."""
    for file in folder.glob(f"{prefix}-*.safetensors"):
        if file != stored and time.time() - file.stat().st_mtime > MAX_AGE:
            file.unlink(missing_ok=True)
