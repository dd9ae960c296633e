"""Local and remote folders and lists of images."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import unicodedata
from pathlib import Path

import fsspec
import pytest
from data_fixtures import labels, names, odd_tree, parts_tree, write_image
from hostile_archives import png

from dino_xcit.data import Source, folder, open_parts, open_source
from dino_xcit.errors import InputError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return odd_tree(tmp_path)


@pytest.fixture(params=["local", "remote"])
def place(request: pytest.FixtureRequest, tree: Path) -> tuple[Path, str]:
    """A folder and its URL: the local path, or a ``file://`` URL that fsspec opens."""
    return tree, str(tree) if request.param == "local" else f"file://{tree}"


def relative(source: Source, url: str) -> list[str]:
    folder = url.removeprefix("file://")
    return [name.removeprefix("file://").removeprefix(folder).strip("/") for name in names(source)]


IMAGES = ["ant/e.webp", "cat/d.jpeg", "cat/deep/er/c.PNG", "dog/a.jpg", "dog/b.png"]


def test_class_folders_are_read_like_imagefolder(place: tuple[Path, str]) -> None:
    tree, url = place
    source = open_source(url)
    assert isinstance(source, Source)
    assert source.classes == ("ant", "cat", "dog")
    assert relative(source, url) == IMAGES
    assert labels(source) == [0, 1, 1, 2, 2]
    assert source.read(3) == ((tree / "dog" / "a.jpg").read_bytes(), 2)
    with pytest.raises(IndexError):
        source.read(5)
    (tree / "dog" / "a.jpg").unlink()
    with pytest.raises(InputError, match=r"dog/a\.jpg"):
        source.read(3)


def test_loose_image_makes_folder_flat_and_error_gives_the_reason(place: tuple[Path, str]) -> None:
    tree, url = place
    write_image(tree / "loose.png")
    source = open_source(url)
    assert source.labels is source.classes is source.read(5)[1] is None
    assert relative(source, url) == [*IMAGES, "loose.png"]
    with pytest.raises(InputError, match=r"no labels.*1 of 6 images lie beside its folders, such as loose\.png"):
        open_parts(None, url, url)


def test_hidden_folders_and_run_outputs_are_skipped(place: tuple[Path, str]) -> None:
    tree, url = place
    for name in (".cache/x.png", "dog/.ipynb_checkpoints/0.png", "dog/.thumbnails/large/x.png", "cat/.d.png"):
        write_image(tree / name)
    for result in ("runs/one/metrics.jsonl", "cat/found/vectors.npy"):
        write_image((tree / result).parent / "curves.png")
        (tree / result).write_text("")
    assert relative(open_source(url), url) == IMAGES


