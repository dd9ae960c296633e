"""The stored index of a data set: reuse, sharing between processes, and replacement if damaged."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from dino_xcit.data import index as module
from dino_xcit.data.index import Index, Strings, cache_folder, cached
from dino_xcit.errors import InputError
from dino_xcit.runtime import atomic
from dino_xcit.runtime import logging as log

TEXTS = ["a", "", "ü/ß.png", "new\nline", "zero\udcff", "日本"]


class Built:
    """Builds an index and counts the builds."""

    def __init__(self, value: int = 1, length: int = 6) -> None:
        self.value, self.length, self.times = value, length, 0

    def __call__(self) -> Index:
        self.times += 1
        numbers = np.arange(self.length, dtype=np.int64) * self.value
        return Index({"offset": numbers}, {"name": Strings.pack(TEXTS), "none": Strings.pack([])})


def accept_all(_: Index) -> bool:
    return True


def assert_is(index: Index, built: Built) -> None:
    assert index.numbers["offset"].tolist() == [place * built.value for place in range(built.length)]
    assert list(index.strings["name"]) == TEXTS
    assert len(index.strings["none"]) == 0


def stored(tmp_path: Path) -> list[Path]:
    return sorted(tmp_path.glob("index/*.safetensors"))


def test_strings_are_indexed_by_position() -> None:
    texts = Strings.pack(TEXTS)
    assert list(texts) == TEXTS
    assert texts[-1] == "日本"
    for beyond in (6, -7):
        with pytest.raises(IndexError):
            texts[beyond]


def test_index_is_built_once_and_memory_mapped(tmp_path: Path) -> None:
    built = Built()
    for _ in range(3):
        index = cached("x", built, accept_all, tmp_path)
        assert_is(index, built)
        base: object = index.numbers["offset"]
        while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap)
    assert built.times == 1


def test_outdated_index_is_rebuilt_and_removed_after_max_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Built(1), Built(2)
    used = cached("x", first, accept_all, tmp_path)
    other = cached("y", first, accept_all, tmp_path)
    assert_is(cached("x", second, lambda index: index.numbers["offset"][1] == 2, tmp_path), second)
    assert_is(pickle.loads(pickle.dumps(used)), first)  # a run may still be reading it
    assert len(stored(tmp_path)) == 3
    monkeypatch.setattr(module, "MAX_AGE", -1)
    cached("x", Built(3), lambda index: index.numbers["offset"][1] == 3, tmp_path)
    assert len(stored(tmp_path)) == 2
    assert Path(other.file) in stored(tmp_path)


def test_pickled_index_is_a_path_and_missing_file_raises_input_error(tmp_path: Path) -> None:
    built = Built(length=100_000)
    index = cached("x", built, accept_all, tmp_path)
    travelling = pickle.dumps(index)
    assert len(travelling) < 1000
    assert_is(pickle.loads(travelling), built)
    assert_is(pickle.loads(pickle.dumps(built())), built)  # an index that is not stored
    os.unlink(index.file)
    with pytest.raises(InputError, match="was removed"):
        pickle.loads(travelling)


DAMAGES = {
    "empty": lambda file: file.write_bytes(b""),
    "cut short": lambda file: os.truncate(file, 150),
    "another bit": lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])),
    "a pickle": lambda file: file.write_bytes(pickle.dumps([1])),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_index_is_rebuilt(tmp_path: Path, kind: str) -> None:
    built = Built()
    cached("x", built, accept_all, tmp_path)
    DAMAGES[kind](stored(tmp_path)[0])
    assert_is(cached("x", built, accept_all, tmp_path), built)
    assert built.times == 2
    if kind != "a folder":
        assert cached("x", built, accept_all, tmp_path).file
        assert built.times == 2


def test_unwritable_cache_is_bypassed_and_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log.warn_once.cache_clear()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DINO_XCIT_CACHE", str(tmp_path / "file"))
    assert cache_folder() == tmp_path / "file"
    built = Built()
    for _ in range(2):
        assert_is(cached("x", built, accept_all), built)
    assert built.times == 2
    assert capsys.readouterr().out.count("set DINO_XCIT_CACHE") == 1


def test_full_disk_returns_built_index_without_storing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "write", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    built = Built()
    assert_is(cached("x", built, accept_all, tmp_path), built)
    assert built.times == 1
    assert stored(tmp_path) == []


def _build_slowly(folder: Path, go: Event, record: Path) -> None:
    def build() -> Index:
        with open(record, "a") as file:
            file.write("built\n")
        time.sleep(0.1)
        return Built()()

    go.wait()
    assert_is(cached("x", build, accept_all, folder), Built())


def test_only_one_of_concurrent_processes_builds_the_index(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    go = context.Event()
    record = tmp_path / "record"
    processes = [context.Process(target=_build_slowly, args=(tmp_path, go, record)) for _ in range(3)]
    for process in processes:
        process.start()
    go.set()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 3
    assert record.read_text() == "built\n"
