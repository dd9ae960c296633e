"""The folder that a data set is packed into: which of its shards are whole, and whether they are the ones asked for."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from dino_xcit.data import files
from dino_xcit.data.source import Source
from dino_xcit.errors import InputError
from dino_xcit.runtime import atomic
from dino_xcit.runtime.logging import progress_bar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MANIFEST, CLASSES, UNREADABLE = "pack.json", "classes.json", "unreadable.jsonl"
_VERSION = 1
_MOST_BYTES = 256_000_000
"""Of a manifest or a list of unreadable images that is read: a million shards."""


@dataclass(frozen=True)
class Options:
    """What decides over a shard's bytes. The names are the flags'."""

    max_side: int | None = None
    quality: int = 90
    shard_mb: int | None = None
    """A shard ends with the image that makes it so many million bytes long."""
    shard_images: int | None = None

    def is_full(self, images: int, written: int) -> bool:
        """Whether a shard of so many images and bytes ends here."""
        by_bytes = self.shard_mb is not None and written >= self.shard_mb * 1_000_000
        return by_bytes or (self.shard_images is not None and images >= self.shard_images)

    def without_limits(self) -> Options:
        """The same for a shard that ends where its images do."""
        return Options(self.max_side, self.quality)


@dataclass(frozen=True)
class Shard:
    """A shard that was written."""

    first: int
    """Which image of the source it begins with."""
    end: int
    """Which image the next one begins with; those between that are not in it could not be read."""
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Unread:
    """An image that was left out."""

    index: int
    name: str
    cause: str


def shard_name(number: int) -> str:
    """A shard's file."""
    return f"shard-{number:06d}.tar"


_FIRST_FILES = (CLASSES, f".{CLASSES}.tmp", f".{MANIFEST}.tmp")
"""What there is before the manifest. A shard without one is somebody else's."""


class PackFolder:
    """The state of a packing on the disk. Use it in a ``with`` statement: it is locked until its end."""

    shards: list[Shard]
    """Those that the manifest lists, in order and without gaps; a file may be gone since."""
    unread: list[Unread]
    """Images that could not be read, of those that the shards cover."""

    def __init__(self, path: Path, source: Source, options: Options) -> None:
        """Take a folder that is absent or empty, or in which packing this source with these options was begun.

        Raises:
            InputError: it is another's, in use, or cannot be written.
        """
        self.path, self.options = path, options
        self.shards, self.unread = [], []
        self._source = source
        with explained(path):
            self._refuse_odd_places()
            path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(path)
        try:
            self._fingerprint = source.fingerprint()
            with explained(path):
                self._take_up()
        except BaseException:
            self._unlock()
            raise

    def __enter__(self) -> PackFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def _refuse_odd_places(self) -> None:
        if "://" in str(self.path) or re.match(r"\w+:/[^/]", str(self.path)):  # a Path has one slash of two
            raise InputError(f"cannot pack into {self.path}: DST is a local folder; pack there, then copy it")
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"cannot pack into {self.path}: it is a file; give a folder that is absent or empty")
        origin = Path(self._source.url)  # perhaps: a pattern may be longer than any path
        if os.path.isdir(origin) and self.path.resolve().is_relative_to(origin.resolve()):
            raise InputError(
                f"cannot pack into {self.path}: it lies in {origin}, which is packed; give a folder outside"
            )

    def _take_up(self) -> None:
        """Read what is there, or begin."""
        if (self.path / MANIFEST).exists():
            begun = _read_manifest(self.path)
            self._refuse_other(begun)
            self.shards = begun["shards"]
            covered = self.shards[-1].end if self.shards else 0
            self.unread = [row for row in _read_unreadable(self.path / UNREADABLE) if row.index < covered]
        else:
            self._refuse_foreign()
        atomic.remove_leftovers(self.path)
        if self._source.classes is not None and not (self.path / CLASSES).exists():
            atomic.write_json(self.path / CLASSES, list(self._source.classes))
        if not (self.path / MANIFEST).exists():
            self._write_manifest()

    def _refuse_foreign(self) -> None:
        foreign = sorted(entry.name for entry in os.scandir(self.path) if entry.name not in _FIRST_FILES)
        if foreign:
            raise InputError(
                f"cannot pack into {self.path}: it holds {foreign[0]}{' and more' * (len(foreign) > 1)} and no "
                f"{MANIFEST}; give a folder that is absent or empty"
            )

    def _refuse_other(self, begun: dict[str, Any]) -> None:
        anew = f"give another DST, or begin anew after: rm -r {shlex.quote(str(self.path))}"
        for name, value in asdict(self.options).items():
            before = begun["options"].get(name)
            if before != value:
                flag = f"--{name.replace('_', '-')}"
                was, now = (f"with {flag} {x}" if x is not None else f"without {flag}" for x in (before, value))
                raise InputError(f"{self.path} was begun {was}, this command is {now}: repeat it as it was, {anew}")
        if begun["fingerprint"] != self._fingerprint or begun["images"] != len(self._source):
            raise InputError(
                f"{self.path} was begun from {begun['source']} with {begun['images']:,} images, this command packs "
                f"{self._source.url} with {len(self._source):,}, and they differ (a file was added, removed, changed "
                f"or moved since, or it is another data set): {anew}"
            )

    def missing(self, readers: int) -> list[tuple[int, int, int]]:
        """(number of the shard, first image, image after the last) of what is not there yet.

        A listed shard whose file is gone or has another SHA-256 is made again; the last entry is all that comes after
        the listed ones, in as many shards as it takes. That reads all of the listed ones, ``readers`` at a time: a
        twentieth of the time, or less, that packing them took.
        """
        with (
            ThreadPoolExecutor(max(1, readers)) as pool,
            progress_bar(len(self.shards), "comparing shards", shown=bool(self.shards), unit="shard") as bar,
        ):
            gone = []
            there = pool.map(_is_there, map(self.path.joinpath, map(shard_name, range(len(self.shards)))), self.shards)
            for number, (shard, whole) in enumerate(zip(self.shards, there, strict=True)):
                if not whole:
                    gone.append((number, shard.first, shard.end))
                bar.update()
        covered = self.shards[-1].end if self.shards else 0
        rest = (len(self.shards), covered, len(self._source))
        return [*gone, rest] if covered < len(self._source) else gone

    def add(self, number: int, shard: Shard, unread: Iterable[Unread]) -> None:
        """List a shard that lies under its name."""
        self.shards[number : number + 1] = [shard]
        self.note(shard.first, shard.end, unread)
        with explained(self.path / MANIFEST):
            self._write_manifest()

    def note(self, first: int, end: int, unread: Iterable[Unread]) -> None:
        """List which of the images from ``first`` to ``end`` could not be read."""
        others = [row for row in self.unread if not first <= row.index < end]
        rows = sorted([*others, *unread], key=lambda row: row.index)
        if rows == self.unread and (self.path / UNREADABLE).exists() == bool(rows):
            return
        self.unread = rows
        lines = "".join(json.dumps(asdict(row)) + "\n" for row in rows).encode()
        with explained(self.path / UNREADABLE):
            atomic.write(self.path / UNREADABLE, lambda file: file.write(lines))

    def finish(self) -> None:
        """Say in the manifest that all is there.

        Raises:
            InputError: not one image could be read, or a shard is gone.
        """
        if not self.shards:
            raise InputError(
                f"none of the {len(self._source):,} images of {self._source.url} can be read, the first because: "
                f"{self.unread[0].cause if self.unread else 'there is none'}; look at SRC with: python -m "
                f"dino_xcit.data check {self._source.url}"
            )
        with explained(self.path / MANIFEST):
            self._write_manifest(complete=True)

    def _write_manifest(self, complete: bool = False) -> None:
        images = sum(shard.images for shard in self.shards)
        shards = [{"name": shard_name(number)} | asdict(shard) for number, shard in enumerate(self.shards)]
        atomic.write_json(
            self.path / MANIFEST,
            {
                "version": _VERSION,
                "complete": complete,
                "source": self._source.url,
                "fingerprint": self._fingerprint,
                "images": len(self._source),
                "packed": images,
                "options": asdict(self.options),
                "shards": shards,
            },
        )


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Errors of the operating system while ``path`` is written, as one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"no space left on the disk for {path}: the shards that are there are whole; free some space, then run "
                "the same command"
            ) from error
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; mend that and run the same command, or give another DST"
        ) from error


