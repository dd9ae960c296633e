"""Archives that are cut short, damaged, no archives at all, or that lead out of where they are unpacked."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

Maker = Callable[[Path], None]
REFUSED: dict[str, tuple[Maker, str]] = {}
"""Archives that cannot be used: their maker, and what the sentence must match."""
PASSED_OVER: dict[str, tuple[Maker, str]] = {}
"""Archives with one good image, a.png: their maker, and what is said of the rest."""


def refused(pattern: str) -> Callable[[Maker], Maker]:
    def add(maker: Maker) -> Maker:
        REFUSED[maker.__name__] = (maker, pattern)
        return maker

    return add


def passed_over(pattern: str) -> Callable[[Maker], Maker]:
    def add(maker: Maker) -> Maker:
        PASSED_OVER[maker.__name__] = (maker, pattern)
        return maker

    return add


def png(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (3, 2), shade).save(buffer, "PNG")
    return buffer.getvalue()


def packed(contents: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    """An archive as tarfile writes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


END = bytes(1024)
GOOD = packed({"a.png": png()})
GOOD_MEMBER = GOOD[:1024]
"""The header and the content, which fits into one block, of a.png."""


def header(
    name: bytes, size: int | bytes, kind: bytes = b"0", linkname: bytes = b"", magic: bytes = b"ustar\x0000"
) -> bytes:
    """512 bytes whose checksum is right, whatever else they say."""
    field = b"%011o\0" % size if isinstance(size, int) else size.ljust(12, b"\0")
    block = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + field + b"00000000000\0" + b" " * 8
    block = (block + kind + linkname.ljust(100, b"\0") + magic).ljust(512, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(records: bytes) -> bytes:
    return header(b"PaxHeaders/a", len(records), b"x") + padded(records)


def record(key: str, value: str) -> bytes:
    text = f" {key}={value}\n"
    length = len(text) + len(str(len(text) + len(str(len(text)))))
    return f"{length}{text}".encode()


def wrong_checksum(block: bytes) -> bytes:
    return block[:120] + bytes([block[120] ^ 1]) + block[121:]


# ---- refused


@refused("is empty")
def nothing(path: Path) -> None:
    path.write_bytes(b"")


@refused("no image in")
def only_the_end(path: Path) -> None:
    path.write_bytes(END * 10)


@refused("no image in")
def no_image(path: Path) -> None:
    path.write_bytes(packed({"a.txt": b"words", "b.cls": b"1"}))


@refused("is a web page")
def web_page(path: Path) -> None:
    path.write_bytes(b"<!DOCTYPE html><html><body>Sign in to download" + b" " * 1000)


@refused("is no tar archive")
def short_text(path: Path) -> None:
    path.write_bytes(b"hello")


@refused("is no tar archive")
def noise(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 40)


@refused("is compressed.*decompress it with gzip -d")
def gzipped(path: Path) -> None:
    path.write_bytes(gzip.compress(GOOD))


@refused("is compressed")
def gzipped_and_tiny(path: Path) -> None:
    path.write_bytes(gzip.compress(b"")[:30])


@refused("is compressed")
def bzipped(path: Path) -> None:
    path.write_bytes(bz2.compress(GOOD))


@refused("is compressed")
def xzipped(path: Path) -> None:
    path.write_bytes(lzma.compress(GOOD))


@refused("is no tar archive")
def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", png())


@refused("is cut short within 'b.png'")
def cut_within_an_image(path: Path) -> None:
    path.write_bytes(packed({"a.png": png(), "b.png": bytes(5000)})[: 1024 + 512 + 3000])


@refused("is cut short without the mark of its end")
def cut_within_a_header(path: Path) -> None:
    path.write_bytes(packed({"a.png": png(), "b.png": png()})[: 1024 + 300])


@refused("is cut short without the mark of its end")
def cut_between_two_images(path: Path) -> None:
    path.write_bytes(GOOD_MEMBER)


@refused("wrong checksum")
def second_header_damaged(path: Path) -> None:
    path.write_bytes(GOOD_MEMBER + wrong_checksum(header(b"b.png", 0)) + END)


@refused("is no tar archive")
def first_header_damaged(path: Path) -> None:
    path.write_bytes(wrong_checksum(header(b"b.png", 0)) + END)


@refused("cut short within 'b.png'")
def image_of_eight_exabytes(path: Path) -> None:
    path.write_bytes(GOOD_MEMBER + header(b"b.png", b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7) + END)


@refused("is cut short without the mark of its end")
def common_header_beyond_any_file(path: Path) -> None:
    path.write_bytes(GOOD_MEMBER + header(b"pax_global_header", b"\x80" + b"\xff" * 11, b"g") + END)


@refused("is cut short without the mark of its end")
def link_s_name_beyond_any_file(path: Path) -> None:
    path.write_bytes(GOOD_MEMBER + header(b"././@LongLink", b"\x80" + b"\x7f" * 11, b"K") + END)


@refused("a size that is no number")
def negative_size(path: Path) -> None:
    path.write_bytes(GOOD_MEMBER + header(b"b.png", b"\xff" * 12) + END)


@refused("a size that is no number")
def size_in_words(path: Path) -> None:
    path.write_bytes(GOOD_MEMBER + header(b"b.png", b"-0000000512") + END)


@refused("an extended header of 1,073,741,824 bytes")
def pax_header_of_a_gigabyte(path: Path) -> None:
    with open(path, "wb") as file:
        file.write(header(b"x", 1 << 30, b"x"))
        file.truncate((1 << 30) + 2048)


@refused("an extended header of 1,073,741,824 bytes")
def long_name_of_a_gigabyte(path: Path) -> None:
    with open(path, "wb") as file:
        file.write(header(b"././@LongLink", 1 << 30, b"L"))
        file.truncate((1 << 30) + 2048)


@refused("a name of 5,000 bytes")
def pax_path_beyond_any(path: Path) -> None:
    path.write_bytes(pax(record("path", "d/" * 2498 + ".png")) + GOOD)


@refused("extended header that cannot be read")
def pax_record_of_no_length(path: Path) -> None:
    path.write_bytes(pax(b"0 path=b.png\n") + GOOD)


@refused("extended header that cannot be read")
def pax_record_longer_than_its_header(path: Path) -> None:
    path.write_bytes(pax(b"999 path=b.png\n") + GOOD)


@refused("extended header that cannot be read")
def pax_record_without_an_equals_sign(path: Path) -> None:
    path.write_bytes(pax(b"9 pathpat\n") + GOOD)


@refused("extended header that cannot be read")
def pax_size_of_a_million_digits(path: Path) -> None:
    path.write_bytes(pax(record("size", "9" * 1_000_000)) + GOOD)


@refused("cut short")
def pax_header_beyond_the_end(path: Path) -> None:
    path.write_bytes(GOOD_MEMBER + header(b"x", 5000, b"x"))


@refused("cut short")
def global_header_beyond_the_end(path: Path) -> None:
    path.write_bytes(GOOD_MEMBER + header(b"x", 1 << 32, b"g") + END)


@refused("cut short")
def sparse_map_without_end(path: Path) -> None:
    block = bytearray(header(b"b.png", 0, b"S"))
    block[482] = 1
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    path.write_bytes(GOOD_MEMBER + bytes(block) + (bytes(504) + b"\x01" + bytes(7)) * 4)


@refused(r"holds b'cat\\ndog'")
def class_in_two_lines(path: Path) -> None:
    path.write_bytes(packed({"a.png": png(), "a.cls": b"cat\ndog"}))


@refused(r"holds b'\\x00cat'")
def class_in_bytes(path: Path) -> None:
    path.write_bytes(packed({"a.png": png(), "a.cls": b"\x00cat"}))


@refused("holds b'-7.5'")
def class_between_numbers(path: Path) -> None:
    path.write_bytes(packed({"a.png": png(), "a.cls": b"-7.5"}))


@refused("a class's name, one line of at most 200 bytes")
def class_in_a_novel(path: Path) -> None:
    path.write_bytes(packed({"a.png": png(), "a.cls": b"cat " * 60}))


@refused("holds b'99999999999")
def class_number_beyond_any(path: Path) -> None:
    path.write_bytes(packed({"a.png": png(), "a.cls": b"9" * 60}))


@refused("holds b'1000000'")
def class_number_that_would_need_a_million_names(path: Path) -> None:
    path.write_bytes(packed({"a.png": png(), "a.cls": b"1000000"}))


@refused("of some images are numbers, of others names")
def labels_of_two_kinds(path: Path) -> None:
    path.write_bytes(packed({"a.png": png(), "a.json": b'{"label": 1}', "b.png": png(), "b.json": b'{"label": "x"}'}))


# ---- passed over


@passed_over("2 links")
def links(path: Path) -> None:
    path.write_bytes(header(b"b.png", 0, b"2", b"/etc/passwd") + header(b"c.png", 700, b"1", b"a.png") + GOOD)


@passed_over("2 devices, 1 pipes")
def devices(path: Path) -> None:
    path.write_bytes(header(b"b.png", 0, b"3") + header(b"c.png", 0, b"4") + header(b"d.png", 0, b"6") + GOOD)


@passed_over("1 sparse files")
def sparse_of_gnu(path: Path) -> None:
    block = bytearray(header(b"b.png", 512, b"S"))
    block[482] = 1
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    path.write_bytes(bytes(block) + bytes(512) + bytes(512) + GOOD)


@passed_over("1 sparse files")
def sparse_of_pax(path: Path) -> None:
    records = record("GNU.sparse.major", "1") + record("GNU.sparse.name", "b.png")
    path.write_bytes(pax(records) + header(b"b.png", 512) + bytes(512) + GOOD)


@passed_over("5 names that lead out")
def names_that_lead_out(path: Path) -> None:
    names = (b"/etc/b.png", b"../b.png", b"x/../../b.png", b"./../b.png")
    nul = pax(record("path", "b\0.png")) + header(b"b.png", 0)
    path.write_bytes(b"".join(header(name, 0) for name in names) + nul + GOOD)


@passed_over("1 members of an unknown kind")
def unknown_kind(path: Path) -> None:
    path.write_bytes(header(b"b.png", 600, b"Q") + bytes(1024) + GOOD)


@passed_over("1 images of more than 1 GiB")
def image_of_two_gigabytes(path: Path) -> None:
    with open(path, "wb") as file:  # sparse on the disk
        file.write(header(b"b.png", 2 << 30))
        file.seek((2 << 30) + 512)
        file.write(GOOD)


@passed_over("")
def odd_but_harmless(path: Path) -> None:
    """A global header, a long link name, folders, a hidden file, nested JSON, an old header without a magic."""
    comment = record("comment", "from git archive")
    link = header(b"././@LongLink", 600, b"K") + bytes(1024)
    folders = header(b"d/", 0, b"5") + header(b"old/", 0, b"\0", magic=b"")
    hidden = header(b".b.png", 0) + header(b"d/._c.png", 0)
    nested = padded(header(b"a.json", 100_000) + b"[" * 100_000)
    path.write_bytes(header(b"g", len(comment), b"g") + padded(comment) + link + folders + hidden + nested + GOOD)
