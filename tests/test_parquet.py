"""Images in Parquet files: as the hub ships them, and in every encoding that pyarrow writes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from parquet_fixtures import Image, hub_table, noise, opened, read_all, read_one_by_one

from dino_xcit.data import UndecodableImage, files
from dino_xcit.data.parquet import pages as parquet_pages
from dino_xcit.data.parquet import source as parquet
from dino_xcit.data.parquet.values import unpack_hybrid
from dino_xcit.errors import InputError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINO_XCIT_CACHE", str(tmp_path_factory.mktemp("cache")))


# ---- what the hub ships


def test_a_file_of_the_hub_is_read_with_its_names_labels_and_classes(tmp_path: Path) -> None:
    images = noise(250)
    labels = [number % 3 for number in range(250)]
    table = hub_table(images, labels, ("tench", "goldfish", "shark"))
    pq.write_table(table, tmp_path / "train-00000-of-00001.parquet", row_group_size=100)
    source = opened(tmp_path / "train-*.parquet")
    assert len(source) == 250
    assert read_all(source) == images
    assert read_one_by_one(source) == 250
    assert source.classes == ("tench", "goldfish", "shark")
    assert source.labels is not None
    assert source.labels.tolist() == labels
    assert source.read(7)[1] == 1
    assert source.name(123) == "train-00000-of-00001.parquet/000123/n123.JPEG"
    assert source.name(-1) == "train-00000-of-00001.parquet/000249/n249.JPEG"
    with pytest.raises(IndexError):
        source.read(250)


def test_an_image_costs_the_bytes_around_it_not_its_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = noise(100, 80_000, 120_000)
    pq.write_table(hub_table(images), tmp_path / "a.parquet", row_group_size=100)
    source = opened(tmp_path / "a.parquet")
    taken: list[int] = []
    real = files.read_range

    def counted(path: str, start: int, length: int, unchanged: files.Stamp) -> bytes:
        taken.append(length)
        return real(path, start, length, unchanged)

    monkeypatch.setattr(files, "read_range", counted)
    assert read_all(source) == images
    assert len(taken) == 100
    surplus = [length - len(images[index]) for index, length in
               zip(np.random.default_rng(0).permutation(100).tolist(), taken, strict=True)]  # fmt: skip
    assert max(surplus) <= 2 * 65_536 + 100


def test_several_files_are_one_source_in_the_order_of_their_names(tmp_path: Path) -> None:
    images = noise(60)
    for number in range(3):
        part = hub_table(images[20 * number : 20 * number + 20], [number] * 20, ("a", "b", "c"))
        pq.write_table(part, tmp_path / f"train-{number}.parquet")
    source = opened(tmp_path / "train-{0..2}.parquet")
    assert read_all(source) == images
    assert source.name(45) == "train-2.parquet/000005/n005.JPEG"
    assert len({source.name(index) for index in range(60)}) == 60
    assert source.labels is not None
    assert source.labels.tolist() == [0] * 20 + [1] * 20 + [2] * 20


def test_files_of_the_same_name_in_two_folders_have_different_names(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        pq.write_table(hub_table(noise(3)), tmp_path / folder / "x.parquet")
    source = opened(tmp_path / "*" / "x.parquet")
    assert [source.name(0), source.name(3)] == ["one/x.parquet/000000/n000.JPEG", "two/x.parquet/000000/n000.JPEG"]


def test_a_folder_of_the_hub_is_opened_by_part(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for part, count in (("train", 5), ("validation", 4), ("test", 3)):
        table = hub_table(noise(count), [0] * count if part != "test" else [-1] * count)
        pq.write_table(table, tmp_path / "data" / f"{part}-00000-of-00001.parquet")
    assert [len(opened(tmp_path, part)) for part in (None, "train", "val")] == [5, 5, 4]
    (tmp_path / "data" / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(InputError, match="begins with train; there are those of test, validation"):
        opened(tmp_path, "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"ends in \.parquet"):
        opened(tmp_path / "empty")
    for number in range(2):
        pq.write_table(hub_table(noise(2)), tmp_path / "empty" / f"{number}.parquet")
    assert len(opened(tmp_path / "empty", "train")) == 4  # no parts: all of it


# ---- every encoding

ENCODINGS: dict[str, tuple[dict[str, Any], bool]] = {
    f"{compression} {kind} v{version}": (
        {"compression": compression, "data_page_version": f"{version}.0", **options},
        compression in ("none", "snappy"),
    )
    for compression in ("none", "snappy", "zstd", "gzip", "brotli", "lz4")
    for version in (1, 2)
    for kind, options in (
        ("plain", {"use_dictionary": False}),
        ("small pages", {"use_dictionary": False, "data_page_size": 20_000, "write_batch_size": 4}),
        ("dictionary", {"dictionary_pagesize_limit": 1 << 30}),
        ("dictionary that overflows", {"dictionary_pagesize_limit": 50_000, "write_batch_size": 8}),
    )
} | {
    "delta lengths": ({"use_dictionary": False, "column_encoding": {"image.bytes": "DELTA_LENGTH_BYTE_ARRAY"}}, False),
    "delta": ({"use_dictionary": False, "column_encoding": {"image.bytes": "DELTA_BYTE_ARRAY"}}, False),
    "checksums": ({"write_page_checksum": True, "write_page_index": True}, True),
    "chunks by content": ({"use_content_defined_chunking": True}, True),
    "large binary": ({"store_schema": True}, True),
}
"""What pyarrow is asked to write: its options, and whether images can be read one by one then."""


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("nulls", [False, True])
def test_images_are_those_that_pyarrow_reads_in_every_encoding_it_writes(
    tmp_path: Path, encoding: str, nulls: bool
) -> None:
    images: list[Image] = [*noise(60), b"", b"x" * 65_536, b"\xff" * 300_000, *noise(20, 65_400, 65_600, seed=1)]
    images += images[5:15]  # the dictionary has these once
    if nulls:
        images = [image if number % 7 else None for number, image in enumerate(images)]
    options, one_by_one = ENCODINGS[encoding]
    path = tmp_path / "x.parquet"
    table = hub_table(images)
    if encoding == "large binary":
        table = pa.table({"image": pa.array(images, pa.large_binary())})
    pq.write_table(table, path, row_group_size=40, **options)
    column = pq.read_table(path).column("image")
    truth = [row["bytes"] if isinstance(row, dict) else row for row in column.to_pylist()]
    assert truth == images
    source = opened(path)
    assert read_all(source) == images
    assert (read_one_by_one(source) > 0) == one_by_one
    if one_by_one:
        assert read_one_by_one(source) == len(images)


def test_columns_that_cannot_be_null_and_rows_without_any_image_are_read(tmp_path: Path) -> None:
    images = noise(10)
    schema = pa.schema([pa.field("image", pa.binary(), nullable=False)])
    pq.write_table(pa.table({"image": images}, schema=schema), tmp_path / "required.parquet")
    assert read_all(opened(tmp_path / "required.parquet")) == images
    pq.write_table(hub_table([None] * 10), tmp_path / "nulls.parquet")
    assert read_all(opened(tmp_path / "nulls.parquet")) == [None] * 10


def test_a_whole_structure_that_is_null_is_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    structure = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": b"one", "path": None}, None, {"bytes": None, "path": "elsewhere.jpg"}]
    pq.write_table(pa.table({"image": pa.array(rows, structure)}), tmp_path / "x.parquet")
    source = opened(tmp_path / "x.parquet")
    assert source.read(0) == (b"one", None)
    for index in (1, 2):
        with pytest.raises(
            UndecodableImage, match=r"x\.parquet/00000.* cannot be read: the row holds no image"
        ) as caught:
            source.read(index)
        assert caught.value.cause == "the row holds no image"


@pytest.mark.parametrize("width", [0, 1, 3, 8, 9, 17, 32])
def test_numbers_of_every_width_are_unpacked(width: int) -> None:
    """Against bits written one by one: a run, packed groups, another run."""
    rng = np.random.default_rng(width)
    packed = rng.integers(0, 1 << width, 24)
    bits = [(int(number) >> bit) & 1 for number in packed for bit in range(width)]
    body = np.packbits(np.array(bits, np.uint8), bitorder="little").tobytes()
    number = (1 << width) - 1
    run = number.to_bytes((width + 7) // 8, "little")
    data = bytes([5 << 1]) + run + bytes([3 << 1 | 1]) + body + bytes([200, 1]) + run  # 100 as a varint, doubled
    expected = [number] * 5 + packed.tolist() + [number] * 100
    for count in (0, 1, 5, 6, 13, 29, 30, 129):
        assert unpack_hybrid(memoryview(data), width, count).tolist() == expected[:count]
    with pytest.raises(parquet_pages.DamagedPage):
        unpack_hybrid(memoryview(data), width, 130)


def test_a_slow_file_says_so_once_and_how_to_be_rid_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(hub_table(noise(10)), tmp_path / "x.parquet", compression="zstd")
    opened(tmp_path / "x.parquet")
    out = capsys.readouterr().out
    assert out.count("warning:") == 1
    assert "compressed with Zstandard" in out
    assert "python -m dino_xcit.data pack" in out
    pq.write_table(hub_table(noise(10)), tmp_path / "x.parquet")
    opened(tmp_path / "x.parquet")
    assert "warning:" not in capsys.readouterr().out


def test_decoded_row_groups_are_kept_within_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = noise(60, 10_000, 10_001)
    pq.write_table(hub_table(images), tmp_path / "x.parquet", compression="zstd", row_group_size=10)
    source = opened(tmp_path / "x.parquet")
    monkeypatch.setattr(parquet, "_KEPT", 250_000)  # two row groups of 101,500 bytes, not three
    decoded: list[int] = []
    real = parquet.decode_group

    def counted(path: str, group: int, leaf: str, unchanged: files.Stamp) -> list[Image]:
        decoded.append(group)
        return real(path, group, leaf, unchanged)

    monkeypatch.setattr(parquet, "decode_group", counted)
    assert [source.read(index)[0] for index in range(60)] == images
    assert decoded == [0, 1, 2, 3, 4, 5]  # in order, each once
    source.read(45)
    assert decoded == [0, 1, 2, 3, 4, 5]
    source.read(0)
    assert decoded[6:] == [0]
    assert len(source._groups) == 2
    assert len(pickle.loads(pickle.dumps(source))._groups) == 0
