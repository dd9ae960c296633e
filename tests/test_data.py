"""Data sets by URL, and decoding."""

from __future__ import annotations

import errno
import gzip
import io
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import dino_xcit.data
from dino_xcit.data import ArraySource, Source, Subset, UndecodableImage, decode, folder, open_parts, open_source
from dino_xcit.data.sample import CLASSES, EMBEDDED
from dino_xcit.errors import InputError


def write_image(path: Path, shade: int = 100, size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 20, 200 - shade)).save(path)
    return path


def encoded(image: Image.Image, format_name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def names(source: Source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


# ---- folders


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for path in ("dog/b.png", "dog/a.jpg", "cat/deep/er/c.PNG", "cat/d.jpeg", "ant/e.webp"):
        write_image(tmp_path / path)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / ".hidden.png").write_bytes(b"")
    (tmp_path / ".cache").mkdir()
    write_image(tmp_path / ".cache" / "f.png")
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_a_tree_of_class_folders_is_read_as_imagefolder_does(tree: Path) -> None:
    source = open_source(str(tree))
    assert isinstance(source, Source)
    assert source.classes == ("ant", "cat", "dog")
    relative = [str(Path(name).relative_to(tree)) for name in names(source)]
    assert relative == ["ant/e.webp", "cat/d.jpeg", "cat/deep/er/c.PNG", "dog/a.jpg", "dog/b.png"]
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1, 1, 2, 2]
    data, label = source.read(3)
    assert data == (tree / "dog" / "a.jpg").read_bytes()
    assert label == 2
    assert source.name(-1) == str(tree / "dog" / "b.png")
    with pytest.raises(IndexError):
        source.read(5)


def test_images_directly_in_the_folder_make_it_a_heap_without_labels(tree: Path) -> None:
    write_image(tree / "loose.png")
    source = open_source(str(tree))
    assert source.labels is None
    assert source.classes is None
    assert [str(Path(name).relative_to(tree)) for name in names(source)] == [
        "ant/e.webp",
        "cat/d.jpeg",
        "cat/deep/er/c.PNG",
        "dog/a.jpg",
        "dog/b.png",
        "loose.png",
    ]
    assert source.read(5)[1] is None


def test_order_and_names_survive_odd_file_names(tmp_path: Path) -> None:
    odd = ["a b.png", "ä.png", "zero\udcff.png", "new\nline.png", "日本.png"]
    for name in odd:
        path = os.path.join(os.fsencode(tmp_path), os.fsencode(name))
        with open(path, "wb") as file:
            file.write(encoded(Image.new("RGB", (2, 2)), "PNG"))
    source = open_source(str(tmp_path))
    assert sorted(Path(name).name for name in names(source)) == sorted(odd)
    for index in range(len(odd)):
        assert source.read(index)[0]


def test_a_part_is_the_folder_of_that_name_where_there_is_one(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("val", 2)):
        for index in range(count):
            write_image(tmp_path / part / "x" / f"{index}.png")
    assert len(open_source(str(tmp_path), "train")) == 3
    assert len(open_source(str(tmp_path), "val")) == 2
    assert len(open_source(str(tmp_path / "val"), "train")) == 2  # no part in it: taken whole
    assert len(open_source(str(tmp_path))) == 5


def test_a_class_called_train_is_a_class(tmp_path: Path) -> None:
    """CIFAR-100 has one, between tractor and trout."""
    for part in ("train", "val"):
        for name in ("tractor", "train", "trout"):
            write_image(tmp_path / part / name / "0.png")
    assert open_source(str(tmp_path / "train"), "train").classes == ("tractor", "train", "trout")
    for given in (tmp_path, tmp_path / "train"):
        train, val = open_parts(str(given), None, None)
        assert train.classes == val.classes == ("tractor", "train", "trout")
        assert Path(val.name(0)).is_relative_to(tmp_path / "val")