def test_skipped_files_are_reported(place: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    tree, url = place
    for name in ("a.heic", "dog/b.HEIC", "dog/scan", "dog/IMG 2.10", "dog/labels.json", "dog/.DS_Store"):
        (tree / name).write_bytes(png())
    open_source(url)
    assert "skipped 2 .heic, 2 without a suffix; images end in .jpg" in capsys.readouterr().out
    for name in IMAGES:
        (tree / name).unlink()
    with pytest.raises(InputError, match=r"no image in .*2 \.heic"):
        open_source(url)


def test_unicode_spellings_of_a_name_are_one_class(tmp_path: Path) -> None:
    composed, split = (unicodedata.normalize(form, "Möwe") for form in ("NFC", "NFD"))
    train, val = open_parts(str(parts_tree(tmp_path, (composed, "zebra"), (split, "zebra"))), None, None)
    assert train.classes == val.classes == (composed, "zebra")


def test_unusual_file_names_are_read(tmp_path: Path) -> None:
    odd = ["a b.png", "ä.png", "zero\udcff.png", "new\nline.png", "日本.png"]
    for name in odd:
        (tmp_path / name).write_bytes(png())
    source = open_source(str(tmp_path))
    assert sorted(Path(name).name for name in names(source)) == sorted(odd)
    assert [source.read(index)[0] for index in range(len(odd))] == [png()] * len(odd)


def test_part_folder_is_used_and_other_folders_are_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts_tree(tmp_path, ("a", "b", "c"), ("a", "b"))
    assert [len(open_source(str(tmp_path), part)) for part in ("train", "val", None)] == [3, 2, 5]
    assert len(open_source(str(tmp_path / "val"), "train")) == 2  # has no part folders, so it is read whole
    write_image(tmp_path / "extra" / "x" / "0.png")
    assert len(open_source(str(tmp_path), "train")) == 3
    assert "using the part train, ignoring the folders extra" in capsys.readouterr().out


def test_class_named_train_is_not_a_part(tmp_path: Path) -> None:
    """CIFAR-100 has such a class, between tractor and trout."""
    classes = ("tractor", "train", "trout")
    parts_tree(tmp_path, classes, classes)
    inside = str(tmp_path / "train")
    assert open_source(inside, "train").classes == open_source(inside, "val").classes == classes
    shutil.copytree(inside, tmp_path / "vehicles")
    assert len(open_source(str(tmp_path / "vehicles"), "train")) == 3
    for given in (tmp_path, tmp_path / "train"):
        train, val = open_parts(str(given), None, None)
        assert train.classes == val.classes == classes
        assert Path(val.name(0)).is_relative_to(tmp_path / "val")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("empty", "no image in"),
        ("absent", "no such file or folder; check the path"),
        ("~nobody-here/x", "no such file or folder; check the path"),
        ("one.png/x", "no such file or folder; check the path"),
        ("one.png", "single file"),
        ("s3:bucket", "known formats"),
        ("x" * 300, "File name too long"),
        (" ", "no data given"),
        ("a\0b", "cannot read a"),
        ("memory://", "has no path"),
        ("memory://nowhere", "no image in memory://nowhere"),
        ("memory://nowhere/list.txt", r"memory://nowhere/list\.txt"),
        ("memory://bucket/a.tar", r"expected tar:memory://bucket/a\.tar"),
    ],
)
def test_invalid_data_url_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    write_image(tmp_path / "one.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words):
        open_source(url)


def test_unlistable_folder_is_named_in_the_error(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def listing(path: str) -> object:  # mocked, as root can list folders of any mode
        if str(path).rstrip("/") in closed:
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", listing)
    (tree / "lost+found").mkdir()  # many disks have this folder, and only root can list it
    closed = {f"{tree}/lost+found"}
    assert open_source(str(tree)).classes == ("ant", "cat", "dog")
    for name in (f"{tree}/cat/deep", str(tree)):
        closed = {name}
        with pytest.raises(InputError, match=f"cannot list the folder {name}/?: Permission denied"):
            open_source(str(tree))


def test_links_are_followed_without_cycles(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "cat" / "deep" / "up").symlink_to(tree / "cat")
    (tree / "cat" / "top").symlink_to("..")
    (tree / "dog" / "itself").symlink_to(tree / "dog" / "itself")
    (tree / "dog" / "gone.png").symlink_to("/nowhere/x.png")
    (tree / "bird").symlink_to("/nowhere/bird")
    (tree / "yak").symlink_to(tree / "ant")
    source = open_source(str(tree))
    assert source.classes == ("ant", "cat", "dog", "yak")
    assert len(source) == 6
    assert "skipped 3 broken links, 2 links to a folder above" in capsys.readouterr().out


# ---- list files


def test_list_paths_are_absolute_or_relative_to_the_list(tmp_path: Path) -> None:
    first, second, third = (write_image(tmp_path / "in" / name) for name in ("a.png", "sub/c d.png", "#1.png"))
    far = write_image(tmp_path / "far" / "b.png")
    (tmp_path / "in" / "list.txt").write_text(f"# four\na.png\n\n{far}\n  sub/c d.png  \n#1.png\na.png\n")
    source = open_source(str(tmp_path / "in" / "list.txt"), "train")
    assert names(source) == [str(path) for path in (first, far, second, third, first)]
    assert source.labels is None
    assert source.read(1) == (far.read_bytes(), None)


def test_list_lines_may_contain_unicode_line_separators(tmp_path: Path) -> None:
    odd = ["a\u2028b.png", "a\x0bb.png", "a\x85b.png", "plain.png"]
    for name in odd:
        write_image(tmp_path / name)
    (tmp_path / "list.txt").write_bytes("\r\n".join(odd).encode("utf-8-sig"))  # as Windows editors write it
    assert [Path(name).name for name in names(open_source(str(tmp_path / "list.txt")))] == odd


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\n# nothing\n", "names no image"),
        (b"list.txt\na\0b.png\n", "not text"),
        (b"absent.png\n", r"absent\.png"),
        (b"list.txt\nreference://a.jpg::file:///evil.json\n", "a chain of file systems"),
    ],
)
def test_invalid_list_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(InputError, match=words):
        open_source(str(tmp_path / "list.txt"))


