"""Local files, and remote files through fsspec (``s3://``, ``gs://``, ``hf://``, ``https://`` ...)."""

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
"""Size of a file in bytes, and its modification time or version."""

MAX_REQUESTS = 32
"""Maximum number of concurrent requests for remote files."""
MAX_FILES = 1_000_000
"""Maximum number of files per pattern."""
MAX_IMAGE_BYTES = 1 << 30
"""Maximum size of an encoded image."""
_READ_AHEAD = 4 << 20
"""Bytes per request of :func:`open_file`."""
_PAUSES = (0.5, 2.0)
"""Seconds before the second and the third attempt of a failed remote request."""
_VERSIONS = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "generation", "blob_id", "oid"),
    *("Last-Modified", "LastModified", "last_modified", "mtime", "updated", "created"),
)
"""Keys under which file systems report the version of a file, most reliable first."""
_BRACES = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}|\{([^{}]*,[^{}]*)\}")


class _Absent(InputError):
    """A missing file."""


def is_remote(path: str) -> bool:
    """Whether a path is a URL for fsspec rather than a local path."""
    return "://" in path


def stamp(path: str) -> Stamp:
    """Return the size and the modification time or version of a file.

    Raises:
        InputError: The file is missing or cannot be accessed.
    """
    if not is_remote(path):
        status = _status(path)
        return status.st_size, str(status.st_mtime_ns)
    info = ask(path, lambda system, inner: system.info(inner))
    if info.get("type") == "directory":
        raise InputError(f"{path} is a folder: expected a file")
    if not isinstance(info.get("size"), int):
        raise InputError(f"cannot use {path}: its server does not report its size; copy it to this machine first")
    return info["size"], _version(info)


def stamps(paths: list[str]) -> list[Stamp]:
    """Return :func:`stamp` of each path, concurrently for remote paths."""
    return _of_each(stamp, paths)


def state(path: str) -> str:
    """Return the size and mtime of a local file as text, ``gone`` if it is missing; empty for remote files."""
    if is_remote(path):
        return ""
    try:
        status = os.stat(path)
    except OSError:
        return "gone"
    return f"{status.st_size} {status.st_mtime_ns}"


def read_range(path: str, start: int, length: int) -> bytes:
    """Read ``length`` bytes from byte ``start``.

    Raises:
        InputError: The file is shorter, or cannot be read.
    """
    if is_remote(path):
        data = ask(path, lambda system, inner: system.cat_file(inner, start=start, end=start + length))
        if len(data) > length:
            raise InputError(
                f"cannot read a part of {path}: its server ignores range requests; copy it to this machine first"
            )
    else:
        with open_file(path) as file:
            file.seek(start)
            data = file.read(length)
    if len(data) != length:
        raise InputError(
            f"{path} ends before byte {start + length:,}: it was truncated or replaced after it was opened; start "
            "again when it is complete"
        )
    return data


def read_file(path: str, limit: int) -> bytes:
    """Read a whole file.

    Raises:
        InputError: The file has more than ``limit`` bytes, or cannot be read.
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
    """Open a file for reading, seekable; remote files with read-ahead.

    Raises:
        InputError: The file cannot be opened, or its server ignores range requests.
    """
    if not is_remote(path):
        _status(path)  # refuses named pipes, whose opening would block
        try:
            return open(path, "rb")
        except OSError as error:
            raise explained(path, error) from error

    def opened(system: AbstractFileSystem, inner: str) -> BinaryIO:
        return cast(BinaryIO, system.open(inner, "rb", block_size=_READ_AHEAD, cache_type="readahead"))

    file = ask(path, opened)
    if not file.seekable():
        file.close()
        raise InputError(f"cannot read {path}: its server ignores range requests; copy it to this machine first")
    return file


def is_file(path: str) -> bool:
    """Whether a path is a file.

    Raises:
        InputError: The server cannot be reached, or denies access.
    """
    if not is_remote(path):
        return os.path.isfile(path)
    try:
        stamp(path)
    except _Absent:
        return False
    return True


def is_folder(path: str) -> bool:
    """Whether a path is a folder; in an object store, a prefix of names.

    Raises:
        InputError: The server cannot be reached.
    """
    if not is_remote(path):
        return os.path.isdir(os.path.expanduser(path))
    try:
        return bool(ask(path, lambda system, inner: system.info(inner)).get("type") == "directory")
    except _Absent:
        return False


def subfolders(path: str) -> set[str]:
    """Return the names of the sub-folders, except hidden ones; empty if the folder cannot be listed."""
    if is_remote(path):
        listed = ask(path, lambda system, inner: system.ls(inner, detail=True))
        names = {info["name"].rstrip("/").rpartition("/")[2] for info in listed if info["type"] == "directory"}
    else:
        try:
            names = {entry.name for entry in os.scandir(path) if entry.is_dir()}
        except OSError:  # reported when the folder is read
            return set()
    return {name for name in names if not name.startswith(".")}


def folder_of(path: str) -> str:
    """Return the folder of a file, for a URL without the query."""
    return path.partition("?")[0].rpartition("/")[0] if is_remote(path) else os.path.dirname(path) or "."


def files_below(folder: str) -> dict[str, Stamp]:
    """List all files below a remote folder: path within the folder to :func:`stamp`.

    The size is -1 if the listing does not have it, as on web servers.

    Raises:
        InputError: The folder cannot be listed.
    """

    def listed(system: AbstractFileSystem, inner: str) -> dict[str, Stamp]:
        system.invalidate_cache()
        found = system.find(inner, detail=True)
        system.invalidate_cache()  # frees gigabytes for a million entries
        top = inner.rstrip("/") + "/"
        return {
            path.removeprefix(top): (info.get("size") if isinstance(info.get("size"), int) else -1, _version(info))
            for path, info in found.items()
            if path.startswith(top)
        }

    return ask(folder, listed)


def expand(pattern: str) -> list[str]:
    """Return the files that match a pattern, sorted.

    Args:
        pattern: Path or URL with ranges in braces (``{000..146}``, zero-padded as written), choices in braces
            (``{train,val}``) and the wildcards ``*``, ``?`` and ``[abc]`` (in ``http`` URLs ``?`` is literal).
            The name of an existing local file is taken literally.

    Returns:
        Paths; local ones are absolute.

    Raises:
        InputError: Nothing matches a wildcard, or a file named without a wildcard is missing.
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
        stamp(name)  # raises the cause: missing, not a regular file, or an error of the server
    return sorted({*plain, *matched})


