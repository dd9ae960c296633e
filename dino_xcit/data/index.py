"""The index of a data set: where each item lies. Kept on the disk, and mapped into memory by all who read it.

A million items are 100 MB or so. Loader processes share them as pages of one file, under any way of starting
processes: a pickled index is the path of its folder.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from dino_xcit.errors import InputError
from dino_xcit.runtime import atomic

try:
    import fcntl
except ImportError:  # Windows: there nothing is removed that may be in use, and two processes may both build
    fcntl = None  # type: ignore[assignment]

VERSION = 1
"""Of the files; others are built anew."""
_MOST_META = 1 << 20
_ARRAY = re.compile(r"(numbers|text|ends)\.[a-z_]{1,40}")

_told: set[str] = set()
"""Notices that were given in this process."""


class Strings:
    """Many texts, such as paths, in one byte string: a million of them are two arrays."""

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        """``ends[i]`` is where text i ends in ``text``."""
        self.text, self.ends = text, ends

    @classmethod
    def pack(cls, texts: Iterable[str]) -> Strings:
        """Of texts in which bytes that are no UTF-8 may be surrogates, as in Python's paths."""
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


class _Held:
    """An open file, whose shared lock lasts as long as this object, or a process that was forked from here."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        if fcntl is not None:
            with contextlib.suppress(OSError):  # without locks nothing is removed either
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def __del__(self) -> None:
        self.file.close()


@dataclass(frozen=True)
class Index:
    """Columns of numbers and of texts, of any lengths."""

    numbers: Mapping[str, NDArray[np.int64]]
    strings: Mapping[str, Strings]
    keep: bool = True
    """Whether it is worth a place on the disk."""
    folder: str = ""
    """Where it lies on the disk; empty where it does not."""
    digest: str = ""
    """SHA-256 of what lies there."""
    held: _Held | None = field(default=None, repr=False, compare=False)
    """Keeps others from removing the folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        if self.folder:
            return _map_again, (self.folder, self.digest)
        return Index, (self.numbers, self.strings, self.keep)


def cached(
    source: str, build: Callable[[], Index], accept: Callable[[Index], bool], cache: Path | None = None
) -> Index:
    """The stored index of a source, or a new one that is stored.

    Where several processes ask at once, one builds and the others wait for it.

    Args:
        source: what is indexed, such as its URL. A new index takes the place of the source's earlier ones.
        build: makes the index. What it depends on (sizes and times of files) should be in it, for ``accept``.
        accept: whether a stored index is what ``build`` would make now. It must also check what reading relies on,
            such as that every item lies within its file: a file in the cache is not believed.
        cache: where to keep it; None: ``$DINO_XCIT_CACHE``, or ``~/.cache/dino-xcit``.

    Returns:
        The index: from the disk and mapped, or in this process's memory where it cannot be stored.
    """
    home = cache_folder() if cache is None else cache
    folder, prefix = home / "index", hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:20]
    found = _find(folder, prefix, accept)
    if found is not None:
        return found
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            alone = stack.enter_context(_alone(folder / f"{prefix}.lock", source))
        except OSError as error:
            index = build()
            if index.keep:
                _notice(f"cannot keep an index in {home} ({error.strerror})")
            return index
        found = _find(folder, prefix, accept)  # another process may have built it while this one waited
        if found is not None:
            return found
        index = build()
        if not index.keep:
            return index
        try:
            place = _store(index, folder, prefix)
        except OSError as error:
            _notice(f"cannot keep an index in {home} ({error.strerror or error})")
            return index
        stored = _find(folder, prefix, accept)
        if alone:
            _remove_others(folder, prefix, place)
        return index if stored is None else stored


def cache_folder() -> Path:
    """``$DINO_XCIT_CACHE``, or ``~/.cache/dino-xcit``."""
    return Path(os.path.expanduser(os.environ.get("DINO_XCIT_CACHE") or "~/.cache/dino-xcit"))


def _find(folder: Path, prefix: str, accept: Callable[[Index], bool]) -> Index | None:
    """A stored index of the source that is whole and accepted."""
    try:
        places = sorted(folder.glob(f"{prefix}-*"))
    except OSError:
        return None
    for place in places:
        try:
            index = _load(place)
            if accept(index):
                return index
        except Exception:  # whatever lies there, of whatever class its trouble is: it is built anew
            continue
    return None


