"""Images in Parquet files: as the hub ships them, in every encoding that pyarrow writes, and damaged."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_images import mutate

from dino_xcit.data import UndecodableImage, files
from dino_xcit.data.index import Index
from dino_xcit.data.parquet import ParquetSource, open_parquet
from dino_xcit.data.parquet import pages as parquet_pages
from dino_xcit.data.parquet import scan as parquet_scan
from dino_xcit.data.parquet import source as parquet
from dino_xcit.data.parquet.scan import BY_GROUP
from dino_xcit.data.parquet.snappy import NoPieces, NotSnappy, pieces
from dino_xcit.data.parquet.values import Chunk, locate, unpack_hybrid
from dino_xcit.errors import InputError

Image = bytes | None


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINO_XCIT_CACHE", str(tmp_path_factory.mktemp("cache")))


def noise(count: int, least: int = 200, most: int = 30_000, seed: int = 0) -> list[bytes]:
    """Bytes that compress as little as photographs do; some of which repeat, as headers do."""
    rng = np.random.default_rng(seed)
    header = rng.bytes(150)
    return [header + rng.bytes(int(rng.integers(least, most))) for _ in range(count)]


def hub_table(
    images: Sequence[Image], labels: Sequence[int] | None = None, names: Sequence[str] = ("a", "b")
) -> pa.Table:
    """As ``datasets`` makes it: a structure of bytes and path, and a number whose names are in the metadata."""
    structure = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": image, "path": f"n{number:03d}.JPEG"} for number, image in enumerate(images)]
    columns = {"image": pa.array(rows, structure)}
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
        features["label"] = {"names": list(names), "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(columns).replace_schema_metadata(metadata)


def opened(path: Path | str, part: str | None = None) -> ParquetSource:
    return open_parquet(str(path), part)


def read_all(source: ParquetSource) -> list[Image]:
    """Every image, read in a shuffled order; None for those that cannot be read."""
    found: dict[int, Image] = {}
    for index in np.random.default_rng(0).permutation(len(source)).tolist():
        try:
            item, _ = source.read(index)
            assert isinstance(item, bytes)
            found[index] = item
        except UndecodableImage:
            found[index] = None
    return [found[index] for index in range(len(source))]


def read_one_by_one(source: ParquetSource) -> int:
    """How many images have a place of their own."""
    return int((source._columns["unpacked"] != BY_GROUP).sum())


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
    assert out.count("notice:") == 1
    assert "compressed with Zstandard" in out
    assert "python -m dino_xcit.data pack" in out
    pq.write_table(hub_table(noise(10)), tmp_path / "x.parquet")
    opened(tmp_path / "x.parquet")
    assert "notice:" not in capsys.readouterr().out


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


# ---- columns and labels


def test_cifar_s_names_are_understood(tmp_path: Path) -> None:
    images = noise(6)
    structure = pa.array([{"bytes": image, "path": None} for image in images])
    table = pa.table({"img": structure, "fine_label": [0, 1, 2, 0, 1, 2], "coarse_label": [0] * 6})
    pq.write_table(table, tmp_path / "x.parquet")
    source = opened(tmp_path / "x.parquet")
    assert read_all(source) == images
    assert source.classes == ("0", "1", "2")
    assert source.name(2) == "x.parquet/000002"
    assert opened(f"{tmp_path}/x.parquet?label=coarse_label").classes == ("0",)
    assert opened(f"{tmp_path}/x.parquet?label=none").labels is None


def test_words_as_labels_are_numbered_in_sorted_order_across_files(tmp_path: Path) -> None:
    for number, words in enumerate((["dog", "ant", "dog"], ["cat", "ant"])):
        table = pa.table({"jpg": noise(len(words)), "species": words})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=2)
    source = opened(f"{tmp_path}/*.parquet?label=species")
    assert source.classes == ("ant", "cat", "dog")
    assert source.labels is not None
    assert source.labels.tolist() == [2, 0, 2, 1, 0]
    assert opened(f"{tmp_path}/*.parquet").labels is None


def test_labels_that_are_kept_secret_are_none(tmp_path: Path) -> None:
    pq.write_table(hub_table(noise(4), [-1] * 4), tmp_path / "test.parquet")
    source = opened(tmp_path / "test.parquet")
    assert (source.labels, source.classes) == (None, None)
    assert source.read(0)[1] is None


@pytest.mark.parametrize(
    ("columns", "query", "words"),
    [
        ({"x": [1, 2]}, "", r"no column .* holds encoded images: it has the columns x \(int64\)"),
        ({"a": [b"1"], "b": [b"2"]}, "", r"not clear which .* a \(binary\), b \(binary\).*\?image=a"),
        ({"image": [b"1"], "jpg": [b"2"]}, "", "not clear which"),
        ({"image": [b"1"], "x": [1]}, "?image=imagee", r"'imagee' .* is none; did you mean image"),
        ({"image": [b"1"], "x": [1]}, "?image=x", "'x' .* holds no bytes"),
        ({"image": [b"1"], "x": [1.5]}, "?label=x", "neither whole numbers nor words"),
        ({"image": [b"1"], "label": [1]}, "?label=lable", "did you mean label"),
        ({"image": [b"1"], "label": [1], "target": [1]}, "", "label or target: say which by adding"),
        ({"image": [b"1", b"2"], "label": [1, None]}, "", "1 of the 2 images .* have no label.*label=none"),
        ({"image": [b"1", b"2"], "label": [1, 99_999_999]}, "", "label 99999999"),
        ({"image": [b"1", b"2"], "label": [1, -7]}, "", "label -7"),
        ({"image": pa.array([], pa.binary())}, "", "no rows"),
        ({"image": ["text"]}, "", "holds encoded images"),
        ({"image": [[1, 2, 3]]}, "", "holds encoded images"),
    ],
)
def test_what_is_not_clear_is_asked(tmp_path: Path, columns: dict[str, Any], query: str, words: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=words) as caught:
        opened(f"{tmp_path}/x.parquet{query}")
    assert "\n" not in str(caught.value)


def test_files_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    pq.write_table(hub_table(noise(2), [0, 1]), tmp_path / "a.parquet")
    for other, words in (
        (hub_table(noise(2)), "column of labels"),
        (hub_table(noise(2), [0, 1], ("a", "c")), "class names"),
        (pa.table({"img": noise(2), "label": [0, 1]}), "column of images"),
        (pa.table({"image": hub_table(noise(2)).column("image"), "label": ["a", "b"]}), "words or numbers"),
    ):
        pq.write_table(other, tmp_path / "b.parquet")
        with pytest.raises(InputError, match=rf"b\.parquet differs from .*a\.parquet in its .*{words}"):
            opened(tmp_path / "*.parquet")


def test_without_pyarrow_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        opened("x.parquet")


# ---- the index


def test_the_index_is_reused_and_labels_need_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = noise(30)
    path = tmp_path / "x.parquet"
    pq.write_table(hub_table(images, [0] * 30), path)
    first = opened(path)
    monkeypatch.setattr(parquet, "scan", None)
    monkeypatch.setattr(parquet, "look", None)
    again = opened(path)
    assert read_all(again) == images
    assert again.fingerprint() == first.fingerprint()
    monkeypatch.undo()


def test_a_changed_file_is_indexed_anew_and_has_another_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.parquet"
    prints = set()
    for seed, labels in ((0, [0] * 9), (1, [0] * 9), (1, [1] * 9)):
        pq.write_table(hub_table(noise(9, seed=seed), labels), path)
        os.utime(path, ns=(seed, labels[0] + 10 * seed + 1))
        source = opened(path)
        assert read_all(source) == noise(9, seed=seed)
        prints.add(source.fingerprint())
    assert len(prints) == 3


@pytest.mark.parametrize("compression", ["snappy", "zstd"])
def test_a_file_replaced_under_a_running_process_is_an_error_not_other_images(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(hub_table(noise(9)), path, compression=compression)
    source = opened(path)
    pq.write_table(hub_table(noise(9, seed=1)), tmp_path / "new", compression=compression)
    os.replace(tmp_path / "new", path)
    with pytest.raises(InputError, match=r"x\.parquet was replaced or changed since it was opened; start the same"):
        source.read(3)
    assert read_all(opened(path)) == noise(9, seed=1)


def test_files_that_were_moved_are_the_same_data(tmp_path: Path) -> None:
    pq.write_table(hub_table(noise(9)), tmp_path / "x.parquet")
    before = opened(tmp_path / "x.parquet").fingerprint()
    (tmp_path / "sub").mkdir()
    (tmp_path / "x.parquet").rename(tmp_path / "sub" / "x.parquet")
    assert opened(tmp_path / "sub" / "x.parquet").fingerprint() == before


def test_a_pickled_source_is_small_and_reads(tmp_path: Path) -> None:
    images = noise(5000, 20, 30)
    pq.write_table(hub_table(images, [0] * 5000), tmp_path / "x.parquet")
    data = pickle.dumps(opened(tmp_path / "x.parquet"))
    assert len(data) < 2000
    assert read_all(pickle.loads(data)) == images


# ---- remote


def test_files_that_fsspec_reads_are_read_alike(tmp_path: Path) -> None:
    import fsspec

    images = noise(40)
    labels = [number % 2 for number in range(40)]
    pq.write_table(hub_table(images, labels), tmp_path / "x.parquet", row_group_size=10)
    fsspec.filesystem("memory").pipe_file("/set/x.parquet", (tmp_path / "x.parquet").read_bytes())
    source = opened("memory://set/*.parquet?label=label")
    assert read_all(source) == images
    assert source.classes == ("a", "b")
    assert source.name(3) == "x.parquet/000003/n003.JPEG"


# ---- hostile files


def small_file(**options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(hub_table(noise(12, 100, 400), [0] * 12), buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PAR1",
        b"<html><body>404</body></html>",
        small_file()[:-100],
        small_file()[:200],
        small_file()[:-8] + b"\xff\xff\xff\x7fPAR1",
        b"PAR1" + bytes(100) + (50).to_bytes(4, "little") + b"PAR1",
    ],
    ids=["empty", "magic alone", "web page", "cut at the end", "cut early", "long footer", "zeros"],
)
def test_what_is_no_parquet_file_is_one_sentence(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.parquet").write_bytes(data)
    with pytest.raises(InputError, match=r"x\.parquet is .*fetch it anew") as caught:
        opened(tmp_path / "x.parquet")
    assert "\n" not in str(caught.value)


# ---- pages that lie


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def structure(**fields: int | bytes) -> bytes:
    """Thrift's compact protocol: ``f1=5`` is a number, bytes are a structure."""
    out, last = b"", 0
    for name, value in fields.items():
        number = int(name[1:])
        out += bytes([(number - last) << 4 | (12 if isinstance(value, bytes) else 5)])
        out += value if isinstance(value, bytes) else varint(2 * value if value >= 0 else -2 * value - 1)
        last = number
    return out + b"\0"


