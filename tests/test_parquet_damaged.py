"""Parquet files that are damaged, and pages that lie."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_images import mutate
from parquet_fixtures import hub_table, noise, opened

from dino_xcit.data.index import Index
from dino_xcit.data.parquet import pages as parquet_pages
from dino_xcit.data.parquet import scan as parquet_scan
from dino_xcit.data.parquet import source as parquet
from dino_xcit.data.parquet.snappy import NoPieces, NotSnappy, pieces
from dino_xcit.data.parquet.values import Chunk, locate
from dino_xcit.errors import InputError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINO_XCIT_CACHE", str(tmp_path_factory.mktemp("cache")))


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
