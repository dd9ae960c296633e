"""Files by path: on this machine, or wherever fsspec reaches (``s3://``, ``gs://``, ``hf://``, ``https://`` ...)."""

from __future__ import annotations

import glob
import itertools
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

from dino_xcit.errors import InputError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")

AT_ONCE = 32
"""Requests that are under way together where many remote files are looked at."""
MOST_NAMES = 1_000_000
"""A pattern may stand for so many files."""

_BLOCK = 4 << 20
"""Bytes that scanning a remote file asks for at once: 30 ms of waiting are then few beside the transfer."""
_PAUSES = (0.5, 2.0)
"""Seconds before a remote request that failed is tried a second and a third time."""
_BRACES = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}|\{([^{}]*,[^{}]*)\}")
_VERSIONS = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "generation", "blob_id", "oid"),
    *("Last-Modified", "LastModified", "last_modified", "mtime", "updated", "created"),
)
"""What file systems call that which changes with a file's content, the surest first."""


def is_remote(path: str) -> bool:
    """Whether a path is a URL that fsspec reads, rather than a path on this machine."""
    return "://" in path


def expand(pattern: str) -> list[str]:
    """The files that a pattern names, sorted.

    Args:
        pattern: a path or URL with ranges in braces (``{000..146}``, with as many digits as are written), choices in
            braces (``{train,val}``) and the wildcards ``*``, ``?`` and ``[abc]`` (in ``http`` URLs ``?`` is itself).
            A local file of exactly that name is taken as it is.

    Returns:
        Paths, absolute where they are local.

    Raises:
        InputError: nothing matches a wildcard, or a file that is named without one is missing.
    """
    if not is_remote(pattern):
        pattern = os.path.abspath(os.path.expanduser(pattern))
        if os.path.isfile(pattern):
            return [pattern]
    names = list(itertools.islice(_alternatives(pattern), MOST_NAMES + 1))
    if len(names) > MOST_NAMES:
        raise InputError(f"{pattern!r} stands for more than {MOST_NAMES:,} files: expected fewer; check its braces")
    plain = sorted({name for name in names if not _has_wildcard(name)})
    missing = _first_missing(plain)
    if missing is not None:
        of = "" if missing == pattern else f", which {pattern!r} names"
        raise InputError(f"there is no file {missing}{of}: check the path, or the range in its braces")
    matched = [path for name in names if _has_wildcard(name) for path in _match(name)]
    return sorted({*plain, *matched})


def stamp(path: str) -> tuple[int, str]:
    """A file's size in bytes, and a text that changes when the file does: its time, or what its server calls it.

    Raises:
        InputError: there is no such file, or it cannot be reached.
    """
    if not is_remote(path):
        status = _status(path)
        return status.st_size, str(status.st_mtime_ns)
    return _stamp_of(path, _ask(path, lambda system, inner: system.info(inner)))


def stamps(paths: list[str]) -> list[tuple[int, str]]:
    """:func:`stamp` of each path; of remote ones several at once."""
    return _of_each(stamp, paths)


def read_range(path: str, start: int, length: int) -> bytes:
    """``length`` bytes from byte ``start`` on.

    Raises:
        InputError: there are fewer, or the file cannot be read.
    """
    if is_remote(path):
        data = _ask(path, lambda system, inner: system.cat_file(inner, start=start, end=start + length))
        if len(data) > length:
            raise InputError(
                f"cannot read a part of {path}: its server sends the whole file instead (it ignores ranges): copy the "
                "file to this machine, or to a server that knows ranges"
            )
    else:
        try:
            with open(path, "rb") as file:
                file.seek(start)
                data = file.read(length)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
    if len(data) != length:
        raise InputError(
            f"{path} ends before byte {start + length:,}, which it should have: it was cut short, or replaced since "
            "it was opened; start again once it is whole"
        )
    return data