def _locked(folder: Path) -> int | None:
    """A lock on the folder itself, which leaves no file and ends with the process; None where there are none."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(f"another process packs into {folder}: wait for its end, or give another DST") from error
    except OSError:  # a file system without locks
        os.close(descriptor)
        return None
    return descriptor


def _is_there(file: Path, shard: Shard) -> bool:
    try:
        return file.stat().st_size == shard.bytes and atomic.digest_of(file).sha256 == shard.sha256
    except OSError:
        return False


def _read_manifest(folder: Path) -> dict[str, Any]:
    """A manifest whose parts are what they should be, with :class:`Shard` objects in it."""
    path = folder / MANIFEST
    try:
        content = json.loads(files.read_file(str(path), _MOST_BYTES))
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']!r}, expected {_VERSION}")
        shards, end = [], 0
        for number, row in enumerate(content["shards"]):
            shard = Shard(*(row[name] for name in ("first", "end", "images", "bytes", "sha256")))
            whole = all(type(value) is int for value in (shard.first, shard.end, shard.images, shard.bytes))
            if row["name"] != shard_name(number) or not whole or not end == shard.first < shard.end:
                raise ValueError(f"its shard {number} does not follow the one before")
            shards.append(shard)
            end = shard.end
        if not all(isinstance(content[name], str) for name in ("source", "fingerprint")):
            raise TypeError("its source is no text")
        if type(content["images"]) is not int or content["images"] < end:
            raise ValueError(f"its shards hold more than its {content['images']!r:.20} images")
        if not isinstance(content["options"], dict):
            raise TypeError("its options are no list of names and values")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged ({type(error).__name__}: {str(error)[:100]}): give another DST, or begin anew after: "
            f"rm -r {shlex.quote(str(folder))}"
        ) from error
    return content | {"shards": shards}


def _read_unreadable(path: Path) -> list[Unread]:
    """What the list says of shards that are whole; a line that says nothing is left out."""
    rows = []
    for line in files.read_file(str(path), _MOST_BYTES).splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            row = json.loads(line)
            rows.append(Unread(int(row["index"]), str(row["name"]), str(row["cause"])))
    return rows
