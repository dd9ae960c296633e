"""What a tar archive holds and where: its headers are read, and nothing is ever extracted.

The format is POSIX's (pax and ustar, IEEE Std 1003.1, "pax - portable archive interchange") with GNU's long names and
large sizes. Python's own tarfile takes two to four times as long, and reads as much as a header claims to have.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from dino_xcit.data.files import explained, open_file
from dino_xcit.errors import InputError

BLOCK = 512
"""Bytes of a header, and what contents are padded to."""
MOST_MEMBERS = 20_000_000
"""An archive with more is refused."""
LONGEST_NAME = 4096
"""Bytes: no path of Linux is longer."""
MOST_PAX = 1 << 20
"""Bytes of one extended header."""

_END = bytes(BLOCK)
_REGULAR, _WITHOUT_CONTENT = b"0\x007", b"123456"
_KINDS = {b"1": "links", b"2": "links", b"3": "devices", b"4": "devices", b"6": "pipes", b"S": "sparse files"}
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
"""How a file begins, and the program that made it and decompresses it (with ``-d``)."""


class Member(NamedTuple):
    """A regular file in an archive."""

    name: str
    """Its path: relative, without ``..`` and without a leading ``./``; bytes that are no UTF-8 as surrogates."""
    offset: int
    """Where its content begins, in bytes from the beginning of the file."""
    size: int
    """Bytes of its content."""
    check: int
    """CRC-32 of the header's block, the 512 bytes before its content: whether the archive is still the same there."""


def scan(
    path: str, start: int = 0, length: int | None = None, passed_over: Counter[str] | None = None
) -> Iterator[Member]:
    """The regular members of an archive, in its order, repeated names included.

    Args:
        path: a file, local or remote.
        start, length: where in the file the archive lies, in bytes; None: to its end.
        passed_over: counts what is no regular member, or has a name that leads out of the archive.

    Raises:
        InputError: it cannot be read, is no tar archive, is compressed, cut short or damaged, or exceeds a limit.
    """
    with open_file(path) as file:
        try:
            yield from members(file, path, start, length, Counter() if passed_over is None else passed_over)
        except OSError as error:
            raise explained(path, error) from error


def members(file: BinaryIO, path: str, start: int, length: int | None, passed_over: Counter[str]) -> Iterator[Member]:
    """:func:`scan` of an open file. The caller may seek and read in it between two members."""
    whole = file.seek(0, 2)
    end = whole if length is None else start + length
    if end > whole:
        raise InputError(
            f"{path} ends before byte {end:,}, where an archive in it should end: copy or download it again"
        )
    if end <= start:
        raise InputError(f"{path} is empty: expected a tar archive; copy or download it again")
    place, number = start, 0
    long_name, pax_path, pax_size, sparse = b"", b"", -1, False
    while True:
        file.seek(place)
        header = file.read(max(0, min(BLOCK, end - place)))
        if header == _END:
            return
        name, size, kind = _parse(header, path, place, first=place == start)
        number += 1
        if number > MOST_MEMBERS:
            raise InputError(f"{path} holds more than {MOST_MEMBERS:,} members: split it into several archives")
        place += BLOCK
        if kind in b"xXL":
            limit = MOST_PAX if kind != b"L" else LONGEST_NAME + 1
            if size > limit:
                raise _damaged(path, place, f"an extended header of {size:,} bytes, more than {limit:,}")
            if place + size > end:
                raise _cut_short(path, place)
            extra = file.read(size)
            if kind == b"L":
                long_name = extra.rstrip(b"\0")
            else:
                records = _pax_records(extra, path, place)
                pax_path = records.get(b"path", b"")
                if b"size" in records:
                    pax_size = _decimal(records[b"size"], path, place)
                sparse = any(key.startswith(b"GNU.sparse.") for key in records)
            place += _padded(size)
            continue
        if kind in b"gK":  # what is said of all members, and of the next one's link, is of no use here
            if place + size > end:  # also because seeking goes no farther than 2^63
                raise _cut_short(path, place)
            place += _padded(size)
            continue
        name, size = pax_path or long_name or name, size if pax_size < 0 else pax_size
        kind = b"S" if sparse else kind
        long_name, pax_path, pax_size, sparse = b"", b"", -1, False
        if header[156:157] == b"S":
            place = _after_sparse_map(file, header, path, place, end)
        content = 0 if kind in _WITHOUT_CONTENT or (kind == b"\0" and name.endswith(b"/")) else size
        if place + content > end:
            raise _cut_short(path, place, name)
        if len(name) > LONGEST_NAME:
            raise _damaged(path, place, f"a name of {len(name):,} bytes")
        if kind not in _REGULAR:
            if kind != b"5":
                passed_over[_KINDS.get(kind, "members of an unknown kind")] += 1
        elif not name.endswith(b"/"):
            while name.startswith(b"./"):
                name = name[2:].lstrip(b"/")
            if not name or name.startswith(b"/") or b"\0" in name or b".." in name.split(b"/"):
                passed_over["names that lead out of the archive"] += 1
            else:
                yield Member(name.decode("utf-8", "surrogateescape"), place, content, zlib.crc32(header))
        place += _padded(content)


