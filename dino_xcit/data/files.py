"""Files by path: on this machine, or wherever fsspec reaches (``s3://``, ``gs://``, ``hf://``, ``https://`` ...)."""

from __future__ import annotations

import contextlib
import os
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

AT_ONCE = 32
"""Requests that are under way together where many remote files are looked at."""
_BLOCK = 4 << 20
"""Bytes that scanning a remote file asks for at once: 30 ms of waiting are then few beside the transfer."""
_PAUSES = (0.5, 2.0)
"""Seconds before a remote request that failed is tried a second and a third time."""
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_VERSIONS = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "generation", "blob_id", "oid"),
    *("Last-Modified", "LastModified", "last_modified", "mtime", "updated", "created"),
)
"""What file systems call that which changes with a file's content, the surest first."""


def is_remote(path: str) -> bool:
    """Whether a path is a URL that fsspec reads, rather than a path on this machine."""
    return "://" in path


def stamp(path: str) -> Stamp:
    """A file's size, and its time or what its server calls its version.

    Raises:
        InputError: there is no such file, or it cannot be reached.
    """
    if not is_remote(path):
        try:
            status = os.stat(path)
        except OSError as error:
            raise _unreachable(path, error) from error
        _demand_file(path, status)
        return _stamp_of_status(status)
    return _stamp_of(path, ask(path, lambda system, inner: system.info(inner)))


def stamps(paths: list[str]) -> list[Stamp]:
    """:func:`stamp` of each path; of remote ones several at once."""
    return of_each(stamp, paths)


def read_range(path: str, start: int, length: int, unchanged: Stamp | None = None) -> bytes:
    """``length`` bytes from byte ``start`` on.

    Args:
        path: of the file.
        start, length: in bytes.
        unchanged: refuse a file on this machine that has another stamp; of a remote one it would be a request more.

    Raises:
        InputError: there are fewer, or the file cannot be read, or has changed.
    """
    if is_remote(path):
        data = ask(path, lambda system, inner: system.cat_file(inner, start=start, end=start + length))
        if len(data) > length:
            raise InputError(
                f"cannot read a part of {path}: its server sends the whole file instead (it ignores ranges): copy the "
                "file to this machine, or to a server that knows ranges"
            )
    else:
        with _opened(path, unchanged) as file, _explaining(path):
            file.seek(start)
            data = file.read(length)
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
        data = ask(path, lambda system, inner: _at_most(system, inner, limit + 1))
    else:
        with _opened(path) as file, _explaining(path):
            data = file.read(min(os.fstat(file.fileno()).st_size, limit + 1))
    if len(data) > limit:
        raise InputError(f"{path} has more than {limit:,} bytes, the most that is read of such a file: check the path")
    return data


def open_file(path: str, unchanged: Stamp | None = None) -> BinaryIO:
    """A file to look through from its beginning: it can seek, and reads ahead where it is remote.

    Args:
        path: of the file.
        unchanged: as in :func:`read_range`.

    Raises:
        InputError: it cannot be opened, has changed, or its server sends whole files only. Errors while reading it
            are the caller's, under :func:`explained`.
    """
    if not is_remote(path):
        return _opened(path, unchanged)

    def opened(system: AbstractFileSystem, inner: str) -> BinaryIO:
        return cast(BinaryIO, system.open(inner, "rb", block_size=_BLOCK, cache_type="readahead"))

    file = ask(path, opened)
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
        return bool(ask(path, lambda system, inner: system.info(inner)).get("type") == "directory")
    except _Absent:
        return False


def folder_of(path: str) -> str:
    """The folder of a file; of a URL without what stands behind a question mark."""
    return path.partition("?")[0].rpartition("/")[0] if is_remote(path) else os.path.dirname(path) or "."


def files_below(folder: str) -> dict[str, Stamp]:
    """All files at any depth below a remote folder: path within the folder to :func:`stamp`.

    The size is -1 where the listing does not tell (web servers' do not).

    Raises:
        InputError: it cannot be listed.
    """

    def listed(system: AbstractFileSystem, inner: str) -> dict[str, Stamp]:
        system.invalidate_cache()
        found = system.find(inner, detail=True)
        system.invalidate_cache()  # a million entries are gigabytes there
        top = inner.rstrip("/") + "/"
        return {
            path.removeprefix(top): (info.get("size") if isinstance(info.get("size"), int) else -1, _version_of(info))
            for path, info in found.items()
            if path.startswith(top)
        }

    return ask(folder, listed)


def explained(path: str, error: Exception) -> InputError:
    """What went wrong while reading a file, as one sentence."""
    if isinstance(error, InputError):
        return error
    if isinstance(error, FileNotFoundError):
        remote = ", and what you are signed in to" if is_remote(path) else ""
        reason = f" ({one_line(error.__cause__)})" if error.__cause__ else ""  # a server that cannot be reached, say
        return _Absent(f"there is no file {path}{reason}: check the path{remote}")
    if isinstance(error, PermissionError):
        remedy = "sign in" if is_remote(path) else "run as somebody who may"
        return InputError(f"no permission to read {path}: {remedy}, or ask its owner")
    if isinstance(error, TimeoutError):
        return InputError(f"cannot read {path}: its server did not answer in time; try again")
    text = one_line(error) or "the reader failed"
    where = "server" if is_remote(path) else "disk"
    return InputError(
        f"cannot read {path}: {text} ({type(error).__name__}); check the path, and that its {where} is well"
    )


class _Absent(InputError):
    """There is no such file."""


def _opened(path: str, unchanged: Stamp | None = None) -> BinaryIO:
    """A regular file on this machine, open."""
    try:
        file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 - the caller's
    except ValueError as error:  # a zero byte, or letters that this system's paths cannot have
        raise explained(path, error) from error
    except OSError as error:
        with contextlib.suppress(OSError):  # a socket cannot be opened, and the error does not say why
            _demand_file(path, os.stat(path))
        raise _unreachable(path, error) from error
    try:
        status = os.fstat(file.fileno())
        _demand_file(path, status)
        if unchanged not in (None, _stamp_of_status(status)):
            raise InputError(f"{path} was replaced or changed since it was opened; start the same command again")
    except BaseException:
        file.close()
        raise
    return file


def _without_waiting(path: str, flags: int) -> int:
    """Opening a named pipe would wait for somebody to write into it, for ever."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _demand_file(path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise InputError(f"{path} is {kind}: expected a file")


def _stamp_of_status(status: os.stat_result) -> Stamp:
    return status.st_size, str(status.st_mtime_ns)


def _unreachable(path: str, error: OSError) -> InputError:
    return explained(path, FileNotFoundError() if isinstance(error, NotADirectoryError) else error)


@contextlib.contextmanager
def _explaining(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise explained(path, error) from error


def ask(path: str, question: Callable[[AbstractFileSystem, str], T]) -> T:
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


def _stamp_of(path: str, info: dict[str, Any]) -> Stamp:
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


def of_each(function: Callable[[str], T], paths: list[str]) -> list[T]:
    """A function of each path, in order; several at once where they are remote."""
    if len(paths) < 2 or not is_remote(paths[0]):
        return [function(path) for path in paths]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(function, paths))