def page(body: bytes, unpacked: int | None = None, values: int = 1, stored: int | None = None, kind: int = 0) -> bytes:
    """A page of encoding PLAIN, with what its header claims."""
    inner = structure(f1=values, f2=0)
    sizes = (len(body) if unpacked is None else unpacked, len(body) if stored is None else stored)
    return structure(f1=kind, f2=sizes[0], f3=sizes[1], **{"f7" if kind else "f5": inner}) + body


def located(data: bytes, rows: int = 1, snappy: bool = False) -> list[list[int]]:
    window = parquet_pages.ByteWindow(lambda start, length: data[start : start + length], 0, len(data))
    codec = pa.Codec("snappy")
    chunk = Chunk(0, len(data), rows, 0, snappy)
    return locate(window, chunk, lambda packed, size: codec.decompress(packed, size, asbytes=True)).tolist()


ONE = (3).to_bytes(4, "little") + b"abc"


def test_pages_made_by_hand_are_read() -> None:
    first = page(ONE)
    assert located(first) == [[len(first) - 3, 3, 0, 0, 3]]
    packed = pa.Codec("snappy").compress(ONE, asbytes=True)
    (place,) = located(page(packed, len(ONE)), snappy=True)
    assert place[2:] == [len(ONE), 4, 3]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (page(ONE, stored=8), "a size that it cannot have"),
        (page(ONE, stored=-1), "a size that it cannot have"),
        (page(ONE, unpacked=10 * 2**30), "a page of 10,737,418,240 bytes"),
        (page(ONE, unpacked=100), "another size than it has"),
        (page(ONE, values=2), "more values"),
        (page(ONE, values=2**31 - 1), "more values"),
        (page(ONE, values=-1), "a size that it cannot have"),
        (page((2**32 - 1).to_bytes(4, "little") + b"abc"), "a value reaches beyond"),
        (page(ONE, kind=2) + page(ONE, values=0), "0 values for 1 rows"),
        (page(ONE, kind=2, values=2**31 - 1), "more values than it has room for"),
        (page(ONE)[:-1], "a size that it cannot have"),
        (page(ONE) + page(ONE), "2 values for 1 rows"),
        (b"", "0 values for 1 rows"),
        (b"\x1c" * 5000, "no page header"),
        (b"\x19" * 100, "no page header"),
        (b"\xff" * 100, "no page header"),
        (bytes(100), "no page header"),
        (structure(f1=0, f2=3, f3=3) + b"abc", "no page header"),
    ],
)
def test_a_page_that_lies_is_refused_before_anything_is_allocated(data: bytes, words: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(parquet_pages.DamagedPage, match=words):
            located(data)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("claimed", [2**29, 2**20, 8, 6, 1])
def test_a_snappy_page_that_claims_another_size_is_refused(claimed: int) -> None:
    packed = pa.Codec("snappy").compress(ONE, asbytes=True)
    for body in (packed, varint(claimed) + packed[1:]):
        with pytest.raises((parquet_pages.DamagedPage, NotSnappy)):
            located(page(body, claimed), snappy=True)


def test_snappy_blocks_that_cannot_be_entered_are_noticed() -> None:
    """Within 64 KiB a copy may refer to what is before; across the edge it may not."""
    literal = b"\xf4" + (65_535).to_bytes(2, "little") + bytes(65_536)
    copy = bytes([(8 - 1) << 2 | 2]) + (8).to_bytes(2, "little")
    assert pieces(memoryview(varint(65_536) + literal), 65_536) == [3, 3 + len(literal)]
    with pytest.raises(NoPieces, match="refer to each other"):
        pieces(memoryview(varint(65_544) + literal + copy), 65_544)
    short = b"\xf4" + (65_532).to_bytes(2, "little") + bytes(65_533)
    with pytest.raises(NoPieces, match="in other pieces"):
        pieces(memoryview(varint(65_541) + short + copy), 65_541)
    for block, size in ((literal + copy, 65_544), (short + copy, 65_541)):  # both are right, all the same
        assert pa.Codec("snappy").decompress(varint(size) + block, size, asbytes=True) == bytes(size)


def test_what_stands_for_much_more_than_its_pages_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image of 1 MB, a thousand times, in a dictionary that has to be decoded as a whole."""
    monkeypatch.setattr(parquet_scan, "MAX_GROUP", 50_000_000)
    pq.write_table(hub_table([noise(1)[0] + bytes(1_000_000)] * 1000), tmp_path / "x.parquet", compression="zstd")
    assert (tmp_path / "x.parquet").stat().st_size < 40_000
    source = opened(tmp_path / "x.parquet")
    with pytest.raises(InputError, match="decodes to more than 50,000,000 bytes"):
        source.read(0)


def test_an_index_that_asks_for_what_is_not_there_is_not_taken(tmp_path: Path) -> None:
    pq.write_table(hub_table(noise(10), [0] * 10), tmp_path / "x.parquet")
    source = opened(tmp_path / "x.parquet")
    index, paths = source._index, [str(tmp_path / "x.parquet")]
    stamps = list(index.strings["stamps"])
    assert parquet._is_sound(index, paths, stamps)
    for name, least, most in (
        *((name, -1, 2**40) for name in ("start", "stored", "skip")),
        ("unpacked", -2, 2**40),
        ("length", -2, 2**40),
        ("file", -1, 1),
        ("label", -1, 2),
        ("first", -1, 11),
    ):
        for value in (least, most):
            changed = np.array(index.numbers[name])
            changed[-1] = value
            assert not parquet._is_sound(Index({**index.numbers, name: changed}, index.strings), paths, stamps), name
    assert not parquet._is_sound(index, paths, ["1 2"])
    for pair in (("start", "stored"), ("skip", "length")):  # their sum is a small number again
        round_about = {name: np.full_like(index.numbers[name], 2**62) for name in pair}
        assert not parquet._is_sound(Index({**index.numbers, **round_about}, index.strings), paths, stamps), pair


@pytest.mark.parametrize(
    "options", [{}, {"use_dictionary": False}, {"data_page_version": "2.0"}, {"compression": "zstd"}]
)
def test_mutated_files_end_in_sentences_or_other_bytes_never_in_anything_else(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """250 files each, changed anywhere; half of the changes in the first 200 bytes, where a page's header is."""
    whole = small_file(**options)
    rng = np.random.default_rng(1)
    refused = 0
    for number in range(250):
        path = tmp_path / f"{number}.parquet"
        path.write_bytes(mutate(whole, whole, rng))
        try:
            source = opened(path)
        except InputError:
            refused += 1
            continue
        for index in range(len(source)):
            try:
                item, label = source.read(index)
            except InputError:
                continue
            assert isinstance(item, bytes)
            assert label is None or 0 <= label < 2
    assert 50 < refused < 250


def test_more_rows_than_allowed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(hub_table(noise(9)), tmp_path / "x.parquet", row_group_size=2)
    monkeypatch.setattr("dino_xcit.data.parquet.footer.MOST_ROWS", 8)
    with pytest.raises(InputError, match=r"x\.parquet has 9 rows, more than 8: write it anew as several files"):
        opened(tmp_path / "x.parquet")


def test_a_codec_that_nobody_knows_is_a_sentence_where_pyarrow_would_end_the_process(tmp_path: Path) -> None:
    whole = small_file(store_schema=False)
    footer = int.from_bytes(whole[-8:-4], "little")
    # ColumnMetaData: path_in_schema, then the codec as a small number, 2 where it is Snappy's 1.
    place = whole.index(b"\x05bytes\x15\x02", len(whole) - 8 - footer) + 7
    (tmp_path / "x.parquet").write_bytes(whole[:place] + b"\x7f" + whole[place + 1 :])
    with pytest.raises(InputError, match=r"x\.parquet.*codec") as caught:
        opened(tmp_path / "x.parquet").read(0)
    assert "\n" not in str(caught.value)
