"""Locks of output directories, tested with real processes: one run per folder, and no lock outlives its process."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
from pathlib import Path

import pytest
from ranks import Server

from dino_xcit.errors import InputError
from dino_xcit.runtime.run_lock import LOCK, OWNER, locked

OWNER_WITH_A_CHILD = """
import os, sys, time
from pathlib import Path
from dino_xcit.runtime.run_lock import locked

with locked(Path(sys.argv[1])):
    if child := os.fork():
        print("held", child, flush=True)
    time.sleep(60)
"""


def take(folder: Path) -> None:
    with locked(folder):
        pass


def test_lock_refuses_others_until_owner_dies_even_with_forked_child(tmp_path: Path, server: Server) -> None:
    owner = server.launch("-c", OWNER_WITH_A_CHILD, tmp_path)
    owner.until(lambda: "\n" in owner.out())
    child = int(owner.out().split()[1])
    try:
        written = json.loads((tmp_path / OWNER).read_text())
        assert written["process"] == owner.pids[0]
        for _ in range(2):  # a refused attempt does not release the owner's lock
            with pytest.raises(InputError) as caught:
                take(tmp_path)
            for part in (tmp_path, written["process"], written["host"], written["started"]):
                assert str(part) in str(caught.value)
        owner.kill()
        owner.wait()
        take(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)  # raises if the child is not alive


def test_lock_is_released_at_exit_and_after_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        _ = 1 / 0
    with locked(tmp_path), pytest.raises(InputError, match=f"process {os.getpid()} "):
        take(tmp_path)
    take(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe", b'{"pro'])
def test_lock_works_with_damaged_owner_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / OWNER).write_bytes(content)
    with locked(tmp_path):
        (tmp_path / OWNER).write_bytes(content)
        with pytest.raises(InputError, match="in use"):
            take(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_lock_refuses_file_system_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(InputError, match=f"file system with flock.*{os.strerror(number)}|{os.strerror(number)}.*flock"):
        take(tmp_path)


def test_lock_error_names_unusable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / LOCK).mkdir(parents=True)
    for folder in ("file", "taken"):
        with pytest.raises(InputError, match=str(tmp_path / folder)):
            take(tmp_path / folder)