def test_folders_without_images_and_missing_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no image in"):
        open_source(str(tmp_path))
    (tmp_path / "x").mkdir()
    with pytest.raises(InputError, match="no image in"):
        open_source(str(tmp_path))
    with pytest.raises(InputError, match="no such file or folder"):
        open_source(str(tmp_path / "absent"))
    file = write_image(tmp_path / "x" / "one.png")
    with pytest.raises(InputError, match="single file"):
        open_source(str(file))
    with pytest.raises(InputError, match="known forms"):
        open_source("s3:bucket")
    with pytest.raises(InputError, match=r"cannot read x.*File name too long"):
        open_source("x" * 300)
    for path in ("~nobody-here/x", str(file / "x")):
        with pytest.raises(InputError, match="no such file or folder; check the path"):
            open_source(path)


def test_urls_without_anything_in_them_are_refused(monkeypatch: pytest.MonkeyPatch, tree: Path) -> None:
    monkeypatch.chdir(tree)
    for url, words in (
        ("", "no data given"),
        (" ", "no data given"),
        ("a\0b", "cannot read a.*embedded null byte"),
        ("memory://", "names no place: expected such as memory://BUCKET/FOLDER"),
    ):
        with pytest.raises(InputError, match=words):
            open_source(url)


def test_an_image_that_vanished_is_named(tree: Path) -> None:
    source = open_source(str(tree))
    (tree / "dog" / "a.jpg").unlink()
    with pytest.raises(InputError, match=r"dog/a\.jpg"):
        source.read(3)


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes there")
def test_a_pipe_that_is_called_like_an_image_is_named_and_not_waited_for(tree: Path) -> None:
    os.mkfifo(tree / "dog" / "pipe.jpg")
    source = open_source(str(tree))
    assert source.name(5).endswith("dog/pipe.jpg")
    with pytest.raises(InputError, match=r"dog/pipe\.jpg is a named pipe: expected a file"):
        source.read(5)


