"""What hostile files are put together from: pickles and zip archives byte by byte, as ``torch.save`` writes none."""

from __future__ import annotations

import os
import pickle
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Maker = Callable[[Path, Path], None]
"""Writes a file; the second path is the canary, which exists once the file's program has run."""


class Runs:
    """Runs a program where it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.system, (f"touch '{self.canary}'",)


# ---- pickles of protocol 2, put together


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def called(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def dictionary(**values: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in values.items()) + b"u"


def shape(*lengths: int) -> bytes:
    return b"(" + b"".join(map(number, lengths)) + b"t"


def storage(count: int, key: str = "0", legacy: bool = False) -> bytes:
    kind = named("torch", "FloatStorage")
    return b"(" + text("storage") + kind + text(key) + text("cpu") + number(count) + (b"N" if legacy else b"") + b"tQ"


def tensor(stored: bytes, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    rebuild, hooks = named("torch._utils", "_rebuild_tensor_v2"), called(named("collections", "OrderedDict"))
    return called(rebuild, stored, number(0), shape(*size), shape(*stride), b"\x89", hooks)


# ---- zip archives, put together


@dataclass
class Entry:
    name: str
    data: bytes = b""
    claims: int | None = None
    """How long the archive says that it is when unpacked; as long as ``data`` if None."""
    deflated: bool = False
    at: int | None = None
    """Where the archive says that it starts; where it does, if None."""


def zipped(*entries: Entry, prefix: str = "archive/") -> bytes:
    out, directory = bytearray(), bytearray()
    for entry in entries:
        name = (prefix + entry.name).encode()
        claims = len(entry.data) if entry.claims is None else entry.claims
        packed = len(entry.data) if entry.deflated else claims
        method = 8 if entry.deflated else 0
        fields = struct.pack("<HHHHHI", 45, 0, method, 0, 0, zlib.crc32(entry.data))
        extra, short = b"", (packed, claims)
        if claims >= 2**32 - 1:
            extra = struct.pack("<HHQQ", 1, 16, claims, packed)
            short = (2**32 - 1, 2**32 - 1)
        at = len(out) if entry.at is None else entry.at
        lengths = struct.pack("<IIHH", *short, len(name), len(extra))
        out += b"PK\x03\x04" + fields + lengths + name + extra + entry.data
        directory += b"PK\x01\x02" + struct.pack("<H", 45) + fields + lengths + struct.pack("<HHHII", 0, 0, 0, 0, at)
        directory += name + extra
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, len(entries), len(entries), len(directory), len(out), 0)
    return bytes(out + directory + end)


def archive(path: Path, body: bytes, *entries: Entry) -> None:
    """A checkpoint of today's format: the pickle, a storage of four numbers, and whatever comes besides."""
    honest = [Entry("data.pkl", pickled(body)), Entry("version", b"3\n")]
    path.write_bytes(zipped(*honest, *(entries or [Entry("data/0", bytes(16))])))


def zeros_deflated(count: int) -> bytes:
    """What unpacks to ``count`` times ten million zeros."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(10_000_000)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * count + packer.flush()


TAIL = (Entry("data/0", bytes(16)), Entry("version", b"3\n"))
HONEST = dictionary(weight=tensor(storage(4), (4,), (1,)))


def old_format(path: Path, body: bytes, keys: bytes, after: bytes) -> None:
    torch.save(0, path, _use_new_zipfile_serialization=False)
    start = path.read_bytes().partition(b"u.")[0] + b"u."
    path.write_bytes(start + pickled(body) + pickled(keys) + after)


LAUGHS = b"q\x00]h\x00ah\x00a\x86" * 40
"""What is on the stack becomes a pair of itself and of a list of it twice, and that forty times."""