def _load(place: Path, digest: str | None = None) -> Index:
    """Map an index.

    Args:
        place: its folder.
        digest: of an index that this program has checked before; None: check every byte.
    """
    held = _Held(open(place / "meta.json", "rb"))  # noqa: SIM115 - open as long as the index is in use
    text = held.file.read(_MOST_META)
    meta = json.loads(text)
    if meta["version"] != VERSION or digest not in (None, hashlib.sha256(text).hexdigest()):
        raise ValueError("another index")
    arrays: dict[str, NDArray] = {}
    for name, expected in meta["arrays"].items():
        if not _ARRAY.fullmatch(name):
            raise ValueError("a name that is none of ours")
        file = place / f"{name}.npy"
        if digest is None and atomic.digest_of(file).sha256 != expected["sha256"]:
            raise ValueError("damaged")
        array = np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
        if array.shape != (expected["length"],) or array.dtype != (np.uint8 if name.startswith("text.") else np.int64):
            raise ValueError("not as its description")
        arrays[name] = array
    strings: dict[str, Strings] = {}
    numbers: dict[str, NDArray[np.int64]] = {}
    for name, array in arrays.items():
        kind, _, column = name.partition(".")
        if kind == "numbers":
            numbers[column] = array
        elif kind == "ends":
            strings[column] = Strings(arrays[f"text.{column}"], array)
            if digest is None and not _are_ends(array, len(arrays[f"text.{column}"])):
                raise ValueError("texts beyond their bytes")
    return Index(numbers, strings, True, str(place), hashlib.sha256(text).hexdigest(), held)


def _are_ends(ends: NDArray[np.int64], length: int) -> bool:
    bounds = np.concatenate([[0], ends])
    return bool((np.diff(bounds) >= 0).all()) and int(bounds[-1]) == length


def _map_again(folder: str, digest: str) -> Index:
    """In another process: an index that was pickled."""
    try:
        return _load(Path(folder), digest)
    except Exception as error:
        raise InputError(
            f"the index in {folder} was removed or replaced while it was in use: start the same command again"
        ) from error


def _store(index: Index, folder: Path, prefix: str) -> Path:
    """Write an index, whole or not at all."""
    aside = folder / f".{prefix}-{uuid.uuid4().hex}.tmp"
    aside.mkdir()
    try:
        arrays: dict[str, NDArray] = {f"numbers.{name}": values for name, values in index.numbers.items()}
        for name, texts in index.strings.items():
            arrays |= {f"text.{name}": texts.text, f"ends.{name}": texts.ends}
        meta: dict[str, Any] = {"version": VERSION, "arrays": {}}
        for name, array in arrays.items():
            written = atomic.write(aside / f"{name}.npy", _saving(array))
            meta["arrays"][name] = {"length": len(array), "sha256": written.sha256}
        digest = atomic.write_json(aside / "meta.json", meta).sha256
        place = folder / f"{prefix}-{digest[:20]}"
        if place.exists():  # damaged, or it would have been found
            _remove(place)
        try:
            os.rename(aside, place)
        except OSError as error:  # another process was quicker with the very same index
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        atomic.flush_folder(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return place


def _saving(array: NDArray) -> Callable[[Any], None]:
    return lambda file: np.save(file, array, allow_pickle=False)


@contextlib.contextmanager
def _alone(lock: Path, source: str) -> Iterator[bool]:
    """Wait until no other process builds this index; whether that could be made sure of."""
    if fcntl is None:
        yield False
        return
    with open(lock, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is indexing {source}: waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            yield False
            return
        yield True


def _remove_others(folder: Path, prefix: str, kept: Path) -> None:
    """Remove the source's earlier indices that nobody uses, and what killed processes left half written."""
    for left in folder.glob(f".{prefix}-*"):
        shutil.rmtree(left, ignore_errors=True)
    for place in folder.glob(f"{prefix}-*"):
        if place == kept:
            continue
        try:
            with open(place / "meta.json", "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            pass
        except OSError:  # in use
            continue
        _remove(place)


def _remove(place: Path) -> None:
    """Out of the way at once, so that nobody finds half of it."""
    trash = place.with_name(f".{place.name}-{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):
        os.rename(place, trash)
    shutil.rmtree(trash, ignore_errors=True)


def _notice(what: str) -> None:
    if what not in _told:
        _told.add(what)
        print(
            f"{what}: it is kept in memory, and built anew next time; set DINO_XCIT_CACHE to a folder that can be "
            "written",
            file=sys.stderr,
        )