def _alternatives(pattern: str) -> Iterator[str]:
    """Yield all expansions of the braces in a pattern."""
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
    """Return the files that match a name with wildcards."""

    def matching(system: AbstractFileSystem, inner: str) -> list[str]:
        system.invalidate_cache()  # earlier listings may be outdated
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
    """Convert an exception raised while reading a file to an InputError."""
    if isinstance(error, InputError):
        return error
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        reason = f" ({one_line(error.__cause__)})" if error.__cause__ else ""  # such as an unreachable server
        sign_in = ", and which account you are signed in to" if is_remote(path) else ""
        return _Absent(f"there is no file {path}{reason}: check the path{sign_in}")
    if isinstance(error, PermissionError):
        return InputError(f"no permission to read {path}: {'sign in' if is_remote(path) else 'change its permissions'}")
    if isinstance(error, TimeoutError):
        return InputError(f"cannot read {path}: its server did not answer in time; try again")
    text = one_line(error) or "the reader failed"
    return InputError(f"cannot read {path}: {text} ({type(error).__name__}); check the path")


def ask(path: str, question: Callable[[AbstractFileSystem, str], T]) -> T:
    """Call ``question(file system, path)`` for a remote path, with retries after temporary errors."""
    for pause in (*_PAUSES, None):
        try:
            return question(*_file_system(path))
        except Exception as error:  # each file system has its own exceptions
            permanent = isinstance(error, (InputError, FileNotFoundError, PermissionError, IsADirectoryError))
            if permanent or pause is None:
                raise explained(path, error) from error
            time.sleep(pause)
    raise AssertionError("unreachable")


def _file_system(path: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a URL, cached by fsspec per process and thread, and the path in it."""
    from fsspec.core import url_to_fs  # not needed for local files

    try:
        return cast("tuple[AbstractFileSystem, str]", url_to_fs(path))
    except ImportError as error:
        needed = getattr(error.__cause__, "name", None)
        remedy = f"pip install {needed.partition('.')[0]}" if needed else str(error)
        raise InputError(f"cannot read {path}: its file system needs another package: {remedy}") from error
    except ValueError as error:
        raise InputError(
            f"cannot read {path}: {error}; expected a URL such as s3://, gs://, hf:// or https://"
        ) from error


def _status(path: str) -> os.stat_result:
    """Return the status of a local regular file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a zero byte or an invalid character
        raise explained(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
        raise InputError(f"{path} is {kind}: expected a file")
    return status


def _version(info: dict[str, Any]) -> str:
    version = next((info[name] for name in _VERSIONS if info.get(name)), "")
    # Listings and single requests may return the same time as different types.
    return str(version.timestamp() if isinstance(version, datetime) else version)


def _of_each(function: Callable[[str], T], paths: list[str]) -> list[T]:
    if len(paths) < 2 or not is_remote(paths[0]):
        return [function(path) for path in paths]
    with ThreadPoolExecutor(MAX_REQUESTS) as pool:
        return list(pool.map(function, paths))
