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

from dino_xcit.errors import InputError, one_line

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")

Stamp = tuple[int, str]
"""A file's size in bytes, and a text that changes when the file does."""

MAX_REQUESTS = 32
"""Concurrent requests where many remote files are looked at."""
MAX_FILES = 1_000_000
"""Files that one pattern may name."""
MAX_IMAGE_BYTES = 1 << 30
"""Of an encoded image; a larger file is no image."""
_READ_AHEAD = 4 << 20
"""Bytes of each request of :func:`open_file`."""
_PAUSES = (0.5, 2.0)
"""Seconds before a failed remote request is tried a second and a third time."""
_VERSIONS = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "generation", "blob_id", "oid"),
    *("Last-Modified", "LastModified", "last_modified", "mtime", "updated", "created"),
)
"""Names under which file systems report a file's version, most reliable first."""
_BRACES = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}|\{([^{}]*,[^{}]*)\}")


class _Absent(InputError):
    """There is no such file."""


def is_remote(path: str) -> bool:
    """Whether a path is a URL that fsspec reads, rather than a path on this machine."""
    return "://" in path


def stamp(path: str) -> Stamp:
    """A file's size, and its time or what its server calls its version.

    Raises:
        InputError: there is no such file, or it cannot be reached.
    """
    if not is_remote(path):
        status = _status(path)
        return status.st_size, str(status.st_mtime_ns)
    info = ask(path, lambda system, inner: system.info(inner))
    if info.get("type") == "directory":
        raise InputError(f"{path} is a folder: expected a file")
    if not isinstance(info.get("size"), int):
        raise InputError(f"cannot use {path}: its server does not tell its size; copy it to this machine first")
    return info["size"], _version(info)


def stamps(paths: list[str]) -> list[Stamp]:
    """:func:`stamp` of each path, remote ones concurrently."""
    return _of_each(stamp, paths)


def state(path: str) -> str:
    """A local file's size and time in words, or that it is gone; nothing of a remote file, which takes a request."""
    if is_remote(path):
        return ""
    try:
        status = os.stat(path)
    except OSError:
        return "gone"
    return f"{status.st_size} {status.st_mtime_ns}"


def read_range(path: str, start: int, length: int) -> bytes:
    """``length`` bytes from byte ``start`` on.

    Raises:
        InputError: there are fewer, or the file cannot be read.
    """
    if is_remote(path):
        data = ask(path, lambda system, inner: system.cat_file(inner, start=start, end=start + length))
        if len(data) > length:
            raise InputError(
                f"cannot read a part of {path}: its server ignores ranges; copy the file to this machine first"
            )
    else:
        with open_file(path) as file:
            file.seek(start)
            data = file.read(length)
    if len(data) != length:
        raise InputError(
            f"{path} ends before byte {start + length:,}: it was cut short, or replaced since it was opened; start "
            "again when it is complete"
        )
    return data


def read_file(path: str, limit: int) -> bytes:
    """A whole file.

    Raises:
        InputError: it has more than ``limit`` bytes, or cannot be read.
    """
    if is_remote(path):
        data = ask(path, lambda system, inner: system.cat_file(inner, start=0, end=limit + 1))
    else:
        with open_file(path) as file:
            data = file.read(limit + 1 if os.fstat(file.fileno()).st_size > limit else -1)
    if len(data) > limit:
        raise InputError(f"{path} has more than {limit:,} bytes, the limit for such a file: check the path")
    return data


def open_file(path: str) -> BinaryIO:
    """A seekable file, open for reading; a remote one reads ahead.

    Raises:
        InputError: it cannot be opened, or its server sends whole files only.
    """
    if not is_remote(path):
        _status(path)  # opening a named pipe would wait for a writer
        try:
            return open(path, "rb")
        except OSError as error:
            raise explained(path, error) from error

    def opened(system: AbstractFileSystem, inner: str) -> BinaryIO:
        return cast(BinaryIO, system.open(inner, "rb", block_size=_READ_AHEAD, cache_type="readahead"))

    file = ask(path, opened)
    if not file.seekable():
        file.close()
        raise InputError(f"{path}: its server ignores ranges; copy the file to this machine first")
    return file


def is_file(path: str) -> bool:
    """Whether there is a file at a path.

    Raises:
        InputError: its server cannot be reached, or refuses to tell.
    """
    if not is_remote(path):
        return os.path.isfile(path)
    try:
        stamp(path)
    except _Absent:
        return False
    return True


def is_folder(path: str) -> bool:
    """Whether there is a folder at a path; in an object store, whether names begin with it and a slash.

    Raises:
        InputError: its server cannot be reached.
    """
    if not is_remote(path):
        return os.path.isdir(os.path.expanduser(path))
    try:
        return bool(ask(path, lambda system, inner: system.info(inner)).get("type") == "directory")
    except _Absent:
        return False


def subfolders(path: str) -> set[str]:
    """Names of the folders in a folder, hidden ones left out; empty where it cannot be listed."""
    if is_remote(path):
        listed = ask(path, lambda system, inner: system.ls(inner, detail=True))
        names = {info["name"].rstrip("/").rpartition("/")[2] for info in listed if info["type"] == "directory"}
    else:
        try:
            names = {entry.name for entry in os.scandir(path) if entry.is_dir()}
        except OSError:  # reported where it is read
            return set()
    return {name for name in names if not name.startswith(".")}


def folder_of(path: str) -> str:
    """The folder of a file; of a URL without its query."""
    return path.partition("?")[0].rpartition("/")[0] if is_remote(path) else os.path.dirname(path) or "."


