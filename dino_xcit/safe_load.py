"""The one place where files that others wrote are opened: checkpoints, and ground truths that come as pickles.

Nothing in a file is executed, and what reading it costs is bounded by its length. A checkpoint is looked at three
times: its container (no compression, no two entries in one place), then its pickle, replayed without making anything
(names, shapes, and the length of every storage against the bytes that are there), and, once PyTorch has read it with
``weights_only=True``, the content itself.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import stat
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from dino_xcit.errors import InputError
from dino_xcit.pickle_names import ALLOWED, GROUND_TRUTH_NAMES, NAMES, Storages, check_shape
from dino_xcit.pickle_replay import RefusedError, Replay

PICKLE_LIMIT = 16 * 2**20
"""Bytes of a checkpoint's pickle, which holds names and shapes; some 200 a tensor."""
GROUND_TRUTH_LIMIT = 64 * 2**20
ENTRY_LIMIT = 50_000
"""Entries of a checkpoint's archive, one a tensor."""
DEPTH_LIMIT = 100
GIT_LFS_NOTE = b"version https://git-lfs"
"""How the notes begin (git-lfs, docs/spec.md) that a clone without git-lfs has in place of files."""

UNREADABLE = (
    OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError,
    AssertionError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile, tarfile.TarError, RefusedError,
)  # fmt: skip
"""What reading raises for files that are damaged, foreign or unsafe."""


