"""The stored index: kept, found again, shared, never believed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest

from dino_xcit.data.index import Index, Strings, cache_folder, cached
from dino_xcit.errors import InputError
from dino_xcit.runtime import atomic

TEXTS = ["a", "", "ü/ß.png", "new\nline", "zero\udcff", "日本"]


class Built:
    """An index, and how often it was built."""

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


def test_texts_are_found_by_number() -> None:
    texts = Strings.pack(TEXTS)
    assert list(texts) == TEXTS
    assert texts[-1] == "日本"
    for beyond in (6, -7):
        with pytest.raises(IndexError):
            texts[beyond]


def test_an_index_is_built_once_and_mapped_after(tmp_path: Path) -> None:
    built = Built()
    for _ in range(3):
        index = cached("x", built, accept_all, tmp_path)
        assert_is(index, built)
        base: object = index.numbers["offset"]
        while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap)
        assert not index.numbers["offset"].flags.writeable
    assert built.times == 1


def test_an_index_that_no_longer_holds_is_replaced(tmp_path: Path) -> None:
    first, second = Built(1), Built(2)
    del_me = cached("x", first, accept_all, tmp_path)
    del del_me
    assert_is(cached("x", second, lambda index: index.numbers["offset"][1] == 2, tmp_path), second)
    assert len(list(tmp_path.glob("index/*/meta.json"))) == 1
    cached("y", first, accept_all, tmp_path)
    assert len(list(tmp_path.glob("index/*/meta.json"))) == 2
    assert (first.times, second.times) == (2, 1)


def test_an_index_in_use_is_not_removed(tmp_path: Path) -> None:
    first, second = Built(1), Built(2)
    used = cached("x", first, accept_all, tmp_path)
    cached("x", second, lambda index: index.numbers["offset"][1] == 2, tmp_path)
    assert_is(pickle.loads(pickle.dumps(used)), first)
    assert os.path.isdir(used.folder)


def test_what_is_not_worth_keeping_leaves_no_index(tmp_path: Path) -> None:
    def build() -> Index:
        return Index({}, {"name": Strings.pack(["a"])}, keep=False)

    assert cached("x", build, accept_all, tmp_path).folder == ""
    assert not list(tmp_path.glob("index/*/meta.json"))


def test_a_pickled_index_is_a_path_and_a_lost_one_a_sentence(tmp_path: Path) -> None:
    built = Built(length=100_000)
    index = cached("x", built, accept_all, tmp_path)
    travelling = pickle.dumps(index)
    assert len(travelling) < 1000
    assert_is(pickle.loads(travelling), built)
    assert_is(pickle.loads(pickle.dumps(built())), built)  # one that is nowhere but in memory
    shutil.rmtree(index.folder)
    with pytest.raises(InputError, match="removed or replaced"):
        pickle.loads(travelling)


# ---- damage


def _places(tmp_path: Path) -> tuple[Path, ...]:
    (meta,) = tmp_path.glob("index/*/meta.json")
    return meta, meta.parent / "numbers.offset.npy", meta.parent / "ends.name.npy"


def _with(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES = {
    "meta is empty": lambda meta, numbers, ends: meta.write_text(""),
    "meta is a list": lambda meta, numbers, ends: meta.write_text("[]"),
    "meta is deep": lambda meta, numbers, ends: meta.write_text("[" * 500_000),
    "meta is of another version": lambda meta, numbers, ends: _with(meta, version=0),
    "meta names nothing": lambda meta, numbers, ends: _with(meta, arrays={}),
    "meta leads elsewhere": lambda meta, numbers, ends: _with(meta, arrays={"numbers.../../x": {"length": 1}}),
    "a file is gone": lambda meta, numbers, ends: numbers.unlink(),
    "a file is cut short": lambda meta, numbers, ends: os.truncate(numbers, 150),
    "a bit is another": lambda meta, numbers, ends: numbers.write_bytes(
        numbers.read_bytes()[:-1] + bytes([numbers.read_bytes()[-1] ^ 1])
    ),
    "a file is a pickle": lambda meta, numbers, ends: numbers.write_bytes(pickle.dumps([1])),
    "a file is an archive": lambda meta, numbers, ends: numbers.write_bytes(b"PK\x03\x04" + bytes(100)),
    "objects": lambda meta, numbers, ends: np.save(numbers, np.array([{}], dtype=object), allow_pickle=True),
    "a folder in its place": lambda meta, numbers, ends: (numbers.unlink(), numbers.mkdir()),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_index_is_built_anew(tmp_path: Path, kind: str) -> None:
    built = Built()
    cached("x", built, accept_all, tmp_path)
    DAMAGES[kind](*_places(tmp_path))
    assert_is(cached("x", built, lambda index: "offset" in index.numbers, tmp_path), built)
    assert built.times == 2
    assert_is(cached("x", built, lambda index: "offset" in index.numbers, tmp_path), built)
    assert built.times == 2


@pytest.mark.parametrize("ends", [[1, 0, 5, 6, 7, 8], [1, 1, 9, 18, 23, 10**9], [-5, 1, 9, 18, 23, 29]])
def test_texts_that_lie_beyond_their_bytes_are_not_believed(tmp_path: Path, ends: list[int]) -> None:
    built = Built()
    cached("x", built, accept_all, tmp_path)
    meta, _, file = _places(tmp_path)
    np.save(file, np.array(ends, dtype=np.int64))
    arrays = json.loads(meta.read_text())["arrays"]
    arrays["ends.name"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    _with(meta, arrays=arrays)
    assert_is(cached("x", built, accept_all, tmp_path), built)
    assert built.times == 2


def test_what_accept_stumbles_over_is_built_anew(tmp_path: Path) -> None:
    built = Built()
    cached("x", built, accept_all, tmp_path)
    assert_is(cached("x", built, lambda index: bool(index.numbers["absent"][0]), tmp_path), built)
    assert built.times == 2


def test_a_cache_that_cannot_be_written_is_done_without_and_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DINO_XCIT_CACHE", str(tmp_path / "file"))
    assert cache_folder() == tmp_path / "file"
    built = Built()
    for _ in range(2):
        assert_is(cached("x", built, accept_all), built)
    assert built.times == 2
    told = capsys.readouterr().err
    assert told.count("cannot keep an index") == 1
    assert "DINO_XCIT_CACHE" in told


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, fill: object) -> atomic.Digest:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "write", full)
    assert_is(cached("x", Built(), accept_all, tmp_path), Built())
    assert [entry.suffix for entry in (tmp_path / "index").iterdir()] == [".lock"]
    assert "No space left" in capsys.readouterr().err


def test_what_a_killed_build_left_is_removed(tmp_path: Path) -> None:
    built = Built()
    cached("x", built, accept_all, tmp_path)
    prefix = _places(tmp_path)[0].parent.name.partition("-")[0]
    left = tmp_path / "index" / f".{prefix}-0123.tmp"
    left.mkdir()
    cached("x", built, lambda index: False, tmp_path)
    assert not left.exists()


# ---- several processes


def _build_slowly(folder: Path, go: Event, log: Path) -> None:
    def build() -> Index:
        with open(log, "a") as file:
            file.write("built\n")
        time.sleep(0.3)
        return Built()()

    go.wait()
    assert_is(cached("x", build, accept_all, folder), Built())


def test_of_processes_that_start_together_one_builds_and_all_end_well(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    go = context.Event()
    log = tmp_path / "log"
    processes = [context.Process(target=_build_slowly, args=(tmp_path, go, log)) for _ in range(4)]
    for process in processes:
        process.start()
    go.set()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert log.read_text() == "built\n"


def test_without_locks_processes_that_start_together_all_end_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dino_xcit.data.index.fcntl", None)
    context = multiprocessing.get_context("fork")
    go = context.Event()
    log = tmp_path / "log"
    processes = [context.Process(target=_build_slowly, args=(tmp_path, go, log)) for _ in range(4)]
    for process in processes:
        process.start()
    go.set()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list(tmp_path.glob("index/*/meta.json"))) == 1
