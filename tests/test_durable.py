"""Files that are whole or absent."""

from __future__ import annotations

import builtins
import errno
import hashlib
import json
import os
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from dino_xcit.runtime import atomic


def read(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    for name, digest in (
        ("a.pth", atomic.write_torch(tmp_path / "a.pth", {"weights": torch.randn(300, 300)})),
        ("a.json", atomic.write_json(tmp_path / "a.json", {"step": 3})),
    ):
        data = (tmp_path / name).read_bytes()
        assert digest == atomic.Digest(len(data), hashlib.sha256(data).hexdigest())
        assert digest == atomic.digest_of(tmp_path / name)
    assert json.loads((tmp_path / "a.json").read_text()) == {"step": 3}


class FullDisk:
    """A file that takes so many bytes and then reports a full disk."""

    def __init__(self, file: IO[bytes], room: int) -> None:
        self._file, self._room = file, room

    def write(self, data: bytes) -> int:
        self._room -= len(data)
        if self._room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@pytest.mark.parametrize("room", [0, 100, 5000, 100_000])
def test_a_full_disk_is_reported_as_such_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    path = tmp_path / "checkpoint.pth"
    atomic.write_torch(path, {"step": 1})

    def nearly_full(path: Path, mode: str) -> FullDisk:
        return FullDisk(builtins.open(path, mode), room)

    monkeypatch.setattr(atomic, "open", nearly_full, raising=False)
    with pytest.raises(OSError, match="No space left") as caught:
        atomic.write_torch(path, {"step": 2, "weights": torch.zeros(100_000)})
    assert caught.value.errno == errno.ENOSPC
    assert read(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_an_interrupted_write_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pth"
    atomic.write_torch(path, {"step": 1})

    def interrupted(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        atomic.write_torch(path, {"step": 2})
    assert read(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_a_disk_that_gives_back_other_bytes_is_found_out_before_the_old_file_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.pth"
    atomic.write_torch(path, {"step": 1})
    fsync = os.fsync

    def flip_a_bit(descriptor: int) -> None:
        fsync(descriptor)
        aside = atomic.aside_of(path)
        data = bytearray(aside.read_bytes())
        data[len(data) // 2] ^= 1
        aside.write_bytes(data)

    monkeypatch.setattr(os, "fsync", flip_a_bit)
    with pytest.raises(atomic.DamagedWrite, match="reads back otherwise"):
        atomic.write_torch(path, {"step": 2})
    assert read(path) == {"step": 1}


def test_a_second_name_is_the_same_file_and_replaces_what_had_it(tmp_path: Path) -> None:
    first, second, name = tmp_path / "first", tmp_path / "second", tmp_path / "latest"
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    atomic.give_name(first, name)
    assert os.path.samefile(first, name)
    atomic.give_name(second, name)
    atomic.give_name(second, name)  # once more does no harm
    assert os.path.samefile(second, name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "latest", "second"]


def test_where_there_are_no_hard_links_a_name_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, name = tmp_path / "file", tmp_path / "latest"
    file.write_bytes(b"12345")

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    atomic.give_name(file, name)
    assert name.read_bytes() == b"12345"
    assert not os.path.samefile(file, name)


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".checkpoint.pth.tmp", ".a.json.tmp", "checkpoint.pth", ".lock"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".features.tmp").mkdir()
    atomic.remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".features.tmp", ".lock", "checkpoint.pth"]