def test_a_folder_that_cannot_be_listed_is_named_rather_than_left_out(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir
    closed = {tree / "cat" / "deep"}

    def listing(path: str) -> object:  # root may list everything: no mode of a folder could show it
        if Path(path) in closed:
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", listing)
    with pytest.raises(InputError, match=r"cannot list the folder .*/cat/deep: Permission denied; make it readable"):
        open_source(str(tree))
    closed = {tree}
    with pytest.raises(InputError, match=f"cannot list the folder {tree}: Permission denied; check"):
        open_source(str(tree))
    closed = {tree / "lost+found"}  # at the top of many disks, and closed to all but root
    (tree / "lost+found").mkdir()
    assert open_source(str(tree)).classes == ("ant", "cat", "dog")


# ---- lists


def test_a_list_of_paths_is_relative_to_the_list_or_absolute(tmp_path: Path) -> None:
    write_image(tmp_path / "in" / "a.png")
    far = write_image(tmp_path / "far" / "b.png")
    write_image(tmp_path / "in" / "sub" / "c d.png")
    (tmp_path / "in" / "list.txt").write_text(f"# three\na.png\n\n{far}\n  sub/c d.png  \na.png\n")
    source = open_source(str(tmp_path / "in" / "list.txt"), "train")
    assert names(source) == [
        str(p) for p in (tmp_path / "in/a.png", far, tmp_path / "in/sub/c d.png", tmp_path / "in/a.png")
    ]
    assert source.labels is None
    assert source.read(1) == (far.read_bytes(), None)


def test_a_list_has_a_path_a_line_whatever_letters_are_in_it(tmp_path: Path) -> None:
    odd = ["a\u2028b.png", "a\x0bb.png", "a\x85b.png", "plain.png"]
    for name in odd:
        write_image(tmp_path / name)
    (tmp_path / "list.txt").write_bytes("\r\n".join(odd).encode("utf-8-sig"))  # as Windows' editors write it
    assert [Path(name).name for name in names(open_source(str(tmp_path / "list.txt")))] == odd


def test_lists_of_nothing_and_of_missing_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text("\n# nothing\n")
    with pytest.raises(InputError, match="names no image"):
        open_source(str(file))
    file.write_bytes(b"list.txt\na\0b.png\n")
    with pytest.raises(InputError, match=r"list\.txt is no text: expected one path a line"):
        open_source(str(file))
    file.write_text("absent.png\n")
    with pytest.raises(InputError, match=r"absent\.png"):
        open_source(str(file))


# ---- folders that are listed once


@pytest.fixture
def listings(tree: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders of ``tree``, all an hour old, that are listed from now on; small ones are kept too."""
    monkeypatch.setenv("DINO_XCIT_CACHE", str(tree / ".cache"))
    monkeypatch.setattr(folder, "KEPT_FROM", 1)
    age(tree)
    listed: list[str] = []
    scandir = os.scandir

    def listing(path: str) -> object:
        if str(path).startswith(str(tree)) and ".cache" not in str(path):
            listed.append(os.path.relpath(path, tree))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", listing)
    return listed


def age(top: Path) -> None:
    """Make all folders an hour old, those of the cache left out, which change as they are used."""
    past = top.stat().st_mtime - 3600
    for path, folders, _ in os.walk(top):
        if ".cache" in folders:
            folders.remove(".cache")
        os.utime(path, (past, past))


def test_a_folder_that_has_not_changed_is_not_listed_again(tree: Path, listings: list[str]) -> None:
    first = open_source(str(tree))
    assert sorted(listings) == [".", "ant", "cat", "cat/deep", "cat/deep/er", "dog", "empty"]
    listings.clear()
    second = open_source(str(tree))
    assert listings == []
    assert names(second) == names(first)
    assert (second.classes, second.fingerprint()) == (first.classes, first.fingerprint())
    assert [second.read(index) for index in range(5)] == [first.read(index) for index in range(5)]
    travelling = pickle.dumps(second)
    assert len(travelling) < 1000
    assert names(pickle.loads(travelling)) == names(first)


@pytest.mark.parametrize("where", ["z.png", "dog/z.png", "cat/deep/er/z.png", "new/z.png", "empty/z.png"])
def test_an_image_added_at_any_depth_is_found(tree: Path, listings: list[str], where: str) -> None:
    open_source(str(tree))
    write_image(tree / where)
    assert str(tree / where) in names(open_source(str(tree)))
    (tree / where).unlink()
    assert str(tree / where) not in names(open_source(str(tree)))


def test_a_folder_that_changed_just_now_is_listed_again(tree: Path, listings: list[str]) -> None:
    """Its time may be that of the next change too."""
    os.utime(tree / "dog")
    open_source(str(tree))
    listings.clear()
    open_source(str(tree))
    assert "dog" in listings


def test_few_images_leave_nothing_in_the_cache(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINO_XCIT_CACHE", str(tree / "kept"))
    age(tree)
    open_source(str(tree))
    assert not list(tree.glob("kept/index/*/meta.json"))


def test_links_are_followed_but_not_in_circles(tree: Path) -> None:
    (tree / "cat" / "deep" / "up").symlink_to(tree / "cat")
    (tree / "dog" / "itself").symlink_to(tree / "dog" / "itself")
    (tree / "yak").symlink_to(tree / "ant")
    source = open_source(str(tree))
    assert source.classes == ("ant", "cat", "dog", "yak")
    assert len(source) == 6


# ---- elsewhere


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


# ---- the embedded sample and the full set


def test_the_sample_is_balanced_and_small_and_comes_with_its_licence() -> None:
    train, val = open_source("sample:fashion-mnist", "train"), open_source("sample:fashion-mnist", "val")
    for source, count in ((train, 12_000), (val, 3_000)):
        assert len(source) == count
        assert source.labels is not None
        assert np.bincount(source.labels).tolist() == [count // 10] * 10
        assert source.classes == CLASSES
        item, label = source.read(count - 1)
        assert isinstance(item, np.ndarray)
        assert (item.shape, item.dtype) == ((28, 28), np.dtype(np.uint8))
        assert label == source.labels[-1]
    assert EMBEDDED.stat().st_size <= 8e6
    licence = (Path(dino_xcit.data.__file__).parent / "SAMPLE_LICENSE.txt").read_text()
    assert "MIT" in licence
    assert "Zalando" in licence


def test_the_sample_holds_different_pictures_of_different_classes() -> None:
    train = open_source("sample:fashion-mnist", "train")
    val = open_source("sample:fashion-mnist/val")
    assert isinstance(train, ArraySource)
    assert isinstance(val, ArraySource)
    seen = {image.tobytes() for image in train.images}
    assert len(seen) > 11_990
    assert sum(image.tobytes() in seen for image in val.images) < 5
    # trousers and ankle boots differ in the mean
    means = [train.images[train.labels == label].mean(axis=0) for label in (1, 9)]
    assert np.abs(means[0] - means[1]).max() > 50


def idx(array: NDArray[np.uint8]) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


@pytest.fixture
def full_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A little Fashion-MNIST in the files of Debian's package."""
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 30), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    monkeypatch.setenv("FASHION_MNIST_DIR", str(tmp_path))
    return tmp_path


def test_the_full_set_is_read_from_idx_files(full_set: Path) -> None:
    train, val = open_parts("sample:fashion-mnist-full", None, None)
    assert (len(train), len(val)) == (30, 20)
    first = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)[0]
    item, label = train.read(0)
    np.testing.assert_array_equal(np.asarray(item), first)
    assert label == 0
    assert train.labels is not None
    assert train.labels.tolist() == [i % 10 for i in range(30)]
    assert train.classes == CLASSES
    assert decode(train.read(3)[0], "x").size == (28, 28)


