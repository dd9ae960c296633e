"""Packing a data set into shards: what is in them."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from bad_images import encoded, photograph, sideways
from pack_fixtures import FIVE, class_tree, items, members, originals, pixels
from PIL import Image

from dino_xcit.data import Source, decode, open_source
from dino_xcit.data.packing.command import pack
from dino_xcit.data.packing.folder import Options
from dino_xcit.data.packing.image import key_of, pack_image, relative_name
from dino_xcit.errors import InputError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return class_tree(tmp_path / "tree")


# ---- what is in the shards


def test_bytes_labels_classes_names_and_order_come_back(tree: Path, tmp_path: Path) -> None:
    source = open_source(str(tree))
    folder, seen = pack(source, tmp_path / "out", FIVE, 1)
    assert seen == 12
    assert [shard.images for shard in folder.shards] == [5, 5, 2]
    assert items(tmp_path / "out") == originals(source, tree)
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["n01", "n02"]
    assert list(members(tmp_path / "out"))[:2] == [
        "00000000_n01%2Fn01_0%2Ev1%2EJPEG.cls",
        "00000000_n01%2Fn01_0%2Ev1%2EJPEG.jpg",
    ]


def test_the_shards_open_as_the_same_data_set(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINO_XCIT_CACHE", str(tmp_path / "cache"))
    source = open_source(str(tree))
    pack(source, tmp_path / "out", FIVE, 1)
    packed = open_source(f"tar:{tmp_path}/out/shard-*.tar")
    assert packed.classes == source.classes
    assert packed.labels is not None
    assert source.labels is not None
    np.testing.assert_array_equal(packed.labels, source.labels)
    assert [packed.read(index) for index in range(len(packed))] == [source.read(index) for index in range(12)]
    # and once more, from shards to shards
    pack(packed, tmp_path / "again", Options(shard_images=7), 1)
    assert [rest for _, *rest in items(tmp_path / "again")] == [rest for _, *rest in items(tmp_path / "out")]
    with pytest.raises(InputError, match="and they differ"):  # and not over its own source
        pack(packed, tmp_path / "out", FIVE, 1)
    (tmp_path / "out" / "pack.json").unlink()
    with pytest.raises(InputError, match=r"it holds shard-000000\.tar and more and no pack\.json"):
        pack(packed, tmp_path / "out", FIVE, 1)


def test_a_heap_has_no_labels_and_no_classes(tree: Path, tmp_path: Path) -> None:
    (tree / "loose.jpg").write_bytes(encoded(photograph(7), "JPEG"))
    source = open_source(str(tree))
    pack(source, tmp_path / "out", FIVE, 1)
    assert items(tmp_path / "out") == originals(source, tree)
    assert not (tmp_path / "out" / "classes.json").exists()
    assert not any(name.endswith(".cls") or "/" in name for name in members(tmp_path / "out"))


def test_the_manifest_says_what_the_shards_are(tree: Path, tmp_path: Path) -> None:
    source = open_source(str(tree))
    pack(source, tmp_path / "out", FIVE, 1)
    manifest = json.loads((tmp_path / "out" / "pack.json").read_text())
    assert manifest["source"] == str(tree)
    assert manifest["fingerprint"] == source.fingerprint()
    assert (manifest["images"], manifest["packed"], manifest["complete"]) == (12, 12, True)
    for row in manifest["shards"]:
        data = (tmp_path / "out" / row["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (row["bytes"], row["sha256"])


@pytest.mark.parametrize(
    "name",
    [
        "a/b.c/d.e.jpg",
        "100%.png",
        "a\\b.jpg",
        "日本/ä b.png",
        "new\nline.png",
        "zero\udcff.png",
        "../up.jpg",
        "/abs/x.jpg",
    ],
)
def test_a_key_is_one_word_without_dots_and_gives_the_name_back(name: str) -> None:
    key = key_of(7, name)
    assert key.startswith("00000007_")
    assert not set("./\\\n") & set(key)
    assert unquote(key.partition("_")[2], errors="surrogateescape") == name


def test_a_name_as_long_as_a_path_can_be_is_packed_so_that_it_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINO_XCIT_CACHE", str(tmp_path / "cache"))
    data = encoded(photograph(1), "JPEG")
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        for name in ("a/" * 2040 + "1.jpg", "a/" * 2040 + "2.jpg", "ä" * 2000 + ".jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    source = open_source(f"tar:{tmp_path}/in.tar")
    pack(source, tmp_path / "out", FIVE, 1)
    packed = open_source(f"tar:{tmp_path}/out/shard-*.tar")
    assert [packed.read(index)[0] for index in range(len(packed))] == [data] * 3
    assert "a%2Fa%2F" in packed.name(0)


def test_a_path_listed_twice_has_two_keys(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(photograph(1), "JPEG"))
    (tmp_path / "list.txt").write_text("a.jpg\na.jpg\n")
    pack(open_source(str(tmp_path / "list.txt")), tmp_path / "out", FIVE, 1)
    assert [name for name, _, _ in items(tmp_path / "out")] == ["a.jpg", "a.jpg"]


def test_names_are_relative_to_the_folder_or_to_the_list() -> None:
    assert relative_name("/data/x", "/data/x/a/b.jpg") == "a/b.jpg"
    assert relative_name("/data/list.txt", "/data/a/b.jpg") == "a/b.jpg"
    assert relative_name("/data/list.txt", "/far/b.jpg") == "/far/b.jpg"
    assert relative_name("sample:x/train", "sample:x/train/00012") == "00012"


def test_pixels_are_packed_without_loss(tmp_path: Path) -> None:
    source = pixels(7)
    pack(source, tmp_path / "out", FIVE, 1)
    packed = items(tmp_path / "out")
    assert len(packed) == 7
    for index, (_, data, label) in enumerate(packed):
        item, expected = source.read(index)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(item))
        assert label == expected


def test_a_shard_ends_with_the_image_that_makes_it_large_enough(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(6):
        (tmp_path / "in" / f"{number}.bmp").write_bytes(encoded(Image.new("RGB", (400, 400)), "BMP"))  # 480 kB
    folder, _ = pack(open_source(str(tmp_path / "in")), tmp_path / "out", Options(shard_mb=1), 1)
    assert [shard.images for shard in folder.shards] == [3, 3]


def test_packed_pictures_decode_as_the_originals_do(tree: Path, tmp_path: Path) -> None:
    pack(open_source(str(tree)), tmp_path / "out", FIVE, 1)
    source = open_source(str(tree))
    for index, (name, data, _) in enumerate(items(tmp_path / "out")):
        assert decode(data, name).tobytes() == decode(source.read(index)[0], name).tobytes()


# ---- smaller pictures


def packed_with(source: Source, max_side: int | None) -> list[tuple[str, bytes]]:
    found = [pack_image(source, index, max_side, 90) for index in range(len(source))]
    return [(one.suffix, one.data) for one in found]


def test_the_longer_side_is_bounded_and_small_files_keep_their_bytes(tmp_path: Path) -> None:
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


def test_shrunk_pictures_are_444_and_close_to_a_mean_of_what_they_cover(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stripes = np.repeat(rng.integers(0, 256, (60, 80, 3)), 5, axis=0).repeat(5, axis=1).astype(np.uint8)
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(stripes), "PNG"))
    noise = rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)
    (tmp_path / "b.png").write_bytes(encoded(Image.fromarray(noise), "PNG"))
    source = open_source(str(tmp_path))
    (_, smooth), (_, grain) = packed_with(source, 80)
    picture = Image.open(io.BytesIO(smooth))
    assert isinstance(picture, Image.Image)
    assert {layer[1:3] for layer in picture.layer} == {(1, 1)}  # type: ignore[attr-defined]
    assert np.asarray(Image.open(io.BytesIO(grain))).std() < 30  # without antialiasing 74


def test_pictures_that_lie_on_their_side_are_upright_where_they_are_written_anew(tmp_path: Path) -> None:
    picture = photograph(3)
    (tmp_path / "a.jpg").write_bytes(sideways(picture))
    source = open_source(str(tmp_path))
    for max_side in (48, 96):
        ((_, data),) = packed_with(source, max_side)
        written = Image.open(io.BytesIO(data))
        assert written.getexif().get(0x0112) is None
        assert written.size == (max_side, max_side * 3 // 4)
        expected = picture.resize(written.size, Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(written, int) - np.asarray(expected, int)).mean() < 6
    ((_, data),) = packed_with(source, None)
    assert data == (tmp_path / "a.jpg").read_bytes()


def test_quality_and_comments(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(photograph(3), "JPEG", comment=b"secret words"))
    source = open_source(str(tmp_path))
    fine, coarse = (pack_image(source, 0, 50, quality).data for quality in (95, 30))
    assert len(fine) > 1.5 * len(coarse)
    assert b"secret words" not in fine
