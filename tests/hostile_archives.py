"""Tar archives that are truncated, damaged, not archives at all, or whose names lead out of the target folder."""

from __future__ import annotations

import gzip
import io
import tarfile

from PIL import Image


def png(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (3, 2), shade).save(buffer, "PNG")
    return buffer.getvalue()


def packed(contents: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    """Return an archive written by tarfile."""
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
"""Header and content of a.png, one block each."""


def header(name: bytes, size: int | bytes, kind: bytes = b"0", linkname: bytes = b"") -> bytes:
    """Return a header of 512 bytes with a valid checksum; the other fields may be invalid."""
    field = b"%011o\0" % size if isinstance(size, int) else size.ljust(12, b"\0")
    block = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + field + b"00000000000\0" + b" " * 8
    block = (block + kind + linkname.ljust(100, b"\0") + b"ustar\x0000").ljust(512, b"\0")
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


REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "is empty"),
    "only the end": (END * 10, "no image in"),
    "no image": (packed({"a.txt": b"words", "b.json": b"1"}), "no image in"),
    "web page": (b"<!DOCTYPE html><html><body>Sign in to download" + b" " * 1000, "is a web page"),
    "short text": (b"hello", "is not a tar archive"),
    "noise": (bytes(range(256)) * 40, "is not a tar archive"),
    "gzipped": (gzip.compress(GOOD), "is compressed: decompress it with gzip -d"),
    "cut within an image": (packed({"a.png": png(), "b.png": bytes(5000)})[: 1024 + 512 + 3000], "within 'b.png'"),
    "cut within a header": (packed({"a.png": png(), "b.png": png()})[: 1024 + 300], "is truncated"),
    "cut between two images": (GOOD_MEMBER, "is truncated"),
    "second header damaged": (GOOD_MEMBER + wrong_checksum(header(b"b.png", 0)) + GOOD, "is damaged"),
    "first header damaged": (wrong_checksum(header(b"b.png", 0)) + GOOD, "is not a tar archive"),
    "image of eight exabytes": (
        GOOD_MEMBER + header(b"b.png", b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7) + END,
        "within 'b.png'",
    ),
    "negative size": (GOOD_MEMBER + header(b"b.png", b"\xff" * 12) + END, "archive|damaged|truncated"),
    "size in words": (GOOD_MEMBER + header(b"b.png", b"-0000000512") + END, "archive|damaged|truncated"),
    "pax record of no length": (pax(b"0 path=b.png\n") + GOOD, "archive|damaged|truncated"),
    "pax header beyond the end": (GOOD_MEMBER + header(b"x", 5000, b"x"), "archive|damaged|truncated"),
    "class in two lines": (packed({"a.png": png(), "a.cls": b"cat\ndog"}), r"contains b'cat\\ndog'"),
    "class between numbers": (packed({"a.png": png(), "a.cls": b"-7.5"}), "contains b'-7.5'"),
    "class in a novel": (packed({"a.png": png(), "a.cls": b"cat " * 60}), "at most 200 bytes"),
    "class number beyond any": (packed({"a.png": png(), "a.cls": b"1000000"}), "contains b'1000000'"),
    "labels of two kinds": (
        packed({"a.png": png(), "a.json": b'{"label": 1}', "b.png": png(), "b.json": b'{"label": "x"}'}),
        "has both numbers and names as labels",
    ),
    "label without an image": (packed({"a.png": png(), "b.cls": b"1"}), r"a label in b\.cls"),
    "label beside a closer one": (packed({"a.v2.png": png(), "a.v2.cls": b"1", "a.cls": b"0"}), r"a label in a\.cls"),
}
"""Unusable archives, each with the pattern of its error message."""

LEAD_OUT = b"".join(header(name, 0) for name in (b"/etc/b.png", b"../b.png", b"x/../../b.png", b"./../b.png"))
SPARSE = record("GNU.sparse.major", "0") + record("GNU.sparse.minor", "1") + record("GNU.sparse.map", "0,512")
SKIPPED: dict[str, tuple[bytes, str]] = {
    "links": (header(b"b.png", 0, b"2", b"/etc/passwd") + header(b"c.png", 0, b"1", b"a.png") + GOOD, "2 links"),
    "devices": (header(b"b.png", 0, b"3") + header(b"d.png", 0, b"6") + GOOD, "2 links, devices"),
    "sparse": (pax(SPARSE) + header(b"b.png", 512) + bytes(512) + GOOD, "1 links, devices or sparse files"),
    "names that lead out": (LEAD_OUT + GOOD, "4 names that lead out"),
    "odd but harmless": (
        header(b"g", 20, b"g") + padded(b"20 comment=from git\n") + header(b"d/", 0, b"5")
        # hidden files, and too deeply nested JSON
        + header(b".b.png", 0) + header(b"d/._c.png", 0) + padded(header(b"a.json", 100_000) + b"[" * 100_000) + GOOD,
        "",
    ),
}  # fmt: skip
"""Archives with one valid image, a.png, each with the warning about the skipped members."""