def test_a_full_set_that_is_absent_or_damaged_is_named(full_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = full_set / "train-images-idx3-ubyte.gz"
    good = images.read_bytes()
    for damage in (
        good[:300],
        b"no gzip at all",
        gzip.compress(b"PNG"),
        gzip.compress(gzip.decompress(good)[:-5]),
        b"",
    ):
        images.write_bytes(damage)
        with pytest.raises(InputError, match="train-images-idx3"):
            open_source("sample:fashion-mnist-full")
    monkeypatch.setenv("FASHION_MNIST_DIR", str(full_set / "absent"))
    with pytest.raises(InputError, match="FASHION_MNIST_DIR"):
        open_source("sample:fashion-mnist-full")


def test_files_that_are_not_the_full_set_are_refused_whatever_they_claim(full_set: Path) -> None:
    images, labels = (full_set / f"train-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    whole = images.read_bytes(), labels.read_bytes()
    for damaged, data in (
        (images, b"\0\0\x08"),
        (images, bytes([0, 0, 8, 255]) + b"\0\0\0\1" * 255 + b"\0"),
        (images, idx(np.zeros((31, 28, 28), np.uint8))),
        (images, idx(np.zeros(30, np.uint8))),
        (images, idx(np.zeros((0, 28, 28), np.uint8))),
        (labels, idx(np.full(30, 10, np.uint8))),
        (images, bytes(200_000_000)),
    ):
        damaged.write_bytes(gzip.compress(data, 1))
        with pytest.raises(InputError, match=r"fetch (it|them) anew"):
            open_source("sample:fashion-mnist-full")
        for path, content in zip((images, labels), whole, strict=True):
            path.write_bytes(content)
    assert len(open_source("sample:fashion-mnist-full")) == 30


def test_unknown_samples_and_parts_are_refused() -> None:
    with pytest.raises(InputError, match="fashion-mnist"):
        open_source("sample:mnist")
    with pytest.raises(InputError, match="expected sample:fashion-mnist/train or sample:fashion-mnist/val"):
        open_source("sample:fashion-mnist/test")


def test_a_torchvision_set_is_read_without_a_network_where_its_files_are(
    tmp_path: Path, full_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "tv" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in full_set.glob("*.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    monkeypatch.setenv("TORCHVISION_DATA", str(tmp_path / "tv"))
    train, val = open_parts("torchvision:FashionMNIST", None, None)
    assert (len(train), len(val)) == (30, 20)
    full, _ = open_parts("sample:fashion-mnist-full", None, None)
    for index in (0, 7, 29):
        assert decode(train.read(index)[0], "x").tobytes() == decode(full.read(index)[0], "x").tobytes()
        assert train.read(index)[1] == full.read(index)[1]
    assert train.classes is not None
    assert len(train.classes) == 10
    assert train.fingerprint() != val.fingerprint()
    assert len(set(names(train))) == 30


def test_unknown_torchvision_sets_are_refused_with_near_matches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHVISION_DATA", str(tmp_path))
    with pytest.raises(InputError, match="FashionMNIST"):
        open_source("torchvision:FashonMNIST")
    with pytest.raises(InputError, match="no data set"):
        open_source("torchvision:folder")
    with pytest.raises(InputError, match="could not open ImageFolder"):
        open_source("torchvision:ImageFolder")


# ---- both parts


def parts_tree(root: Path, train: tuple[str, ...], val: tuple[str, ...]) -> Path:
    for part, classes in (("train", train), ("val", val)):
        for name in classes:
            write_image(root / part / name / "0.png")
    return root


def test_both_parts_come_from_a_folder_or_from_its_train_folder(tmp_path: Path) -> None:
    parts_tree(tmp_path, ("a", "b"), ("a", "b"))
    for given in (str(tmp_path), str(tmp_path / "train"), str(tmp_path / "val"), f"{tmp_path}/train/"):
        train, val = open_parts(given, None, None)
        assert Path(train.name(0)).is_relative_to(tmp_path / "train")
        assert Path(val.name(0)).is_relative_to(tmp_path / "val")


def test_classes_are_numbered_as_in_the_training_part(tmp_path: Path) -> None:
    parts_tree(tmp_path, ("ape", "bee", "cow"), ("bee", "cow"))
    train, val = open_parts(str(tmp_path), None, None)
    assert train.classes == val.classes == ("ape", "bee", "cow")
    assert val.labels is not None
    assert val.labels.tolist() == [1, 2]
    assert [val.read(i)[1] for i in range(2)] == [1, 2]


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    parts_tree(tmp_path, ("ape",), ("ape", "yak"))
    with pytest.raises(InputError, match="yak"):
        open_parts(str(tmp_path), None, None)


def test_each_part_can_be_given_on_its_own(tmp_path: Path) -> None:
    parts_tree(tmp_path / "one", ("a",), ("a",))
    parts_tree(tmp_path / "two", ("a",), ("a",))
    train, val = open_parts(str(tmp_path / "one"), None, str(tmp_path / "two" / "val"))
    assert Path(train.name(0)).is_relative_to(tmp_path / "one" / "train")
    assert Path(val.name(0)).is_relative_to(tmp_path / "two" / "val")
    train, val = open_parts(None, str(tmp_path / "two" / "train"), str(tmp_path / "one" / "val"))
    assert Path(train.name(0)).is_relative_to(tmp_path / "two" / "train")


def test_a_named_set_given_as_validation_data_means_its_validation_part() -> None:
    train, val = open_parts(None, "sample:fashion-mnist", "sample:fashion-mnist")
    assert (len(train), len(val)) == (12_000, 3_000)
    train, val = open_parts("sample:fashion-mnist/train", None, None)
    assert (len(train), len(val)) == (12_000, 3_000)


def test_missing_parts_and_missing_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no train data"):
        open_parts(None, None, None)
    write_image(tmp_path / "train" / "a" / "0.png")
    with pytest.raises(InputError, match="holds no folder 'val'"):
        open_parts(str(tmp_path), None, None)
    write_image(tmp_path / "val" / "loose.png")
    with pytest.raises(InputError, match="no labels"):
        open_parts(str(tmp_path), None, None)


# ---- subsets and fingerprints


def test_a_subset_renumbers_items_and_labels(tree: Path) -> None:
    source = open_source(str(tree))
    subset = Subset(source, np.array([4, 1]))
    assert len(subset) == 2
    assert names(subset) == [source.name(4), source.name(1)]
    assert subset.labels is not None
    assert subset.labels.tolist() == [2, 1]
    assert subset.read(0) == source.read(4)
    assert subset.classes == source.classes
    assert isinstance(subset, Source)


def test_fingerprints_change_with_items_order_labels_and_content(tree: Path) -> None:
    source = open_source(str(tree))
    original = source.fingerprint()
    assert open_source(str(tree)).fingerprint() == original
    prints = {original}

    def changed(what: Source) -> None:
        value = what.fingerprint()
        assert value not in prints
        prints.add(value)

    changed(Subset(source, np.array([0, 1])))
    changed(Subset(source, np.array([1, 0])))
    changed(Subset(source, np.arange(5), np.array([1, 0, 2]), ("cat", "ant", "dog")))
    write_image(tree / "dog" / "a.jpg", shade=30, size=(9, 9))
    changed(open_source(str(tree)))
    write_image(tree / "dog" / "z.jpg")
    changed(open_source(str(tree)))
    (tree / "dog" / "b.png").unlink()
    changed(open_source(str(tree)))
    (tree / "ant").rename(tree / "bat")
    changed(open_source(str(tree)))


def test_the_sample_s_fingerprint_follows_its_pixels_and_labels() -> None:
    images, labels = np.zeros((3, 2, 2), np.uint8), np.array([0, 1, 0])
    first = ArraySource("x", images, labels, ("a", "b"))
    other_images = images.copy()
    other_images[1, 0, 0] = 1
    prints = {
        first.fingerprint(),
        ArraySource("x", other_images, labels, ("a", "b")).fingerprint(),
        ArraySource("x", images, np.array([0, 1, 1]), ("a", "b")).fingerprint(),
        ArraySource("x", images[:2], labels[:2], ("a", "b")).fingerprint(),
    }
    assert len(prints) == 4
    assert ArraySource("x", images.copy(), labels.copy(), ("a", "b")).fingerprint() in prints


# ---- decoding


@pytest.mark.parametrize(
    ("format_name", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("PPM", {}),
        ("WEBP", {"lossless": True}),
        ("JPEG", {"quality": 100, "subsampling": 0}),
    ],
)
def test_every_format_gives_the_same_rgb_picture(
    photo: Image.Image, format_name: str, options: dict[str, object]
) -> None:
    picture = decode(encoded(photo, format_name, **options), "x")
    assert picture.mode == "RGB"
    assert picture.size == photo.size
    error = np.abs(np.asarray(picture, dtype=int) - np.asarray(photo, dtype=int))
    assert error.mean() < (3 if format_name == "JPEG" else 1e-9)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_a_palette_with_transparency_keeps_its_colours(photo: Image.Image) -> None:
    palette = photo.quantize(32)
    data = encoded(palette, "PNG", transparency=bytes([0, 128] + [255] * 30))
    assert Image.open(io.BytesIO(data)).mode == "P"
    np.testing.assert_array_equal(np.asarray(decode(data, "x")), np.asarray(palette.convert("RGB")))


def test_alpha_grey_and_single_bit_pictures_become_rgb(photo: Image.Image) -> None:
    for mode in ("RGBA", "LA", "L", "1"):
        picture = decode(encoded(photo.convert(mode), "PNG"), mode)
        assert picture.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(photo.convert(mode).convert("RGB")))
    rgba = photo.convert("RGBA")
    rgba.putalpha(0)  # even where all is transparent, the colours are there
    np.testing.assert_array_equal(np.asarray(decode(encoded(rgba, "PNG"), "x")), np.asarray(photo))


def test_a_cmyk_jpeg_becomes_rgb(photo: Image.Image) -> None:
    data = encoded(photo.convert("CMYK"), "JPEG", quality=98)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    picture = decode(data, "x")
    assert picture.mode == "RGB"
    assert np.abs(np.asarray(picture, dtype=int) - np.asarray(photo, dtype=int)).mean() < 6


def test_sixteen_bit_grey_is_scaled_and_not_cut_off() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for format_name in ("PNG", "TIFF"):
        picture = np.asarray(decode(encoded(Image.fromarray(ramp), format_name), "x"))
        assert np.abs(picture[..., 0].astype(float) - ramp / 257).max() <= 1
        assert (picture[..., 0] == picture[..., 2]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_picture_upright(photo: Image.Image, orientation: int) -> None:
    turned_by = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # stored turned to the left: tag 6 says "turn to the right"
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = photo.transpose(turned_by[orientation]) if orientation in turned_by else photo
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(np.asarray(decode(encoded(stored, "PNG", exif=exif), "x")), np.asarray(photo))
    assert decode(encoded(stored, "JPEG", exif=exif), "x").size == photo.size


def test_the_first_frame_of_an_animation_is_taken(photo: Image.Image) -> None:
    frames = [photo.convert("P"), Image.new("P", photo.size)]
    picture = decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "x")
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(frames[0].convert("RGB")))


def test_arrays_are_pictures_already() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert np.asarray(decode(grey, "x")).tolist() == np.stack([grey] * 3, axis=-1).tolist()
    colour = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    np.testing.assert_array_equal(np.asarray(decode(colour, "x")), colour)


def damaged(photo: Image.Image) -> dict[str, bytes]:
    jpeg, png = encoded(photo, "JPEG"), encoded(photo, "PNG")
    return {
        "empty": b"",
        "html": b"<!DOCTYPE html><html><body>404 not found</body></html>",
        "text": b"hello",
        "zeros": bytes(1000),
        "jpeg cut in half": jpeg[: len(jpeg) // 2],
        "jpeg header only": jpeg[:20],
        "png cut in half": png[: len(png) // 2],
        "png without its end": png[:60],
        "png with a broken checksum": png[:16] + b"\x7f" + png[17:],
        "pdf": encoded(photo, "PDF"),
        "ico, a format not on the list": encoded(photo, "ICO"),
    }


@pytest.mark.parametrize("kind", list(damaged(Image.new("RGB", (20, 20)))))
def test_what_is_no_image_is_named_with_its_cause(photo: Image.Image, kind: str) -> None:
    with pytest.raises(UndecodableImage, match=r"^photos/bad\.jpg cannot be read: ") as caught:
        decode(damaged(photo)[kind], "photos/bad.jpg")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, InputError)


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # the real limit would need a picture of 180 megapixels
    with pytest.raises(UndecodableImage, match="bomb"):
        decode(encoded(Image.new("RGB", (100, 100)), "PNG"), "x")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM"])
def test_random_damage_never_escapes_as_another_error(photo: Image.Image, format_name: str) -> None:
    rng = np.random.default_rng(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if format_name in ("JPEG", "PNG", "WEBP") else {}
    whole = encoded(photo, format_name, **options)
    refused = 0
    for _ in range(120):
        data = bytearray(whole[: rng.integers(len(whole))] if rng.random() < 0.3 else whole)
        for place in rng.integers(0, max(1, min(len(data), 400)), size=rng.integers(1, 8)):
            if data:
                data[place] = rng.integers(256)
        try:
            assert decode(bytes(data), "x").mode == "RGB"
        except UndecodableImage:
            refused += 1
    assert refused > 10
