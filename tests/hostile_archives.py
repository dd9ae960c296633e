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

Content = bytes | Callable[[Path], None]
"""An archive, or what writes one that is too large to be held."""


def write(content: Content, path: Path) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)


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


def sparse(size: int) -> bytes:
    """The header of a sparse file of GNU tar's whose map goes on in the next block."""
    block = bytearray(header(b"b.png", size, b"S"))
    block[482] = 1
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", png())
    return buffer.getvalue()


def of_a_gigabyte(begin: bytes) -> Content:
    """Nothing but zeros after its beginning; sparse on the disk."""

    def make(path: Path) -> None:
        with open(path, "wb") as file:
            file.write(begin)
            file.truncate((1 << 30) + 2048)

    return make


# ---- refused

REFUSED: dict[str, tuple[Content, str]] = {
    "nothing": (b"", "is empty"),
    "only the end": (END * 10, "no image in"),
    "no image": (packed({"a.txt": b"words", "b.cls": b"1"}), "no image in"),
    "web page": (b"<!DOCTYPE html><html><body>Sign in to download" + b" " * 1000, "is a web page"),
    "short text": (b"hello", "is no tar archive"),
    "noise": (bytes(range(256)) * 40, "is no tar archive"),
    "gzipped": (gzip.compress(GOOD), "is compressed.*decompress it with gzip -d"),
    "gzipped and tiny": (gzip.compress(b"")[:30], "is compressed"),
    "bzipped": (bz2.compress(GOOD), "is compressed"),
    "xzipped": (lzma.compress(GOOD), "is compressed"),
    "zipped": (zipped(), "is no tar archive"),
    "cut within an image": (
        packed({"a.png": png(), "b.png": bytes(5000)})[: 1024 + 512 + 3000],
        "is cut short within 'b.png'",
    ),
    "cut within a header": (
        packed({"a.png": png(), "b.png": png()})[: 1024 + 300],
        "is cut short without the mark of its end",
    ),
    "cut between two images": (GOOD_MEMBER, "is cut short without the mark of its end"),
    "second header damaged": (GOOD_MEMBER + wrong_checksum(header(b"b.png", 0)) + END, "wrong checksum"),
    "first header damaged": (wrong_checksum(header(b"b.png", 0)) + END, "is no tar archive"),
    "image of eight exabytes": (
        GOOD_MEMBER + header(b"b.png", b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7) + END,
        "cut short within 'b.png'",
    ),
    "common header beyond any file": (
        GOOD_MEMBER + header(b"pax_global_header", b"\x80" + b"\xff" * 11, b"g") + END,
        "is cut short without the mark of its end",
    ),
    "link's name beyond any file": (
        GOOD_MEMBER + header(b"././@LongLink", b"\x80" + b"\x7f" * 11, b"K") + END,
        "is cut short without the mark of its end",
    ),
    "negative size": (GOOD_MEMBER + header(b"b.png", b"\xff" * 12) + END, "a size that is no number"),
    "size in words": (GOOD_MEMBER + header(b"b.png", b"-0000000512") + END, "a size that is no number"),
    "pax header of a gigabyte": (
        of_a_gigabyte(header(b"x", 1 << 30, b"x")),
        "an extended header of 1,073,741,824 bytes",
    ),
    "long name of a gigabyte": (
        of_a_gigabyte(header(b"././@LongLink", 1 << 30, b"L")),
        "an extended header of 1,073,741,824 bytes",
    ),
    "pax path beyond any": (pax(record("path", "d/" * 2498 + ".png")) + GOOD, "a name of 5,000 bytes"),
    "pax record of no length": (pax(b"0 path=b.png\n") + GOOD, "extended header that cannot be read"),
    "pax record longer than its header": (pax(b"999 path=b.png\n") + GOOD, "extended header that cannot be read"),
    "pax record without an equals sign": (pax(b"9 pathpat\n") + GOOD, "extended header that cannot be read"),
    "pax size of a million digits": (
        pax(record("size", "9" * 1_000_000)) + GOOD,
        "extended header that cannot be read",
    ),
    "pax header beyond the end": (GOOD_MEMBER + header(b"x", 5000, b"x"), "cut short"),
    "global header beyond the end": (GOOD_MEMBER + header(b"x", 1 << 32, b"g") + END, "cut short"),
    "sparse map without end": (GOOD_MEMBER + sparse(0) + (bytes(504) + b"\x01" + bytes(7)) * 4, "cut short"),
    "class in two lines": (packed({"a.png": png(), "a.cls": b"cat\ndog"}), r"holds b'cat\\ndog'"),
    "class in bytes": (packed({"a.png": png(), "a.cls": b"\x00cat"}), r"holds b'\\x00cat'"),
    "class between numbers": (packed({"a.png": png(), "a.cls": b"-7.5"}), "holds b'-7.5'"),
    "class in a novel": (
        packed({"a.png": png(), "a.cls": b"cat " * 60}),
        "a class's name, one line of at most 200 bytes",
    ),
    "class number beyond any": (packed({"a.png": png(), "a.cls": b"9" * 60}), "holds b'99999999999"),
    "class number that would need a million names": (packed({"a.png": png(), "a.cls": b"1000000"}), "holds b'1000000'"),
    "labels of two kinds": (
        packed({"a.png": png(), "a.json": b'{"label": 1}', "b.png": png(), "b.json": b'{"label": "x"}'}),
        "of some images are numbers, of others names",
    ),
}
"""Archives that cannot be used, and what the sentence must match."""