def read_file(path: str, limit: int) -> bytes:
    """A whole file.

    Args:
        path: of the file.
        limit: the most bytes it may have.

    Raises:
        InputError: it has more, or cannot be read.
    """
    if is_remote(path):
        # One request instead of two: no more than the limit is asked for, whatever the size.
        data = _ask(path, lambda system, inner: _at_most(system, inner, limit + 1))
    else:
        _status(path)
        try:
            with open(path, "rb") as file:
                data = file.read(limit + 1)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > limit:
        raise InputError(f"{path} has more than {limit:,} bytes, the most that are read of such a file")
    return data


def open_file(path: str) -> BinaryIO:
    """A file to look through from its beginning: it can seek, and reads ahead where it is remote.

    Raises:
        InputError: it cannot be opened, or its server sends whole files only. Errors while reading it are the
            caller's, under :func:`explained`.
    """
    if not is_remote(path):
        _status(path)
        try:
            return open(path, "rb")
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error

    def opened(system: AbstractFileSystem, inner: str) -> BinaryIO:
        return cast(BinaryIO, system.open(inner, "rb", block_size=_BLOCK, cache_type="readahead"))

    file = _ask(path, opened)
    if not file.seekable():
        file.close()
        raise InputError(f"{path}: its server sends whole files only (no ranges): copy the file to this machine first")
    return file


def is_file(path: str) -> bool:
    """Whether there is a file at a path.

    Raises:
        InputError: its server cannot be reached, or forbids to ask.
    """
    if not is_remote(path):
        return os.path.isfile(path)
    try:
        stamp(path)
    except _Absent:
        return False
    return True


def is_folder(path: str) -> bool:
    """Whether there is a folder at a path; for an object store, whether names begin with it and a slash.

    Raises:
        InputError: its server cannot be reached.
    """
    if not is_remote(path):
        return os.path.isdir(os.path.expanduser(path))
    try:
        return bool(_ask(path, lambda system, inner: system.info(inner)).get("type") == "directory")
    except _Absent:
        return False


def files_below(folder: str) -> dict[str, tuple[int, str]]:
    """All files at any depth below a remote folder: path within the folder to :func:`stamp`.

    The size is -1 where the listing does not tell (web servers' do not).

    Raises:
        InputError: it cannot be listed.
    """

    def listed(system: AbstractFileSystem, inner: str) -> dict[str, tuple[int, str]]:
        system.invalidate_cache()
        found = system.find(inner, detail=True)
        system.invalidate_cache()  # a million entries are gigabytes there
        top = inner.rstrip("/") + "/"
        return {
            path.removeprefix(top): (info.get("size") if isinstance(info.get("size"), int) else -1, _version_of(info))
            for path, info in found.items()
            if path.startswith(top)
        }

    return _ask(folder, listed)


def explained(path: str, error: Exception) -> InputError:
    """What went wrong while reading a file, as one sentence."""
    if isinstance(error, InputError):
        return error
    if isinstance(error, FileNotFoundError):
        return _Absent(f"there is no file {path}: check the path, and what you are signed in to if it is remote")
    if isinstance(error, PermissionError):
        return InputError(f"no permission to read {path}: sign in, or ask its owner")
    if isinstance(error, TimeoutError):
        return InputError(f"cannot read {path}: its server did not answer in time; try again")
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(text.split())[:200].rstrip(".")
    return InputError(f"cannot read {path}: {text or 'the reader failed'} ({type(error).__name__})")


class _Absent(InputError):
    """There is no such file."""


