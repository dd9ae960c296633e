"""Atomic file writes: a failed write keeps the old file and leaves no temporary file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import IO

import pytest
import torch

from dino_xcit.runtime import atomic


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An existing file to replace."""
    path = tmp_path / "checkpoint.pth"
    atomic.write_torch(path, {"step": 1})
    return path


def assert_as_it_was(path: Path) -> None:
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pth"]


def test_write_returns_digest_of_file(tmp_path: Path) -> None:
    for name, digest in (
        ("a.pth", atomic.write_torch(tmp_path / "a.pth", {"weights": torch.randn(300, 300)})),
        ("a.json", atomic.write_json(tmp_path / "a.json", {"step": 3})),
    ):
        data = (tmp_path / name).read_bytes()
        assert digest == atomic.Digest(len(data), hashlib.sha256(data).hexdigest())
        assert digest == atomic.digest_of(tmp_path / name)
    assert json.loads((tmp_path / "a.json").read_text()) == {"step": 3}


@pytest.mark.parametrize("numbers", [1, 100_000])  # the error occurs at the flush, or within torch.save
def test_write_to_full_disk_raises_enospc_and_keeps_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, numbers: int
) -> None:
    def on_a_full_disk(path: Path, mode: str) -> IO[bytes]:
        path.touch()
        return open("/dev/full", mode)

    monkeypatch.setattr(atomic, "open", on_a_full_disk, raising=False)
    with pytest.raises(OSError, match="No space left") as caught:
        atomic.write_torch(path, {"step": 2, "weights": torch.zeros(numbers)})
    assert caught.value.errno == errno.ENOSPC
    assert_as_it_was(path)


def test_interrupted_write_keeps_old_file_and_removes_temporary_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        atomic.write_torch(path, {"step": 2})
    assert_as_it_was(path)


def test_write_detects_corrupted_bytes_and_keeps_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def flip_a_bit(descriptor: int) -> None:
        fsync(descriptor)
        aside = atomic.aside_of(path)
        data = bytearray(aside.read_bytes())
        data[len(data) // 2] ^= 1
        aside.write_bytes(data)

    monkeypatch.setattr(os, "fsync", flip_a_bit)
    with pytest.raises(atomic.DamagedWrite, match="differs from the data written"):
        atomic.write_torch(path, {"step": 2})
    assert_as_it_was(path)


def test_give_name_links_file_and_replaces_old_link(tmp_path: Path) -> None:
    first, second, name = tmp_path / "first", tmp_path / "second", tmp_path / "latest"
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    atomic.give_name(first, name)
    assert os.path.samefile(first, name)
    atomic.give_name(second, name)
    atomic.give_name(second, name)  # repeating it changes nothing
    assert os.path.samefile(second, name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "latest", "second"]


def test_give_name_copies_file_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, name = tmp_path / "file", tmp_path / "latest"
    file.write_bytes(b"12345")

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    atomic.give_name(file, name)
    assert name.read_bytes() == b"12345"
    assert not os.path.samefile(file, name)


def test_remove_leftovers_deletes_only_temporary_files(tmp_path: Path) -> None:
    for name in (".checkpoint.pth.tmp", ".a.json.tmp", "checkpoint.pth", ".lock"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".features.tmp").mkdir()
    atomic.remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".features.tmp", ".lock", "checkpoint.pth"]
