"""One run a directory: a lock that ends with its process, however that ends, and that tells who holds it."""

from __future__ import annotations

import errno
import getpass
import json
import os
import shlex
import socket
import sys
import textwrap
import threading
import time
import uuid
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from dino_xcit.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: there the refreshed file alone tells of an owner
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
REFRESH_SECONDS = 10.0
WATCH_SECONDS = 25.0
_MOST_BYTES = 1 << 16
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_WHO = ("host", "process", "user", "command", "started")

_held: dict[tuple[int, int, int], dict[str, Any]] = {}
"""(process id, device, inode) of each lock file that is held here, to its record; a forked child holds none."""


class RunLock:
    """This process's claim on a directory.

    It is a record lock (``fcntl.lockf``) on a file in the directory, not ``flock``: a record lock belongs to the
    process alone, so it vanishes with it and no child that outlives it can keep it. The price is that closing any
    descriptor of that file gives it up: nothing else in this process may open it.

    Where such locks do not reach (some network file systems), the file's time is the sign of life: its owner
    refreshes it, and who finds another host's record watches for a while whether it does.
    """

    took_over: dict[str, Any] | None
    """The record of an owner that ended without a word (killed, crashed), where there was one.

    host, process (its id), user, command and started, for a person to read.
    """
    record: dict[str, Any]
    """The same of this process, as it stands in the file."""

    def __init__(self, path: Path, file: int, took_over: dict[str, Any] | None, refresh_seconds: float) -> None:
        """Use :meth:`take`."""
        self.took_over = took_over
        self._path, self._file, self._process = path, file, os.getpid()
        self.record = _own_record()
        self._ended = threading.Event()
        self._refreshing = threading.Thread(target=self._refresh, args=(refresh_seconds,), name="run lock", daemon=True)

    @classmethod
    def take(
        cls, folder: Path, *, refresh_seconds: float = REFRESH_SECONDS, watch_seconds: float = WATCH_SECONDS
    ) -> RunLock:
        """Claim a folder that exists.

        Args:
            folder: where no other run shall write.
            refresh_seconds: how often to give a sign of life.
            watch_seconds: how long to look for another host's, more than twice the above.

        Raises:
            InputError: another run holds it, who is in the sentence, or the folder cannot be written.
        """
        path = folder / NAME
        silent: dict[str, Any] | None = None
        while True:
            file, locked = _open(path, folder)
            previous = _read(file)
            alive_perhaps = bool(previous) and not previous.get("released")
            if not alive_perhaps or previous == silent or (locked and previous.get("host") == socket.gethostname()):
                break
            os.close(file)  # not held meanwhile: it has to be opened again and again, see _is_refreshed
            if _is_refreshed(path, watch_seconds):
                raise _in_use(folder, previous)
            silent = previous
        lock = cls(path, file, previous if alive_perhaps and "process" in previous else None, refresh_seconds)
        try:
            _write(file, lock.record)
            if not locked:  # two may have watched the same dead owner: the one who wrote last has it
                time.sleep(min(1.0, watch_seconds / 5))
                if (winner := _read(file)) != lock.record:
                    raise _in_use(folder, winner)
        except OSError as error:
            os.close(file)
            raise _not_writable(folder, error) from error
        except InputError:
            os.close(file)
            raise
        _held[lock._key()] = lock.record
        lock._refreshing.start()
        return lock

    def release(self) -> None:
        """Give the folder back, so that the next run need not look whether this one lives. Does nothing in a child."""
        if self._ended.is_set() or os.getpid() != self._process:
            return
        self._ended.set()
        self._refreshing.join()
        _held.pop(self._key(), None)
        try:
            if _read(self._file) == self.record:  # and not of one who thought this run dead
                _write(self._file, self.record | {"released": True})
        except OSError:  # a full or vanished disk: the next run finds a dead owner instead
            pass
        finally:
            os.close(self._file)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _key(self) -> tuple[int, int, int]:
        return _key(os.fstat(self._file))

    def _refresh(self, seconds: float) -> None:
        target = self._file if os.utime in os.supports_fd else self._path
        while not self._ended.wait(seconds):
            try:
                os.utime(target)
            except OSError:  # a disk that is away for a while; the next one may reach it
                continue


def _key(status: os.stat_result) -> tuple[int, int, int]:
    return os.getpid(), status.st_dev, status.st_ino


def _open(path: Path, folder: Path) -> tuple[int, bool]:
    """A descriptor of the lock file, and whether the system has locked it for this process.

    Raises:
        InputError: another process has, or the file cannot be opened.
    """
    try:
        # By its number, before it is opened: closing that descriptor would end the lock that is there.
        if path.exists() and (mine := _held.get(_key(path.stat()))):
            raise _in_use(folder, mine)
        file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        raise _not_writable(folder, error) from error
    if fcntl is None:
        return file, False
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS_HERE:
            return file, False
        owner = _owner_who_just_came(file)
        os.close(file)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise _in_use(folder, owner) from error
        raise _not_writable(folder, error) from error
    return file, True


def _owner_who_just_came(file: int) -> dict[str, Any]:
    """The record of the process that holds the lock, which may not have written it yet."""
    for _ in range(10):
        owner = _read(file)
        if owner and not owner.get("released"):
            break
        time.sleep(0.1)
    return owner


def _is_refreshed(path: Path, seconds: float) -> bool:
    """Whether the file's time or its content changes within ``seconds``: times are compared with each other alone."""
    first = None
    end = time.monotonic() + seconds
    while True:
        try:
            file = os.open(path, os.O_RDONLY)  # anew each time: a network file system then asks its server
        except FileNotFoundError:
            return False
        try:
            seen = os.fstat(file).st_mtime_ns, _read(file)
        finally:
            os.close(file)
        if seen[1].get("released"):
            return False
        if first is not None and seen != first:
            return True
        first = seen
        if time.monotonic() >= end:
            return False
        time.sleep(min(1.0, seconds / 20))


def _own_record() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "user": _user(),
        "command": shlex.join(sys.argv),
        "started": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        "token": uuid.uuid4().hex,
        "released": False,
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return f"user {os.getuid()}" if hasattr(os, "getuid") else "unknown user"


def _read(file: int) -> dict[str, Any]:
    """The record; empty for an empty file, and for one in which something else stands, that something."""
    os.lseek(file, 0, os.SEEK_SET)
    text = os.read(file, _MOST_BYTES)
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    if isinstance(record, dict) and all(key in record for key in _WHO):
        return record
    return {"unknown": text.decode("utf-8", "replace")} if text.strip() else {}


def _write(file: int, record: dict[str, Any]) -> None:
    line = json.dumps(record).encode() + b"\n"
    os.lseek(file, 0, os.SEEK_SET)
    os.write(file, line)
    os.ftruncate(file, len(line))  # afterwards, so that a reader never finds nothing


def _in_use(folder: Path, owner: dict[str, Any]) -> InputError:
    if "process" in owner:
        command = textwrap.shorten(str(owner["command"]), 200, placeholder=" ...")
        who = (
            f"process {owner['process']} of {owner['user']} on {owner['host']}, "
            f"started {owner['started']} as {command!r}"
        )
    else:
        who = f"a process that has left no name in {NAME}"
    return InputError(
        f"{folder} is in use by another run: {who}; give another --output-dir, or wait until it has ended"
    )


def _not_writable(folder: Path, error: OSError) -> InputError:
    return InputError(
        f"cannot write {folder / NAME}: {error.strerror or error}; give an --output-dir that can be written"
    )
