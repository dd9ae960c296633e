"""Parts of hostile files: pickles and zip archives built byte by byte that ``torch.save`` would never write."""

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
"""Writes a file to the first path. Its program, if executed, creates the second path, the canary."""


class Runs:
    """Runs a program when unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.system, (f"touch '{self.canary}'",)


# ---- pickles of protocol 2


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


# ---- zip archives


@dataclass
class Entry:
    name: str
    data: bytes = b""
    claims: int | None = None
    """Unpacked size in the archive's headers; None: the size of ``data``."""
    deflated: bool = False
    at: int | None = None
    """Offset of the entry in the archive's directory; None: the true offset."""


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
    """Write a checkpoint in the zip format: pickle, version, and ``entries``, by default a storage of four numbers."""
    honest = [Entry("data.pkl", pickled(body)), Entry("version", b"3\n")]
    path.write_bytes(zipped(*honest, *(entries or [Entry("data/0", bytes(16))])))


def zeros_deflated(count: int) -> bytes:
    """Return a deflate stream of ``count`` times ten million zero bytes."""
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
"""Replaces the top X of the stack by (X, [X, X]) forty times: exponential size when expanded (billion laughs)."""
