"""Two runs never share a folder, and a dead one never keeps it: with real processes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ranks import Run, Server

from dino_xcit.errors import InputError
from dino_xcit.runtime.run_lock import LOCK, OWNER, locked

OWN = """
import os, sys, time
from pathlib import Path
from dino_xcit.runtime.run_lock import locked

with locked(Path(sys.argv[1])):
    if "fork" in sys.argv and not (child := os.fork()):
        time.sleep(60)  # a child that lives on
        os._exit(0)
    print("held", child if "fork" in sys.argv else 0, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def start(server: Server, tmp_path: Path) -> Iterator[Callable[..., tuple[Run, int]]]:
    """Start an owner of ``tmp_path``; returns it once it holds the lock, and its child's process id."""
    children: list[int] = []
    owners: list[Run] = []

    def begin(*acts: str) -> tuple[Run, int]:
        owners.append(server.launch("-c", OWN, tmp_path, *acts))
        owners[-1].until(lambda: re.search(r"held \d+\n", owners[-1].out()) is not None)
        children.append(int(owners[-1].out().split()[1]))
        return owners[-1], children[-1]

    yield begin
    for owner in owners:
        owner.kill()
        owner.wait()
    for child in filter(None, children):
        os.kill(child, signal.SIGKILL)


def take(folder: Path) -> None:
    with locked(folder):
        pass


def test_a_second_process_is_refused_and_told_the_owner(tmp_path: Path, start: Callable[..., tuple[Run, int]]) -> None:
    owner, _ = start()
    written = json.loads((tmp_path / OWNER).read_text())
    assert written["process"] == owner.pids[0]
    for _ in range(2):  # a refusal does not end the owner's lock
        with pytest.raises(InputError) as caught:
            take(tmp_path)
        for part in (tmp_path, written["process"], written["host"], written["started"]):
            assert str(part) in str(caught.value)


def test_a_killed_owner_loses_it_and_its_forked_child_does_not_keep_it(
    tmp_path: Path, start: Callable[..., tuple[Run, int]]
) -> None:
    owner, child = start("fork")
    with pytest.raises(InputError, match=f"process {owner.pids[0]} "):
        take(tmp_path)
    owner.kill()
    owner.wait()
    take(tmp_path)
    os.kill(child, 0)  # it lives


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
