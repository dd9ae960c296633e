"""Folders and lists that lie elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from data_fixtures import names, odd_tree

from dino_xcit.data import Source, open_parts, open_source
from dino_xcit.errors import InputError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return odd_tree(tmp_path)


@pytest.fixture
def bucket(tree: Path) -> Iterator[str]:
    """``tree`` in fsspec's memory."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for file in tree.rglob("*"):
        if file.is_file():
            memory.pipe_file(f"/bucket/{file.relative_to(tree)}", file.read_bytes())
    yield "memory://bucket"
    memory.store.clear()


def test_a_folder_elsewhere_is_read_as_one_here(tree: Path, bucket: str) -> None:
    here, there = open_source(str(tree)), open_source(bucket)
    assert isinstance(there, Source)
    assert [name.removeprefix(bucket) for name in names(there)] == [
        name.removeprefix(str(tree)) for name in names(here)
    ]
    assert (there.classes, there.labels is not None) == (here.classes, True)
    assert [there.read(index) for index in range(5)] == [here.read(index) for index in range(5)]
    before = there.fingerprint()
    assert open_source(bucket + "/").fingerprint() == before
    fsspec.filesystem("memory").pipe_file("/bucket/dog/a.jpg", b"other")
    assert open_source(bucket).fingerprint() != before
    fsspec.filesystem("memory").pipe_file("/bucket/loose.png", b"x")
    assert open_source(bucket).labels is None


def test_parts_elsewhere_are_found(bucket: str) -> None:
    memory = fsspec.filesystem("memory")
    for part in ("train", "val"):
        memory.pipe_file(f"/both/{part}/ape/{part}.png", b"x")
    for given in ("memory://both", "memory://both/train", "memory://both/val/"):
        train, val = open_parts(given, None, None)
        assert (names(train), names(val)) == (["memory://both/train/ape/train.png"], ["memory://both/val/ape/val.png"])
    assert names(open_source("memory://both", "val")) == ["memory://both/val/ape/val.png"]
    with pytest.raises(InputError, match="holds no folder 'train'"):
        open_parts(bucket, None, None)


def test_lists_elsewhere_and_of_what_is_elsewhere(tree: Path, bucket: str) -> None:
    here = tree / "dog" / "a.jpg"
    text = f"dog/b.png\n{here}\n{bucket}/ant/e.webp\n"
    fsspec.filesystem("memory").pipe_file("/bucket/list.txt", text.encode())
    source = open_source(f"{bucket}/list.txt")
    assert names(source) == [f"{bucket}/dog/b.png", str(here), f"{bucket}/ant/e.webp"]
    (tree / "list.txt").write_text(text)
    local = open_source(str(tree / "list.txt"))
    assert names(local) == [str(tree / "dog" / "b.png"), str(here), f"{bucket}/ant/e.webp"]
    assert [local.read(index) for index in range(3)] == [source.read(index) for index in range(3)]


def test_what_is_missing_elsewhere_is_named(bucket: str) -> None:
    with pytest.raises(InputError, match="no image in memory://nowhere"):
        open_source("memory://nowhere")
    with pytest.raises(InputError, match=r"memory://nowhere/list\.txt"):
        open_source("memory://nowhere/list.txt")
    with pytest.raises(InputError, match=r"expected tar:memory://bucket/a\.tar"):
        open_source("memory://bucket/a.tar")
    source = open_source(bucket)
    fsspec.filesystem("memory").rm("/bucket/dog/a.jpg")
    with pytest.raises(InputError, match=r"dog/a\.jpg"):
        source.read(3)


def test_a_list_cannot_chain_file_systems(tree: Path) -> None:
    """Some of those that fsspec chains run templates they find."""
    (tree / "list.txt").write_text(f"dog/a.jpg\nreference://a.jpg::file://{tree}/evil.json\n")
    with pytest.raises(InputError, match="a chain of file systems"):
        open_source(str(tree / "list.txt"))