def _status(path: str) -> os.stat_result:
    try:
        status = os.stat(path)
    except OSError as error:
        raise _Absent(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise InputError(f"{path} is {kind}: expected a file")
    return status


def _ask(path: str, question: Callable[[AbstractFileSystem, str], T]) -> T:
    """The answer of a path's file system, asked again where something fails that may pass."""
    for pause in (*_PAUSES, None):
        try:
            return question(*_file_system(path))
        except Exception as error:  # of any class: each file system has its own
            lasting = isinstance(error, (InputError, FileNotFoundError, PermissionError, IsADirectoryError))
            if lasting or pause is None:
                raise explained(path, error) from error
            time.sleep(pause)
    raise AssertionError("unreachable")


def _file_system(path: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, and the path in it.

    Nothing is kept here: fsspec keeps one a process and thread, so that a forked process gets its own connections.
    """
    from fsspec.core import url_to_fs  # not at the top: local files do without

    try:
        return cast("tuple[AbstractFileSystem, str]", url_to_fs(path))
    except ImportError as error:
        needed = getattr(error.__cause__, "name", None)
        remedy = f"pip install {needed.partition('.')[0]}" if needed else str(error)
        raise InputError(
            f"cannot read {path}: a package for {path.partition('://')[0]}:// is missing: {remedy}"
        ) from error
    except ValueError as error:
        raise InputError(f"cannot read {path}: {error}; expected s3://, gs://, hf://, https:// or the like") from error


def _stamp_of(path: str, info: dict[str, Any]) -> tuple[int, str]:
    if info.get("type") == "directory":
        raise InputError(f"{path} is a folder: expected a file")
    size = info.get("size")
    if not isinstance(size, int):
        raise InputError(f"cannot use {path}: its server does not say how long it is; copy it to this machine first")
    return size, _version_of(info)


def _version_of(info: dict[str, Any]) -> str:
    version = next((info[name] for name in _VERSIONS if info.get(name)), "")
    # A listing and a single question may give the same time as different types.
    return str(version.timestamp() if isinstance(version, datetime) else version)


def _at_most(system: AbstractFileSystem, inner: str, count: int) -> bytes:
    """The first ``count`` bytes of a file, or all it has."""
    try:
        return cast(bytes, system.cat_file(inner, start=0, end=count))
    except (FileNotFoundError, PermissionError):
        raise
    except Exception:  # servers refuse a range of an empty file
        if system.info(inner).get("size") == 0:
            return b""
        raise


def _alternatives(pattern: str) -> Iterator[str]:
    """A pattern with one choice made in each of its braces, in every way."""
    braces = _BRACES.search(pattern)
    if braces is None:
        yield pattern
        return
    first, last, listed = braces.groups()
    choices: Iterator[str]
    if listed is not None:
        choices = iter(listed.split(","))
    else:
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        lower, upper = sorted((int(first), int(last)))
        choices = (str(number).zfill(width) for number in range(lower, upper + 1))
    for choice in choices:
        yield from _alternatives(pattern[: braces.start()] + choice + pattern[braces.end() :])


def _has_wildcard(name: str) -> bool:
    return any(letter in name for letter in ("*[" if name.startswith(("http://", "https://")) else "*?["))


def _match(name: str) -> list[str]:
    """The files that a name with wildcards stands for."""
    if not is_remote(name):
        found = [path for path in glob.iglob(name, recursive=True) if not os.path.isdir(path)]
    elif "::" in name:
        raise InputError(
            f"{name!r} has a wildcard and a chain of file systems: name the files by braces ({{000..146}})"
        )
    else:
        found = _ask(name, _match_remote)
    if not found:
        raise InputError(f"no file matches {name!r}: check the path and the wildcards")
    return found


def _match_remote(system: AbstractFileSystem, inner: str) -> list[str]:
    system.invalidate_cache()  # a listing from before may be out of date
    try:
        found = system.glob(inner, detail=True)
    except FileNotFoundError:
        return []
    return [str(system.unstrip_protocol(path)) for path, info in found.items() if info.get("type") != "directory"]


def _first_missing(paths: list[str]) -> str | None:
    """The first of some paths at which there is no file; any other trouble with them is raised."""
    there = _of_each(is_file, paths)
    return next((path for path, found in zip(paths, there, strict=True) if not found), None)


def _of_each(function: Callable[[str], T], paths: list[str]) -> list[T]:
    """A function of each path, in order; several at once where they are remote."""
    if len(paths) < 2 or not is_remote(paths[0]):
        return [function(path) for path in paths]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(function, paths))