# ---- remote storage


@pytest.fixture
def bucket(tree: Path) -> str:
    """URL of a copy of ``tree`` in fsspec's in-memory file system."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.put(f"{tree}/", "/bucket", recursive=True)
    return "memory://bucket"


def test_remote_folder_fingerprint_changes_with_a_file(bucket: str) -> None:
    there = open_source(bucket)
    before = there.fingerprint()
    assert open_source(bucket + "/").fingerprint() == before
    fsspec.filesystem("memory").pipe_file("/bucket/dog/a.jpg", b"other")
    assert open_source(bucket).fingerprint() != before


def test_remote_parts_are_found(bucket: str) -> None:
    memory = fsspec.filesystem("memory")
    for part in ("train", "val"):
        memory.pipe_file(f"/both/{part}/ape/{part}.png", b"x")
    for given in ("memory://both", "memory://both/train", "memory://both/val/"):
        train, val = open_parts(given, None, None)
        assert (names(train), names(val)) == (["memory://both/train/ape/train.png"], ["memory://both/val/ape/val.png"])
    assert names(open_source("memory://both", "val")) == ["memory://both/val/ape/val.png"]
    with pytest.raises(InputError, match="has no folder 'train'"):
        open_parts(bucket, None, None)


def test_lists_and_their_images_may_be_local_or_remote(tree: Path, bucket: str) -> None:
    here = tree / "dog" / "a.jpg"
    text = f"dog/b.png\n{here}\n{bucket}/ant/e.webp\n"
    fsspec.filesystem("memory").pipe_file("/bucket/list.txt", text.encode())
    (tree / "list.txt").write_text(text)
    there, local = open_source(f"{bucket}/list.txt"), open_source(str(tree / "list.txt"))
    assert names(there) == [f"{bucket}/dog/b.png", str(here), f"{bucket}/ant/e.webp"]
    assert [local.read(index) for index in range(3)] == [there.read(index) for index in range(3)]


# ---- cached folder listings


@pytest.fixture
def listings(tree: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders of ``tree`` listed from now on. All are an hour old, and even small listings are cached."""
    monkeypatch.setenv("DINO_XCIT_CACHE", str(tree / ".cache"))
    monkeypatch.setattr(folder, "MIN_KEPT", 1)
    past = tree.stat().st_mtime - 3600
    for path, _, _ in os.walk(tree):
        os.utime(path, (past, past))
    listed: list[str] = []
    scandir = os.scandir

    def listing(path: str) -> object:
        if str(path).startswith(str(tree)) and ".cache" not in str(path):
            listed.append(os.path.relpath(path, tree))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", listing)
    return listed


def test_unchanged_folder_is_not_listed_again(tree: Path, listings: list[str]) -> None:
    first = open_source(str(tree))
    assert sorted(listings) == [".", "ant", "cat", "cat/deep", "cat/deep/er", "dog", "empty"]
    listings.clear()
    second = open_source(str(tree))
    assert listings == []
    assert names(second) == names(first)
    assert (second.classes, second.fingerprint()) == (first.classes, first.fingerprint())
    travelling = pickle.dumps(second)
    assert len(travelling) < 1000
    assert names(pickle.loads(travelling)) == names(first)


@pytest.mark.parametrize("where", ["z.png", "cat/deep/er/z.png", "new/z.png", "empty/z.png"])
def test_cached_listing_follows_added_and_removed_images(tree: Path, listings: list[str], where: str) -> None:
    open_source(str(tree))
    write_image(tree / where)
    assert str(tree / where) in names(open_source(str(tree)))
    (tree / where).unlink()
    assert str(tree / where) not in names(open_source(str(tree)))


def test_recently_changed_folder_is_listed_again(tree: Path, listings: list[str]) -> None:
    """The next change may have the same modification time."""
    os.utime(tree / "dog")
    open_source(str(tree))
    listings.clear()
    open_source(str(tree))
    assert "dog" in listings
