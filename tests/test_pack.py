"""Packing a data set into shards: contents, resizing, interruptions, unreadable images, refused destinations."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import signal
import tarfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from bad_images import encoded, photograph, sideways, write_corpus
from dying_child import in_a_child
from filelock import FileLock
from PIL import Image

from dino_xcit.data import Source, Subset, open_source, workers
from dino_xcit.data import pack as module
from dino_xcit.data.__main__ import main as data_command
from dino_xcit.data.pack import Options, key_of, main, pack, pack_image, relative_name
from dino_xcit.errors import InputError
from dino_xcit.runtime import atomic

FIVE = Options(shard_images=5)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINO_XCIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return class_tree(tmp_path / "tree")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def pixels(count: int) -> Source:
    """Return ``count`` labelled images of 28 x 28 pixels."""
    return Subset(open_source("sample:fashion-mnist", "train"), np.arange(count))


def class_tree(root: Path, images: int = 6) -> Path:
    """Write two classes of JPEG and PNG images of 96 x 72 pixels."""
    for label, name in enumerate(("n01", "n02")):
        (root / name).mkdir(parents=True)
        for number in range(images):
            kind, suffix = ("PNG", "png") if number % 3 == 2 else ("JPEG", "JPEG")
            data = encoded(photograph(label * 100 + number), kind)
            (root / name / f"{name}_{number}.v1.{suffix}").write_bytes(data)
    return root


def content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a folder except the lock file."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def members(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every member of every shard, in order."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None
                found[member.name] = file.read()
    return found


def items(folder: Path) -> list[tuple[str, bytes, int | None]]:
    """Return (original name, image bytes, label) of each packed image, in order."""
    found = members(folder)
    labels = {name.removesuffix(".cls"): int(data) for name, data in found.items() if name.endswith(".cls")}
    images = [(name.partition(".")[0], data) for name, data in found.items() if not name.endswith(".cls")]
    return [(unquote(key.partition("_")[2]), data, labels.get(key)) for key, data in images]


def originals(source: Source, root: Path) -> list[tuple[str, Any, int | None]]:
    return [(str(Path(source.name(i)).relative_to(root)), *source.read(i)) for i in range(len(source))]


# ---- contents of the shards


def test_shards_preserve_bytes_labels_classes_names_and_order(tree: Path, out: Path) -> None:
    source = open_source(str(tree))
    folder, seen = pack(source, out, FIVE, 1)
    assert seen == 12
    assert [shard.images for shard in folder.shards] == [5, 5, 2]
    assert items(out) == originals(source, tree)
    assert json.loads((out / "classes.json").read_text()) == ["n01", "n02"]
    first = "00000000_n01%2Fn01_0%2Ev1%2EJPEG"
    assert list(members(out))[:2] == [f"{first}.cls", f"{first}.jpg"]
    manifest = json.loads((out / "pack.json").read_text())
    assert (manifest["source"], manifest["fingerprint"]) == (str(tree), source.fingerprint())
    assert (manifest["images"], manifest["packed"], manifest["complete"]) == (12, 12, True)
    for row in manifest["shards"]:
        data = (out / row["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (row["bytes"], row["sha256"])


def test_shards_open_as_same_data_set(tree: Path, tmp_path: Path, out: Path) -> None:
    source = open_source(str(tree))
    pack(source, out, FIVE, 1)
    shards = open_source(f"tar:{out}/shard-*.tar")
    assert shards.classes == source.classes
    np.testing.assert_array_equal(shards.labels, source.labels)
    assert [shards.read(index) for index in range(len(shards))] == [source.read(index) for index in range(12)]
    # Packing the shards again gives the same members.
    pack(shards, tmp_path / "again", Options(shard_images=7), 1)
    assert [rest for _, *rest in items(tmp_path / "again")] == [rest for _, *rest in items(out)]
    with pytest.raises(InputError, match="and they differ"):  # a source is never overwritten
        pack(shards, out, FIVE, 1)
    (out / "pack.json").unlink()
    with pytest.raises(InputError, match=r"it has shard-000000\.tar and no pack\.json"):
        pack(shards, out, FIVE, 1)


def test_flat_folder_is_packed_without_labels_and_classes(tree: Path, out: Path) -> None:
    # An image beside the class folders makes the folder flat.
    (tree / "loose.jpg").write_bytes(encoded(photograph(7), "JPEG"))
    source = open_source(str(tree))
    pack(source, out, FIVE, 1)
    assert items(out) == originals(source, tree)
    assert not (out / "classes.json").exists()
    assert not any(name.endswith(".cls") or "/" in name for name in members(out))


@pytest.mark.parametrize(
    "name", ["a/b.c/d.e.jpg", "100%.png", "a\\b.jpg", "日本/ä b.png", "new\nline.png", "zero\udcff.png", "../up.jpg"]
)
def test_key_has_no_dots_or_separators_and_decodes_to_name(name: str) -> None:
    key = key_of(7, name)
    assert key.startswith("00000007_")
    assert not set("./\\\n") & set(key)
    assert unquote(key.partition("_")[2], errors="surrogateescape") == name


def test_relative_name_starts_from_folder_or_list_file() -> None:
    assert relative_name("/data/x", "/data/x/a/b.jpg") == "a/b.jpg"
    assert relative_name("/data/list.txt", "/data/a/b.jpg") == "a/b.jpg"
    assert relative_name("/data/list.txt", "/far/b.jpg") == "/far/b.jpg"
    assert relative_name("sample:x/train", "sample:x/train/00012") == "00012"


def test_pixel_arrays_are_packed_losslessly(out: Path) -> None:
    source = pixels(7)
    assert pack(source, out, FIVE, 1)[1] == 7
    for index, (_, data, label) in enumerate(items(out)):
        item, expected = source.read(index)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(item))
        assert label == expected


def test_shard_ends_with_image_that_reaches_shard_mb(tmp_path: Path, out: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(6):
        (tmp_path / "in" / f"{number}.bmp").write_bytes(encoded(Image.new("RGB", (400, 400)), "BMP"))  # 480 kB
    folder, _ = pack(open_source(str(tmp_path / "in")), out, Options(shard_mb=1), 1)
    assert [shard.images for shard in folder.shards] == [3, 3]


# ---- resizing


def packed_with(source: Source, max_side: int | None) -> list[tuple[str, bytes]]:
    found = [pack_image(source, index, Options(max_side)) for index in range(len(source))]
    return [(one.suffix, one.data) for one in found]


def test_max_side_resizes_large_images_and_copies_small_files(tmp_path: Path) -> None:
    wide = photograph(1).resize((400, 100))
    files = {
        "a_large.jpg": encoded(wide, "JPEG"),
        "b_large.png": encoded(wide.rotate(90, expand=True), "PNG"),
        "c_fits.jpg": encoded(wide.resize((200, 50)), "JPEG", quality=71),
        "d_fits.png": encoded(wide.resize((200, 200)), "PNG"),
        "e_called.jpg": encoded(wide.resize((20, 20)), "PNG"),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    source = open_source(str(tmp_path))
    shrunk = packed_with(source, 200)
    assert [suffix for suffix, _ in shrunk] == ["jpg", "jpg", "jpg", "png", "png"]
    assert [Image.open(io.BytesIO(data)).size for _, data in shrunk[:2]] == [(200, 50), (50, 200)]
    for (_, data), original in list(zip(shrunk, files.values(), strict=True))[2:]:
        assert data == original
    assert [data for _, data in packed_with(source, None)] == list(files.values())


@pytest.mark.parametrize(("typed", "brightest"), [("auto", 255), ("4095", 255), ("65535", 15)])
def test_white_level_scales_resized_16_bit_images(tmp_path: Path, typed: str, brightest: int) -> None:
    (tmp_path / "in").mkdir()
    Image.fromarray(np.full((64, 64), 4095, dtype=np.uint16)).save(tmp_path / "in" / "scan.png")
    main([str(tmp_path / "in"), str(tmp_path / "out"), "--max-side", "32", "--white-level", typed])
    packed = open_source(f"tar:{tmp_path}/out/shard-*.tar")
    assert np.asarray(Image.open(io.BytesIO(packed.read(0)[0]))).max() == brightest


@pytest.mark.parametrize("max_side", [48, 96])
def test_exif_rotation_is_applied_with_max_side_and_kept_without(tmp_path: Path, max_side: int) -> None:
    picture = photograph(3)
    (tmp_path / "a.jpg").write_bytes(sideways(picture))
    source = open_source(str(tmp_path))
    ((_, data),) = packed_with(source, max_side)
    written = Image.open(io.BytesIO(data))
    assert written.getexif().get(0x0112) is None
    assert written.size == (max_side, max_side * 3 // 4)
    expected = picture.resize(written.size, Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(written, int) - np.asarray(expected, int)).mean() < 6
    assert packed_with(source, None) == [("jpg", (tmp_path / "a.jpg").read_bytes())]


# ---- workers and interruptions


def test_output_bytes_are_independent_of_worker_count(tmp_path: Path) -> None:
    write_corpus(tmp_path / "in", good=14, seed=2)
    source = open_source(str(tmp_path / "in"))
    for number in (1, 2):
        pack(source, tmp_path / str(number), Options(max_side=64, shard_images=5), number)
    assert content(tmp_path / "1") == content(tmp_path / "2")
    assert len(members(tmp_path / "1")) == 14


@pytest.mark.parametrize("step", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_packing_again_after_kill_gives_identical_bytes(tmp_path: Path, step: int) -> None:
    source = open_source(str(class_tree(tmp_path / "in")))
    (tmp_path / "in" / "n01" / "n01_3.v1.JPEG").write_bytes(b"broken")
    pack(source, tmp_path / "whole", FIVE, 1)
    expected = content(tmp_path / "whole")
    for number in range(1, 200, step):
        broken = tmp_path / f"killed{number}"
        ended, _ = in_a_child(lambda b=broken: pack(source, b, FIVE, 1), tmp_path / "log", broken, number)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        kept = {path: path.stat().st_mtime_ns for path in broken.glob("*.tar")}
        pack(source, broken, FIVE, 1)
        assert content(broken) == expected
        again = [path for path, when in kept.items() if path.stat().st_mtime_ns != when]
        assert len(again) <= 1  # a shard that was renamed but not yet listed in the manifest
    assert number > 25


@pytest.mark.parametrize("readers", [1, 4])
def test_empty_or_damaged_shard_is_packed_again(tree: Path, out: Path, readers: int) -> None:
    (tree / "n01" / "n01_0.v1.JPEG").write_bytes(b"broken")
    source = open_source(str(tree))
    pack(source, out, FIVE, 1)
    expected = content(out)
    assert pack(source, out, FIVE, readers)[1] == 0
    untouched = (out / "shard-000000.tar").stat().st_mtime_ns
    for damaged in (b"", expected["shard-000001.tar"][:1000] + b"x" + expected["shard-000001.tar"][1001:]):
        (out / "shard-000001.tar").write_bytes(damaged)
        assert pack(source, out, FIVE, readers)[1] == 6
        assert content(out) == expected
    assert (out / "shard-000000.tar").stat().st_mtime_ns == untouched


# ---- unreadable images


def test_unreadable_images_are_skipped_and_listed(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = write_corpus(tmp_path / "in", good=10, seed=4)
    command = [str(tmp_path / "in"), str(out), "--workers", "1"]
    assert main(command) == 0
    assert f"skipped {len(bad)} images that cannot be read" in capsys.readouterr().out
    assert main([*command, "--strict"]) == 1  # also if packing is already complete
    rows = [json.loads(line) for line in (out / "unreadable.jsonl").read_text().splitlines()]
    assert [Path(row["name"]) for row in rows] == bad
    assert all(row["cause"] for row in rows)
    assert items(out) == [(path.name, path.read_bytes(), None) for path in good]


def test_source_without_readable_images_is_refused(tmp_path: Path, out: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"none of the 1 images .* can be read, the first because: empty file"):
        main([str(tmp_path / "in"), str(out), "--workers", "1"])


def test_too_many_consecutive_unreadable_images_stop_packing(
    tree: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_UNREADABLE", 4)
    source = open_source(str(tree))
    pack(source, tmp_path / "whole", FIVE, 1)
    read = source.read

    def gone_after_seven(index: int) -> Any:
        if index >= 7:
            raise InputError(f"cannot read the image {source.name(index)}: Input/output error")
        return read(index)

    monkeypatch.setattr(source, "read", gone_after_seven)
    with pytest.raises(InputError, match="4 images in a row cannot be read"):
        pack(source, out, FIVE, 1)
    assert [path.name for path in out.glob("*shard*")] == ["shard-000000.tar"]
    monkeypatch.undo()
    pack(source, out, FIVE, 1)
    assert content(out) == content(tmp_path / "whole")


def kill_at_five(source: Source, index: int) -> int:
    if index == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return index


def test_killed_worker_raises_input_error() -> None:
    with pytest.raises(InputError, match=r"a worker was killed near .*fewer --workers"):
        list(workers.each_image(pixels(40), range(40), kill_at_five, 2))


# ---- full disk and unusable destinations


def test_full_disk_leaves_no_partial_file_and_packing_resumes(
    tree: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(tree))
    writes = atomic._HashingFile.write
    written = []

    def until_full(self: Any, data: bytes) -> int:
        written.append(len(data))
        if sum(written) > 40_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return writes(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(atomic._HashingFile, "write", until_full)
        with pytest.raises(InputError, match=r"no space left on the disk for .*free some space, then run the same"):
            pack(source, out, FIVE, 1)
    assert sorted(content(out)) == ["classes.json", "pack.json", "shard-000000.tar"]
    pack(source, out, FIVE, 1)
    pack(source, tmp_path / "whole", FIVE, 1)
    assert content(out) == content(tmp_path / "whole")


def test_changed_options_or_images_are_refused(tree: Path, out: Path) -> None:
    pack(open_source(str(tree)), out, Options(max_side=64, shard_images=5), 1)
    before = content(out)
    for options in (Options(max_side=32, shard_images=5), Options(shard_images=5), Options(max_side=64, shard_mb=5)):
        with pytest.raises(InputError, match=r"was begun with .*max_side=64"):
            pack(open_source(str(tree)), out, options, 1)
    (tree / "n01" / "new.jpg").write_bytes(encoded(photograph(9), "JPEG"))
    with pytest.raises(InputError, match=r"with 12 images, this command packs .* with 13, and they differ.*rm -r"):
        pack(open_source(str(tree)), out, Options(max_side=64, shard_images=5), 1)
    assert content(out) == before


def test_unusable_destination_is_refused(tree: Path, tmp_path: Path) -> None:
    source = open_source(str(tree))
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    (tmp_path / "full" / ".precious.tmp").write_text("x")
    for place, words in (
        (tree / "out", r"it is inside SRC \(.*tree\)"),
        (tree, r"it is inside SRC \(.*tree\)"),
        (tmp_path / "file", "it is a file"),
        (tmp_path / "full", r"it has \.precious\.tmp and no pack\.json"),
        (Path("s3://bucket/x"), "expected a local folder"),
        (Path("/proc/nowhere/out"), "cannot write /proc/nowhere/out"),
    ):
        with pytest.raises(InputError, match=words):
            pack(source, place, FIVE, 1)
    assert len(content(tmp_path / "full")) == 2


def test_concurrent_packing_into_same_folder_is_refused(tree: Path, out: Path) -> None:
    (out).mkdir()
    with FileLock(out / ".lock"), pytest.raises(InputError, match="another process packs into"):
        pack(open_source(str(tree)), out, FIVE, 1)
    pack(open_source(str(tree)), out, FIVE, 1)


@pytest.mark.parametrize("damage", ["{", "[]", '{"version": 2}', "[" * 100_000])
def test_damaged_manifest_is_refused(tree: Path, out: Path, damage: str) -> None:
    source = open_source(str(tree))
    pack(source, out, FIVE, 1)
    (out / "pack.json").write_text(damage)
    with pytest.raises(InputError, match=r"pack\.json is damaged"):
        pack(source, out, FIVE, 1)


# ---- the command


def test_parts_of_folder_must_be_packed_separately(tmp_path: Path, out: Path) -> None:
    for part in ("train", "val"):
        class_tree(tmp_path / "in" / part, images=2)
    with pytest.raises(InputError, match="parts train and val: pack each"):
        main([str(tmp_path / "in"), str(out)])
    assert main([str(tmp_path / "in"), str(out), "--part", "val", "--workers", "1"]) == 0
    assert len(items(out)) == 4


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "found no command"),
        (["pakc"], "'pakc'"),
        (["pack", "x"], "destination is empty"),
        (["pack", "x", "y", "--max-side", "-1"], "max_side is -1"),
        (["pack", "x", "y", "--white-level", "4095"], "white_level is 4095"),
        (["pack", "x", "y", "--shard-mb", "1", "--shard-images", "1"], "shard_mb and shard_images"),
        (["pack", "absent", "y"], "no data at 'absent'"),
    ],
)
def test_invalid_command_line_raises_input_error(argv: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        data_command(argv)