def files_below(folder: str) -> dict[str, Stamp]:
    """All files at any depth below a remote folder: path within the folder to :func:`stamp`.

    The size is -1 where the listing does not tell it, as on web servers.

    Raises:
        InputError: it cannot be listed.
    """

    def listed(system: AbstractFileSystem, inner: str) -> dict[str, Stamp]:
        system.invalidate_cache()
        found = system.find(inner, detail=True)
        system.invalidate_cache()  # a million entries take gigabytes there
        top = inner.rstrip("/") + "/"
        return {
            path.removeprefix(top): (info.get("size") if isinstance(info.get("size"), int) else -1, _version(info))
            for path, info in found.items()
            if path.startswith(top)
        }

    return ask(folder, listed)


def expand(pattern: str) -> list[str]:
    """The files that a pattern names, sorted.

    Args:
        pattern: a path or URL with ranges in braces (``{000..146}``, zero-padded as written), choices in braces
            (``{train,val}``) and the wildcards ``*``, ``?`` and ``[abc]`` (in ``http`` URLs ``?`` is literal).
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
    names = list(itertools.islice(_alternatives(pattern), MAX_FILES + 1))
    if len(names) > MAX_FILES:
        raise InputError(f"{pattern!r} names more than {MAX_FILES:,} files: check its braces")
    wildcards = "*[" if pattern.startswith(("http://", "https://")) else "*?["
    matched: list[str] = []
    plain: list[str] = []
    for name in names:
        if any(letter in name for letter in wildcards):
            matched += _match(name)
        else:
            plain.append(name)
    for name, there in zip(plain, _of_each(is_file, plain), strict=True):
        if there:
            continue
        if is_folder(name):
            raise InputError(f"{name} is a folder: expected files, or a pattern such as {name}/*")
        stamp(name)  # raises: absent, no regular file, or what its server says
    return sorted({*plain, *matched})


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
        width = max(len(first), len(last)) if re.match(r"0\d", first) or re.match(r"0\d", last) else 0
        lower, upper = sorted((int(first), int(last)))
        choices = (str(number).zfill(width) for number in range(lower, upper + 1))
    for choice in choices:
        yield from _alternatives(pattern[: braces.start()] + choice + pattern[braces.end() :])


def _match(name: str) -> list[str]:
    """The files that match a name with wildcards."""

    def matching(system: AbstractFileSystem, inner: str) -> list[str]:
        system.invalidate_cache()  # an earlier listing may be out of date
        try:
            found = system.glob(inner, detail=True)
        except FileNotFoundError:
            return []
        return [str(system.unstrip_protocol(path)) for path, info in found.items() if info.get("type") != "directory"]

    if "::" in name:
        raise InputError(f"{name} has a wildcard and a chain of file systems: list the files, as {{000..146}}.tar")
    if is_remote(name):
        found = ask(name, matching)
    else:
        found = [path for path in glob.iglob(name, recursive=True) if not os.path.isdir(path)]
    if not found:
        raise InputError(f"no file matches {name!r}: check the path and the wildcards")
    return found


def explained(path: str, error: Exception) -> InputError:
    """What went wrong while reading a file, as one sentence."""
    if isinstance(error, InputError):
        return error
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        reason = f" ({one_line(error.__cause__)})" if error.__cause__ else ""  # such as an unreachable server
        sign_in = ", and which account you are signed in to" if is_remote(path) else ""
        return _Absent(f"there is no file {path}{reason}: check the path{sign_in}")
    if isinstance(error, PermissionError):
        return InputError(f"no permission to read {path}: {'sign in' if is_remote(path) else 'ask its owner'}")
    if isinstance(error, TimeoutError):
        return InputError(f"cannot read {path}: its server did not answer in time; try again")
    text = one_line(error) or "the reader failed"
    return InputError(f"cannot read {path}: {text} ({type(error).__name__}); check the path")


def ask(path: str, question: Callable[[AbstractFileSystem, str], T]) -> T:
    """The answer of a path's file system. A request that may succeed later is repeated."""
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
    """The file system of a URL, and the path in it. fsspec keeps one for each process and thread."""
    from fsspec.core import url_to_fs  # not at the top: local files do without

    try:
        return cast("tuple[AbstractFileSystem, str]", url_to_fs(path))
    except ImportError as error:
        needed = getattr(error.__cause__, "name", None)
        remedy = f"pip install {needed.partition('.')[0]}" if needed else str(error)
        raise InputError(f"cannot read {path}: its file system needs another package: {remedy}") from error
    except ValueError as error:
        raise InputError(f"cannot read {path}: {error}; expected s3://, gs://, hf://, https:// or the like") from error


def _status(path: str) -> os.stat_result:
    """Of a regular file on this machine."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a zero byte, or letters that a path cannot have
        raise explained(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
        raise InputError(f"{path} is {kind}: expected a file")
    return status


def _version(info: dict[str, Any]) -> str:
    version = next((info[name] for name in _VERSIONS if info.get(name)), "")
    # A listing and a single question may give the same time as different types.
    return str(version.timestamp() if isinstance(version, datetime) else version)


def _of_each(function: Callable[[str], T], paths: list[str]) -> list[T]:
    if len(paths) < 2 or not is_remote(paths[0]):
        return [function(path) for path in paths]
    with ThreadPoolExecutor(MAX_REQUESTS) as pool:
        return list(pool.map(function, paths))
