"""Tar archives are looked through once, here and elsewhere, and read by any number of processes."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hostile_archives import GOOD, header, packed
from tar_fixtures import names, three_shards

from dino_xcit.data import Source, open_source
from dino_xcit.data.tar import source as tar
from dino_xcit.errors import InputError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DINO_XCIT_CACHE", str(folder))
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> tuple[str, dict[str, bytes]]:
    return three_shards(tmp_path)


# ---- the index


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that are looked through from now on."""
    looked: list[str] = []
    original = tar.look_through
    monkeypatch.setattr(tar, "look_through", lambda path: (looked.append(path), original(path))[1])
    return looked


def test_shards_are_looked_through_once_and_again_when_one_changes(
    shards: tuple[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern, contents = shards
    looked = counting(monkeypatch)
    first = open_source(pattern)
    assert len(looked) == 3
    second = open_source(pattern)
    assert len(looked) == 3
    assert names(second) == names(first)
    assert [second.read(index)[0] for index in range(30)] == list(contents.values())
    assert second.fingerprint() == first.fingerprint()
    longer = {"other.jpg": b"new", "other.cls": b"1", "notes.txt": bytes(100_000)}  # all old offsets lie within it
    (tmp_path / "s-1.tar").write_bytes(packed(longer))
    third = open_source(pattern)
    assert len(looked) == 6
    assert len(third) == 21
    assert third.read(10) == (b"new", 1)
    assert third.fingerprint() != first.fingerprint()


@pytest.mark.parametrize("column", ["offset", "shard", "size", "label"])
def test_an_index_that_points_elsewhere_is_built_anew(
    shards: tuple[str, dict[str, bytes]], cache: Path, monkeypatch: pytest.MonkeyPatch, column: str
) -> None:
    """Whoever can write to the cache can make an index whose hashes are right."""
    pattern, contents = shards
    looked = counting(monkeypatch)
    open_source(pattern)
    (meta,) = cache.glob("index/*/meta.json")
    for value in (-1, 10**12):
        file = meta.parent / f"numbers.{column}.npy"
        values = np.load(file)
        values[7] = value
        np.save(file, values)
        described = json.loads(meta.read_text())
        described["arrays"][f"numbers.{column}"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        meta.write_text(json.dumps(described))
        before = len(looked)
        assert [open_source(pattern).read(index)[0] for index in range(30)] == list(contents.values())
        assert len(looked) == before + 3
        (meta,) = cache.glob("index/*/meta.json")


def test_a_shard_that_is_replaced_while_it_is_in_use_is_an_error(
    shards: tuple[str, dict[str, bytes]], tmp_path: Path
) -> None:
    source = open_source(shards[0])
    (tmp_path / "s-0.tar").write_bytes(packed({f"{number}.jpg": bytes(2000) for number in range(40)}))
    (tmp_path / "s-1.tar").write_bytes(GOOD)
    (tmp_path / "s-2.tar").unlink()
    for index in range(30):
        with pytest.raises(InputError, match=r"s-\d\.tar"):
            source.read(index)


def test_a_shard_that_was_touched_alone_is_read_on(shards: tuple[str, dict[str, bytes]], tmp_path: Path) -> None:
    pattern, contents = shards
    source = open_source(pattern)
    copy = tmp_path / "copy"
    shutil.copyfile(tmp_path / "s-0.tar", copy)
    os.replace(copy, tmp_path / "s-0.tar")
    assert source.read(3)[0] == list(contents.values())[3]


# ---- other processes


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_other_processes_read_the_same(shards: tuple[str, dict[str, bytes]], method: str) -> None:
    source = open_source(shards[0])
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map(source.read, range(30)) == [source.read(index) for index in range(30)]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    """100,000 empty images."""
    folder = tmp_path_factory.mktemp("many")
    members = b"".join(header(b"%08d.jpg" % number, 0) for number in range(100_000))
    (folder / "a.tar").write_bytes(members + bytes(1024))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DINO_XCIT_CACHE", str(folder / "cache"))
        yield open_source(f"tar:{folder}/a.tar")


def test_a_source_travels_to_other_processes_as_a_path(many: Source) -> None:
    source = many
    assert len(source) == 100_000
    travelling = pickle.dumps(source)
    assert len(travelling) < 2000
    again = pickle.loads(travelling)
    assert again.name(99_999) == source.name(99_999) == "a.tar/00099999.jpg"
    assert again.fingerprint() == source.fingerprint()


def _own_memory() -> int:
    """What this process has of memory that no other has too, in KiB: also what it copied of its parent's by writing."""
    with open("/proc/self/smaps_rollup") as file:
        return int(next(line.split()[1] for line in file if line.startswith("Private_Dirty:")))


def _growth(read: Callable[[int], object], count: int) -> int:
    """By how many KiB a forked process grows while it reads in random order, the first hundred left out."""
    reading, writing = multiprocessing.get_context("fork").Pipe(duplex=False)

    def work() -> None:
        order = np.random.default_rng(0).permutation(count).tolist()
        start = 0
        for step, index in enumerate(order):
            if step == 100:
                start = _own_memory()
            read(index)
        writing.send(_own_memory() - start)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert reading.poll()
    return int(reading.recv())


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from /proc")
def test_processes_that_read_do_not_grow(many: Source) -> None:
    assert _growth(many.read, len(many)) < 1000
    listed = [(many.name(index), index) for index in range(len(many))]
    assert _growth(listed.__getitem__, len(listed)) > 3000  # counting references copies the pages


# ---- elsewhere


def test_archives_elsewhere_are_read_as_those_here(shards: tuple[str, dict[str, bytes]], tmp_path: Path) -> None:
    _, contents = shards
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for file in tmp_path.glob("*.tar"):
        memory.pipe_file(f"/bucket/{file.name}", file.read_bytes())
    memory.pipe_file("/bucket/classes.txt", b"ape\nbee\ncow\ndog\n")
    for remote in ("tar:memory://bucket/s-{0..2}.tar", "tar:memory://bucket/s-*.tar"):
        source = open_source(remote)
        assert names(source) == list(contents)
        assert [source.read(index)[0] for index in range(30)] == list(contents.values())
        assert source.classes == ("ape", "bee", "cow", "dog")
    memory.pipe_file("/bucket/s-0.tar", GOOD)
    with pytest.raises(InputError, match=r"s-0\.tar"):
        source.read(0)
    assert len(open_source("tar:memory://bucket/s-*.tar")) == 21
