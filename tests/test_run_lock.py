"""Two runs never share a directory, and a dead one never keeps it: with real processes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import Run, Server

from dino_xcit.errors import InputError
from dino_xcit.runtime import run_lock
from dino_xcit.runtime.run_lock import RunLock

OWNER = """
import os, sys, time
from pathlib import Path
from dino_xcit.runtime.run_lock import RunLock

lock = RunLock.take(Path(sys.argv[1]), refresh_seconds=0.1, watch_seconds=0.5)
for act in sys.argv[2:]:
    if act == "fork":  # a child that lives on, with the descriptor it inherited
        if not (child := os.fork()):
            time.sleep(60)
        print("child", child)
    if act == "fork and exit":  # a child that closes what it inherited, releases and ends
        if not (child := os.fork()):
            with lock:
                pass
            os.close(lock._file)
            os._exit(0)
        os.waitpid(child, 0)
    if act == "release":
        lock.release()
print("held", os.getpid(), flush=True)
time.sleep(60)
"""

Start = Callable[..., tuple[Run, dict[str, int]]]


@pytest.fixture
def start(server: Server, tmp_path: Path) -> Iterator[Start]:
    """Starts an owner of ``tmp_path`` and returns it once it is one, with the process ids it printed."""
    owners: list[Run] = []
    children: list[int] = []

    def begin(*acts: str) -> tuple[Run, dict[str, int]]:
        owner = server.launch("-c", OWNER, tmp_path, *acts)
        owners.append(owner)
        owner.until(lambda: re.search(r"held \d+\n", owner.out()) is not None)  # the whole line: it comes in pieces
        printed = {word: int(number) for word, number in map(str.split, owner.out().splitlines())}
        if "child" in printed:
            children.append(printed["child"])
        return owner, printed

    yield begin
    for owner in owners:
        owner.kill()
        owner.wait()
    for child in children:
        os.kill(child, signal.SIGKILL)


def record(folder: Path) -> dict[str, Any]:
    """Only where this process does not hold the lock: reading it ends it."""
    lines = (folder / ".lock").read_text().splitlines()
    assert len(lines) == 1
    found: dict[str, Any] = json.loads(lines[0])
    return found


def other_hosts(folder: Path, **changes: object) -> dict[str, Any]:
    """Leave the record of an owner on another host; returns it."""
    left = {"host": "faraway", "process": 77, "user": "eve", "command": "x", "started": "then", "token": "t"}
    left |= {"released": False} | changes
    (folder / ".lock").write_text(json.dumps(left) + "\n")
    return left


TAKE = """
import sys
from pathlib import Path
from dino_xcit.runtime.run_lock import RunLock

with RunLock.take(Path(sys.argv[1]), watch_seconds=0.5) as lock:
    print(lock.took_over)
