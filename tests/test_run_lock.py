"""Two runs never share a folder, and a dead one never keeps it: with real processes."""

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


def test_a_second_process_is_refused_until_the_owner_is_killed_and_a_forked_child_does_not_keep_the_folder(
    tmp_path: Path, server: Server
) -> None:
    owner = server.launch("-c", OWNER_WITH_A_CHILD, tmp_path)
    owner.until(lambda: "\n" in owner.out())
    child = int(owner.out().split()[1])
    try:
        written = json.loads((tmp_path / OWNER).read_text())
        assert written["process"] == owner.pids[0]
        for _ in range(2):  # a refusal does not end the owner's lock
            with pytest.raises(InputError) as caught:
                take(tmp_path)
            for part in (tmp_path, written["process"], written["host"], written["started"]):
                assert str(part) in str(caught.value)
        owner.kill()
        owner.wait()
        take(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)  # it lived


def test_it_is_released_at_the_end_and_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        _ = 1 / 0
    with locked(tmp_path), pytest.raises(InputError, match=f"process {os.getpid()} "):
        take(tmp_path)
    take(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe", b'{"pro'])
def test_a_damaged_owner_file_hinders_nobody(tmp_path: Path, content: bytes) -> None:
    (tmp_path / OWNER).write_bytes(content)
    with locked(tmp_path):
        (tmp_path / OWNER).write_bytes(content)
        with pytest.raises(InputError, match="in use"):
            take(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(InputError, match="flock"):
        take(tmp_path)


def test_folders_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / LOCK).mkdir(parents=True)
    for folder in ("file", "taken"):
        with pytest.raises(InputError, match=folder):
            take(tmp_path / folder)
