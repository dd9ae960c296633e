"""Folders and lists of images."""

from __future__ import annotations

import errno
import os
import pickle
import sys
from pathlib import Path

import pytest
from bad_images import encoded
from data_fixtures import names, odd_tree, write_image
from PIL import Image

from dino_xcit.data import Source, folder, open_parts, open_source
from dino_xcit.errors import InputError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return odd_tree(tmp_path)


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