def _parse(header: bytes, path: str, place: int, first: bool) -> tuple[bytes, int, bytes]:
    """Name, size and kind of a member from its header, whose checksum must be right."""
    if len(header) < BLOCK:
        raise _no_archive(header, path) if first else _cut_short(path, place)
    # The checksum's own eight bytes count as blanks.
    if _octal(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise _no_archive(header, path) if first else _damaged(path, place, "a header with a wrong checksum")
    field = header[124:136]
    if field[0] == 0x80:  # GNU's way to write sizes from 8 GiB on
        size = int.from_bytes(field[1:], "big")
    else:
        size = _octal(field)
        if size < 0:
            raise _damaged(path, place, "a size that is no number")
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return name, size, header[156:157]


def _octal(field: bytes) -> int:
    """A number as tar writes it; -1 for what is none."""
    digits = field.partition(b"\0")[0].strip() or b"0"
    if not digits.isdigit():  # int would take signs and underscores too
        return -1
    try:
        return int(digits, 8)
    except ValueError:
        return -1


def _pax_records(data: bytes, path: str, place: int) -> dict[bytes, bytes]:
    """``LENGTH KEY=VALUE\\n`` each, where LENGTH counts the whole record."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        digits = data[at : at + 20].partition(b" ")[0]
        after = at + _decimal(digits, path, place)
        key, equals, value = data[at + len(digits) + 1 : after - 1].partition(b"=")
        if not equals or after > len(data) or data[after - 1 : after] != b"\n":
            raise _damaged(path, place, "an extended header that cannot be read")
        records[key] = value
        at = after
    return records


def _decimal(digits: bytes, path: str, place: int) -> int:
    if not digits.isdigit() or len(digits) > 18:
        raise _damaged(path, place, "an extended header that cannot be read")
    return int(digits)


def _after_sparse_map(file: BinaryIO, header: bytes, path: str, place: int, end: int) -> int:
    """Where the content of GNU's old kind of sparse file begins: behind the rest of its map."""
    more = header[482]
    while more:
        file.seek(place)
        block = file.read(min(BLOCK, end - place))
        if len(block) < BLOCK:
            raise _cut_short(path, place)
        place, more = place + BLOCK, block[504]
    return place


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _no_archive(begin: bytes, path: str) -> InputError:
    program = next((name for mark, name in _COMPRESSED.items() if begin.startswith(mark)), None)
    if program is not None:
        return InputError(
            f"{path} is compressed, so that its images cannot be read in any order: decompress it with {program} -d, "
            "and give the .tar that comes out"
        )
    if begin[:BLOCK].lstrip().lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        return InputError(f"{path} is a web page, not a tar archive: download it again, signed in where that is needed")
    return InputError(
        f"{path} is no tar archive, as it does not begin with a tar header: is it the right file? If so, copy or "
        "download it again"
    )


def _cut_short(path: str, place: int, name: bytes = b"") -> InputError:
    within = f" within {name[:200].decode('utf-8', 'replace')!r}" if name else " without the mark of its end"
    return InputError(f"{path} is cut short{within}, after byte {place:,}: copy or download it again")


def _damaged(path: str, place: int, what: str) -> InputError:
    return InputError(f"{path} is damaged: {what} before byte {place:,}; copy or download it again")