"""


def take_elsewhere(server: Server, folder: Path) -> subprocess.CompletedProcess[str]:
    """What another process gets that claims the folder for a moment."""
    return server.python("-c", TAKE, folder)


def test_a_second_run_is_refused_while_the_first_lives(tmp_path: Path, start: Start) -> None:
    owner, _ = start()
    with pytest.raises(InputError) as caught:
        RunLock.take(tmp_path)
    sentence = str(caught.value)
    written = record(tmp_path)
    assert written["process"] == owner.pids[0]
    for part in (str(tmp_path), f"process {owner.pids[0]} ", written["user"], written["host"], written["started"]):
        assert part in sentence
    assert "as '-c " in sentence
    assert "--output-dir" in sentence
    assert "wait" in sentence
    with pytest.raises(InputError, match=f"process {owner.pids[0]} "):  # the refusal has not ended the owner's lock
        RunLock.take(tmp_path)


def test_a_killed_runs_folder_is_taken_over_at_once(tmp_path: Path, start: Start) -> None:
    owner, _ = start()
    owner.kill()
    owner.wait()
    begin = time.monotonic()
    with RunLock.take(tmp_path) as lock:
        assert time.monotonic() - begin < 5
        assert lock.took_over is not None
        assert lock.took_over["process"] == owner.pids[0]


def test_a_child_that_outlives_a_killed_run_does_not_keep_its_folder(tmp_path: Path, start: Start) -> None:
    owner, printed = start("fork")
    with pytest.raises(InputError, match=f"process {owner.pids[0]} "):
        RunLock.take(tmp_path)
    owner.kill()
    owner.wait()
    os.kill(printed["child"], 0)  # it lives
    with RunLock.take(tmp_path) as lock:
        assert lock.took_over is not None
        os.kill(printed["child"], 0)


def test_the_lock_is_not_lost_when_the_owner_forks(tmp_path: Path, start: Start) -> None:
    owner, _ = start("fork and exit")
    with pytest.raises(InputError, match=f"process {owner.pids[0]} "):
        RunLock.take(tmp_path)
    assert record(tmp_path)["released"] is False


def test_a_released_folder_is_free_and_nothing_was_taken_over(tmp_path: Path, start: Start) -> None:
    owner, _ = start("release")
    with RunLock.take(tmp_path) as lock:
        assert lock.took_over is None
    assert owner.codes() == [None]
    assert record(tmp_path)["released"] is True


def test_the_owner_cannot_take_it_twice_and_keeps_it_when_it_tries(server: Server, tmp_path: Path) -> None:
    with RunLock.take(tmp_path) as first:
        with pytest.raises(InputError, match=f"process {os.getpid()} ") as caught:
            RunLock.take(tmp_path)
        assert first.record["started"] in str(caught.value)
        assert f"process {os.getpid()} " in take_elsewhere(server, tmp_path).stderr
    done = take_elsewhere(server, tmp_path)
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr
    lock = RunLock.take(tmp_path)
    lock.release()
    lock.release()


def test_an_error_inside_releases_it(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunLock.take(tmp_path):
        _ = 1 / 0
    assert record(tmp_path)["released"] is True


# ---- another host, or no locks


class Heartbeat:
    """Sets the file's time as another host's owner would, with a clock of its own that is years behind."""

    def __init__(self, path: Path) -> None:
        self._path, self._end = path, threading.Event()
        self._thread = threading.Thread(target=self._beat)

    def _beat(self) -> None:
        now = 1_000_000_000
        while not self._end.wait(0.1):
            now += 1
            os.utime(self._path, (now, now))

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def test_another_host_that_refreshes_its_record_is_not_disturbed(tmp_path: Path) -> None:
    left = other_hosts(tmp_path)
    with Heartbeat(tmp_path / ".lock"), pytest.raises(InputError, match="process 77 of eve on faraway"):
        RunLock.take(tmp_path, watch_seconds=2)
    assert record(tmp_path) == left


@pytest.mark.parametrize("age", [0, 10**6, -(10**6)], ids=["now", "old", "from the future"])
def test_another_host_that_is_silent_is_taken_over_whatever_its_clock_says(tmp_path: Path, age: int) -> None:
    left = other_hosts(tmp_path)
    then = time.time() - age
    os.utime(tmp_path / ".lock", (then, then))
    begin = time.monotonic()
    with RunLock.take(tmp_path, watch_seconds=0.4) as lock:
        assert lock.took_over == left
    assert time.monotonic() - begin >= 0.4


def test_what_another_host_released_is_not_watched(tmp_path: Path) -> None:
    other_hosts(tmp_path, released=True)
    begin = time.monotonic()
    with RunLock.take(tmp_path) as lock:
        assert lock.took_over is None
    assert time.monotonic() - begin < 5


def test_a_release_while_it_is_watched_is_noticed(tmp_path: Path) -> None:
    other_hosts(tmp_path)
    timer = threading.Timer(0.3, other_hosts, (tmp_path,), {"released": True})
    timer.start()
    begin = time.monotonic()
    with RunLock.take(tmp_path, watch_seconds=20) as lock:
        assert lock.took_over is None
    timer.join()
    assert time.monotonic() - begin < 5


@pytest.fixture(params=["no fcntl", errno.ENOLCK, errno.ENOTSUP])
def without_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system, or a file system, that has no record locks."""
    if request.param == "no fcntl":
        monkeypatch.setattr(run_lock, "fcntl", None)
        return

    def refuse(*_: object) -> None:
        raise OSError(request.param, "no locks")

    monkeypatch.setattr(fcntl, "lockf", refuse)


@pytest.mark.usefixtures("without_locks")
def test_without_locks_the_refreshed_file_alone_protects_a_run(tmp_path: Path, start: Start) -> None:
    owner, _ = start()  # which has locks, but nobody here sees them
    assert record(tmp_path)["host"] == socket.gethostname()
    with pytest.raises(InputError, match=f"process {owner.pids[0]} "):
        RunLock.take(tmp_path, watch_seconds=2)
    owner.kill()
    owner.wait()
    with RunLock.take(tmp_path, watch_seconds=0.4) as lock:
        assert lock.took_over is not None
        assert lock.took_over["process"] == owner.pids[0]
    with RunLock.take(tmp_path, watch_seconds=0.4) as lock:
        assert lock.took_over is None


@pytest.mark.usefixtures("without_locks")
def test_without_locks_the_last_of_two_who_start_together_has_it(tmp_path: Path) -> None:
    timer = threading.Timer(0.3, other_hosts, (tmp_path,))
    timer.start()
    with pytest.raises(InputError, match="process 77 "):
        RunLock.take(tmp_path, watch_seconds=5)
    timer.join()
    assert record(tmp_path)["process"] == 77


def test_a_run_that_was_taken_for_dead_does_not_release_the_others_record(tmp_path: Path) -> None:
    lock = RunLock.take(tmp_path)
    left = json.dumps(record_of_another := {"host": "faraway", "process": 77, "released": False})
    os.truncate(tmp_path / ".lock", 0)  # changed in place, without a descriptor that would end the lock
    os.pwrite(lock._file, left.encode(), 0)
    lock.release()
    assert record(tmp_path) == record_of_another


# ---- odd files and folders


@pytest.mark.parametrize("content", [b"", b"\n", b"not json", b"[1]", b"\xff\xfe", b'{"host": 3}', b'{"pro'])
def test_a_damaged_lock_file_hinders_nobody(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".lock").write_bytes(content)
    with RunLock.take(tmp_path, watch_seconds=0.1) as lock:
        assert lock.took_over is None
    assert record(tmp_path)["process"] == os.getpid()


def test_folders_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / ".lock").mkdir(parents=True)
    for folder in ("file", "absent", "taken"):
        with pytest.raises(InputError, match=f"cannot write .*{folder}.*--output-dir"):
            RunLock.take(tmp_path / folder)
    if os.getuid():  # root may write everywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(InputError, match=r"cannot write .*closed.*--output-dir"):
            RunLock.take(tmp_path / "closed")


def test_a_disk_that_takes_no_record_is_named(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_lock, "_write", full)
    with pytest.raises(InputError, match="No space left"):
        RunLock.take(tmp_path)
    monkeypatch.undo()
    assert take_elsewhere(server, tmp_path).returncode == 0