def why_unreadable(error: Exception) -> str:
    """A clause for one of :data:`UNREADABLE`. PyTorch's own text for unsafe files says how to run them all the same."""
    if isinstance(error, RefusedError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    unsafe = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and unsafe:
        return f"it holds {unsafe[1]}, and reading that could run a program"
    return "it is damaged, cut short, or of another kind"


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's content, on the CPU.

    Raises:
        InputError: no such file, a folder, or a file that is damaged, unsafe or no checkpoint.
    """
    with _refusing(path, "checkpoint"), _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        _check_container(file, size)
        file.seek(0)
        with torch.serialization.safe_globals(ALLOWED):
            content = torch.load(file, map_location="cpu", weights_only=True)
        check_content(content, room=4 * size + 2**24)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, expected a checkpoint (a dictionary of tensors)")
    return content


def read_ground_truth(path: Path) -> object:
    """A pickle of dictionaries, lists, text, numbers and arrays of numbers, as retrieval ground truths are published.

    Protocols 0 to 4 are read, Python 2's files too (their text as Latin 1). Arrays come back read-only.

    Raises:
        InputError: no such file, a folder, or a file that is damaged, or holds anything else.
    """
    with _refusing(path, "ground truth"), _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > GROUND_TRUTH_LIMIT:
            raise RefusedError(f"it is longer than {GROUND_TRUTH_LIMIT >> 20} MiB")
        content = Replay(file.read(size), GROUND_TRUTH_NAMES, protocols=4, text="latin1").run()
        check_content(content, room=4 * size + 2**24)
    return content


@contextmanager
def _refusing(path: Path, what: str) -> Iterator[None]:
    """Turn whatever reading a file raises into one sentence."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"there is no {what} at {path}") from None
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        raise InputError(f"{path} is no {what} that can be read safely: {why_unreadable(error)}") from error


def _opened(path: Path) -> BinaryIO:
    # A pipe or a device is refused before it is opened: opening the one waits, and reading the other has no end.
    if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
        raise RefusedError("it is a pipe or a device")
    return open(path, "rb")


# ---- before PyTorch reads a checkpoint: its container


def _check_container(file: BinaryIO, size: int) -> None:
    start = file.read(512)
    if start[:4] == b"PK\x03\x04":
        _check_archive(file, size)
    elif start.startswith(_LEGACY_START):
        _check_legacy(file, size)
    elif start.startswith(GIT_LFS_NOTE):
        raise RefusedError("it is git-lfs's note of where the file is; fetch the file itself with git lfs pull")
    elif _is_tar(start):
        raise RefusedError("it is a tar archive, which only PyTorch before 0.4 wrote")
    else:
        raise RefusedError("it is damaged, cut short, or of another kind")


def _is_tar(start: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


_SMALL_ENTRY = 2**16
_ENTRY = re.compile(r"data\.pkl|data/[0-9]{1,9}|version|byteorder|\.data/serialization_id|\.[a-z_]+")


def _check_archive(file: BinaryIO, size: int) -> None:
    """The zip archives of PyTorch 1.6 and later: every byte that is claimed is there, and is claimed once."""
    directory = _directory_start(file, size)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(re.search(r"/(constants\.pkl|code/)", entry.filename) for entry in entries):
            raise RefusedError("it is a TorchScript archive, which holds a program")
        lengths = {_plain_entry(entry, entries[0]): entry.file_size for entry in entries}
        if len(lengths) < len(entries):
            raise RefusedError("two entries of its archive have one name")
        ordered = sorted(entries, key=lambda entry: entry.header_offset)
        for entry, following in zip(ordered, [info.header_offset for info in ordered[1:]] + [directory], strict=True):
            # 30 bytes come before the name; what else may come before and after the data only makes it longer.
            if entry.header_offset + 30 + len(entry.filename.encode()) + entry.file_size > following:
                raise RefusedError("entries of its archive overlap, or claim more bytes than the file has")
        for name, length in lengths.items():
            if length > (PICKLE_LIMIT if name == "data.pkl" else _SMALL_ENTRY) and not name.startswith("data/"):
                raise RefusedError(f"{name} in its archive is {length} bytes long")
        data = archive.read(archive.getinfo(f"{entries[0].filename.partition('/')[0]}/data.pkl"))
    Replay(data, NAMES, persistent=Storages({key[5:]: n for key, n in lengths.items() if key[:5] == "data/"})).run()


def _directory_start(file: BinaryIO, size: int) -> int:
    """Where the archive's directory starts. It is at the end, in the one place where every reader looks for it."""
    file.seek(max(0, size - 98))
    tail = file.read(98)
    numbers = struct.unpack("<4s4H2IH", tail[-22:])
    entries, length, start = numbers[4:7]
    end = size - 22
    if numbers[0] != b"PK\x05\x06" or numbers[1:3] != (0, 0) or numbers[3] != entries or numbers[7]:
        raise RefusedError("it is damaged, cut short, or of another kind")
    if tail[-42:-38] == b"PK\x06\x07":  # the directory of a long archive has a second entry, with wider numbers
        end = size - 98
        wide = struct.unpack("<4sQ2H2I4Q4sIQI", tail[:-22])
        if (wide[0], wide[1], wide[4:6], wide[10:]) != (b"PK\x06\x06", 44, (0, 0), (b"PK\x06\x07", 0, end, 1)):
            raise RefusedError("it is damaged, cut short, or of another kind")
        narrow = ((entries, wide[7], 0xFFFF), (length, wide[8], 0xFFFFFFFF), (start, wide[9], 0xFFFFFFFF))
        if wide[6] != wide[7] or any(short not in (long, unknown) for short, long, unknown in narrow):
            raise RefusedError("its archive has two directories that differ")
        entries, length, start = wide[7:10]
    if start + length != end:
        raise RefusedError("it is damaged, cut short, or of another kind")
    if entries > ENTRY_LIMIT or length > PICKLE_LIMIT:
        raise RefusedError(f"its archive has {entries} entries")
    return int(start)


def _plain_entry(entry: zipfile.ZipInfo, first: zipfile.ZipInfo) -> str:
    """The entry's name below the archive's one folder, if it is one that ``torch.save`` writes, and not compressed."""
    folder, _, name = entry.filename.partition("/")
    shown = "".join(letter if letter.isprintable() else "?" for letter in entry.filename[:80])
    known = _ENTRY.fullmatch(name) and folder == first.filename.partition("/")[0]
    if not known or entry.filename != entry.orig_filename:
        raise RefusedError(f"its archive holds {shown}, which no checkpoint has")
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 0x61:
        raise RefusedError(
            f"{shown} in its archive is compressed (to {entry.compress_size} of {entry.file_size} bytes)"
        )
    extra = entry.extra  # nothing, or one field with numbers of 64 bits: of two fields, readers choose differently
    if extra and (extra[:2] != b"\x01\x00" or struct.unpack("<H", extra[2:4])[0] != len(extra) - 4):
        raise RefusedError(f"{shown} in its archive has fields that torch.save does not write")
    return name


_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
"""The two pickled numbers, mark and version, that the format before PyTorch 1.6 starts with."""


def _check_legacy(file: BinaryIO, size: int) -> None:
    """The format before PyTorch 1.6: pickles, and then each storage, with its length before it."""
    file.seek(0)
    data = file.read(PICKLE_LIMIT)
    if _is_tar(data[:512]):  # both at once: PyTorch would try the tar archive first
        raise RefusedError("it is a tar archive, which only PyTorch before 0.4 wrote")
    about = Replay(data, {}, start=len(_LEGACY_START))
    about.run()
    storages = Storages(None)
    content = Replay(data, NAMES, start=about.position, persistent=storages)
    content.run()
    order = Replay(data, {}, start=content.position)
    keys = order.run()
    # What is claimed and not listed would stay memory that nothing was written to.
    if type(keys) is not list or any(type(key) is not str for key in keys) or sorted(keys) != sorted(storages.claimed):
        raise RefusedError("its list of storages does not fit its tensors")
    place = order.position
    for key in keys:
        kind, count = storages.claimed[key]
        file.seek(place)
        place += 8 + kind * count
        if place > size or struct.unpack("<q", file.read(8))[0] != count:
            raise RefusedError("its tensors claim more bytes than the file has")


# ---- after it is read


def check_content(content: object, room: int) -> None:
    """Refuse what is not plain, and what would take more than ``room`` bytes were every reference to it a copy.

    Raises:
        RefusedError: a value of another kind, one that holds itself, one nested too deep, or one too large.
    """
    sizes: dict[int, int] = {}  # of what is done; its values stay alive as long as the content does
    path: list[tuple[int, Iterator[object]]] = []
    totals: list[int] = [0]
    on_path: set[int] = set()
    pending: Iterator[object] = iter((content,))
    while True:
        value = next(pending, _END)
        if value is _END:
            if not path:
                return
            done, pending = path.pop()
            on_path.discard(done)
            sizes[done] = totals.pop()
            totals[-1] += sizes[done]
        elif (inner := _inside(value)) is None:
            totals[-1] += _leaf_size(value)
        elif id(value) in on_path:
            raise RefusedError("it holds a value that holds itself")
        elif id(value) in sizes:
            totals[-1] += sizes[id(value)]
        else:
            if len(path) >= DEPTH_LIMIT:
                raise RefusedError(f"it is nested more than {DEPTH_LIMIT} deep")
            path.append((id(value), pending))
            on_path.add(id(value))
            totals.append(1)
            pending = inner
        if totals[-1] > room:
            raise RefusedError("it would unfold to far more than the file: a value in it is repeated over and over")


_END = object()


def _inside(value: object) -> Iterator[object] | None:
    """What a container holds, or None for anything else. Attributes count as well."""
    if type(value) is dict:
        return _of_both(value)
    if type(value) is OrderedDict:
        return _of_both(value | vars(value)) if vars(value) else _of_both(value)
    if type(value) in (list, tuple, set):
        return iter(value)  # type: ignore[call-overload]
    if type(value) is argparse.Namespace:
        return _of_both(vars(value))
    return None


def _of_both(items: dict[Any, Any]) -> Iterator[object]:
    for key, value in items.items():
        yield key
        yield value


_PLAIN = (int, float, bool, type(None), torch.Size, torch.dtype, torch.device)


def _leaf_size(value: object) -> int:
    if isinstance(value, str | bytes):
        return 1 + len(value)
    if type(value) in (Tensor, torch.nn.Parameter):
        return _tensor_size(value)
    if type(value) is np.ndarray and value.dtype.kind in "biufc":
        return 1 + value.nbytes
    if type(value) in _PLAIN or (isinstance(value, np.generic) and value.dtype.kind in "biufc"):
        return 1
    kind = type(value).__name__
    raise RefusedError(f"it holds a {kind} as a value, and only tensors, numbers, text and their containers are read")


def _tensor_size(tensor: Any) -> int:
    """Bytes of a tensor, if it is one that the replay let through."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise RefusedError("it holds a tensor that is sparse, quantized, or without data")
    if vars(tensor) or tensor._backward_hooks:
        raise RefusedError("it holds a tensor with attributes")
    held = tensor.untyped_storage().nbytes() // tensor.element_size()
    check_shape(held, tensor.storage_offset(), tensor.shape, tensor.stride())
    return 1 + int(tensor.nbytes)