# ---- passed over


def image_of_two_gigabytes(path: Path) -> None:
    with open(path, "wb") as file:  # sparse on the disk
        file.write(header(b"b.png", 2 << 30))
        file.seek((2 << 30) + 512)
        file.write(GOOD)


def odd_but_harmless() -> bytes:
    """A global header, a long link name, folders, a hidden file, nested JSON, an old header without a magic."""
    comment = record("comment", "from git archive")
    link = header(b"././@LongLink", 600, b"K") + bytes(1024)
    folders = header(b"d/", 0, b"5") + header(b"old/", 0, b"\0", magic=b"")
    hidden = header(b".b.png", 0) + header(b"d/._c.png", 0)
    nested = padded(header(b"a.json", 100_000) + b"[" * 100_000)
    return header(b"g", len(comment), b"g") + padded(comment) + link + folders + hidden + nested + GOOD


LEAD_OUT = b"".join(header(name, 0) for name in (b"/etc/b.png", b"../b.png", b"x/../../b.png", b"./../b.png"))
SPARSE_RECORDS = record("GNU.sparse.major", "1") + record("GNU.sparse.name", "b.png")
PASSED_OVER: dict[str, tuple[Content, str]] = {
    "links": (header(b"b.png", 0, b"2", b"/etc/passwd") + header(b"c.png", 700, b"1", b"a.png") + GOOD, "2 links"),
    "devices": (
        header(b"b.png", 0, b"3") + header(b"c.png", 0, b"4") + header(b"d.png", 0, b"6") + GOOD,
        "2 devices, 1 pipes",
    ),
    "sparse of GNU": (sparse(512) + bytes(1024) + GOOD, "1 sparse files"),
    "sparse of pax": (pax(SPARSE_RECORDS) + header(b"b.png", 512) + bytes(512) + GOOD, "1 sparse files"),
    "names that lead out": (
        LEAD_OUT + pax(record("path", "b\0.png")) + header(b"b.png", 0) + GOOD,
        "5 names that lead out",
    ),
    "unknown kind": (header(b"b.png", 600, b"Q") + bytes(1024) + GOOD, "1 members of an unknown kind"),
    "image of two gigabytes": (image_of_two_gigabytes, "1 images of more than 1 GiB"),
    "odd but harmless": (odd_but_harmless(), ""),
}
"""Archives with one good image, a.png, and what is said of the rest."""
