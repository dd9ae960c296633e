"""Safe loading of files from other projects: checkpoints, and pickled ground truths of retrieval benchmarks.

All such files are opened here, and nothing in them is executed. The container of a checkpoint is checked first, as
PyTorch's reader and Python's may see different entries in a crafted archive. PyTorch then reads it with
``weights_only=True``, and the content is checked last.
"""

from __future__ import annotations

import argparse
import pickle
import re
import stat
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from dino_xcit.errors import InputError, one_line

HEADER_LIMIT = 16 * 2**20
"""Maximum bytes of a checkpoint's pickle, with names and shapes: about 200 bytes per tensor."""
GROUND_TRUTH_LIMIT = 64 * 2**20
"""Maximum bytes of a ground truth."""
ENTRY_LIMIT = 50_000
"""Maximum entries of a checkpoint's archive, one per tensor."""
DEPTH_LIMIT = 100
"""Maximum nesting of the content."""
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
"""Pickled magic number and version at the start of files from before PyTorch 1.6."""
_ENTRY = re.compile(r"data\.pkl|data/[0-9]{1,9}|version|byteorder|\.data/serialization_id|\.[a-z_]+")


class RefusedError(Exception):
    """The reason why a file is unsafe or unreadable, as a clause."""


UNREADABLE = (
    OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError,
    AssertionError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile, tarfile.TarError, SafetensorError,
    RefusedError,
)  # fmt: skip
"""Exceptions raised while reading files that are damaged, foreign or unsafe."""


def why_unreadable(error: Exception) -> str:
    """Return a clause for one of :data:`UNREADABLE`. PyTorch's message is not used: it recommends unsafe loading."""
    if isinstance(error, (RefusedError, SafetensorError)):
        return one_line(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    unsafe = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and unsafe:
        shown = "".join(letter if letter.isprintable() else "?" for letter in unsafe[1][:80])
        return f"it contains {shown}, which could execute code"
    return "it is damaged, truncated, or of another kind"


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint on the CPU: containers, tensors, numbers, text, and ``argparse.Namespace``.

    Raises:
        InputError: The file is missing, damaged, unsafe or not a checkpoint.
    """
    with refusing(path, "checkpoint"), opened(path) as file:
        size = path.stat().st_size
        _check_container(file, size)
        file.seek(0)
        with torch.serialization.safe_globals(_ALLOWED):
            try:
                content = torch.load(file, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:
                file.seek(0)
                if b"lightly_train" not in file.read(HEADER_LIMIT):
                    raise
                raise RefusedError(
                    "it is a checkpoint of lightly-train with pickled networks; give exported_models/exported_last.pt "
                    "of the same run"
                ) from None
        check_content(content, room=4 * size + 2**24, stored=size)
    if not isinstance(content, dict):
        raise InputError(f"{path} contains a {type(content).__name__}, expected a checkpoint (a dictionary of tensors)")
    return content


def read_ground_truth(path: Path) -> object:
    """Read a pickled ground truth: dictionaries, lists, text, numbers and arrays of numbers. Python 2's are Latin 1.

    Raises:
        InputError: The file is missing, damaged, or contains anything else.
    """
    with refusing(path, "ground truth"), opened(path) as file:
        size = path.stat().st_size
        if size > GROUND_TRUTH_LIMIT:
            raise RefusedError(f"it is larger than {GROUND_TRUTH_LIMIT >> 20} MiB")
        content = _GroundTruth(file, encoding="latin1").load()
        check_content(content, room=4 * size + 2**24)
    return content


@contextmanager
def refusing(path: Path, what: str) -> Iterator[None]:
    """Turn :data:`UNREADABLE` exceptions into an InputError with the reason."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"there is no {what} at {path}") from None
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        raise InputError(
            f"{path} is not a {what} that can be read safely: {why_unreadable(error)}; give another file"
        ) from error


def opened(path: Path) -> BinaryIO:
    """Open a file for reading.

    Raises:
        RefusedError: The path is a pipe, whose opening would block, or a device, which has no end.
    """
    if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
        raise RefusedError("it is a pipe or a device")
    return open(path, "rb")


# ---- containers


def _check_container(file: BinaryIO, size: int) -> None:
    start = file.read(512)
    refuse_git_lfs(start)
    if start[:4] == b"PK\x03\x04":
        _check_archive(file, size)
    elif _is_tar(start):  # PyTorch tries this before the format of 0.4 to 1.5
        raise RefusedError("it is a tar archive, the format before PyTorch 0.4")
    elif not start.startswith(_LEGACY_START):
        raise RefusedError("it is damaged, truncated, or of another kind")


def refuse_git_lfs(start: bytes) -> None:
    """Raise RefusedError for a git-lfs pointer, which a clone without git-lfs has in place of the file."""
    if start.startswith(b"version https://git-lfs"):  # git-lfs, docs/spec.md
        raise RefusedError("it is a git-lfs pointer; download the file with git lfs pull")


def _is_tar(start: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def _check_archive(file: BinaryIO, size: int) -> None:
    """Check a zip archive of PyTorch 1.6 and later: known names, uncompressed, no overlapping entries."""
    end_record = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if end_record is None or end_record[4] > ENTRY_LIMIT or end_record[5] > HEADER_LIMIT:
        raise RefusedError("its archive is truncated, or has too many entries")
    with zipfile.ZipFile(file) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        end, comment = archive.start_dir, archive.comment
    names = [entry.filename.partition("/")[2] for entry in entries]
    if any(re.match(r"constants\.pkl|code/", name) for name in names):
        raise RefusedError("it is a TorchScript archive, which contains code")
    if len(set(names)) < len(names) or "data.pkl" not in names or comment:
        raise RefusedError("its archive repeats a name, or lacks data.pkl")
    folder = entries[0].filename.partition("/")[0]
    for entry, name, following in zip(entries, names, [e.header_offset for e in entries[1:]] + [end], strict=True):
        if entry.filename != entry.orig_filename or entry.filename != f"{folder}/{name}" or not _ENTRY.fullmatch(name):
            shown = "".join(letter if letter.isprintable() else "?" for letter in entry.filename[:80])
            raise RefusedError(f"its archive contains {shown}, which no checkpoint has")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise RefusedError(f"{name} in its archive is compressed")
        if entry.header_offset + 30 + len(entry.filename) + entry.file_size > following:
            raise RefusedError("entries of its archive overlap, or claim more bytes than the file has")
        if name == "data.pkl" and entry.file_size > HEADER_LIMIT:
            raise RefusedError(f"data.pkl in its archive is {entry.file_size} bytes long")


# ---- names that files may refer to


class _Dtype:
    """Replacement of ``numpy.dtype`` in checkpoints, for numbers only."""

    def __init__(self, code: str, *_: object) -> None:
        if not re.fullmatch(r"b1|[iu][1248]|f[248]|f16|c8|c16", code):
            raise RefusedError("it contains a NumPy type that is not a number")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


def _scalar(dtype: _Dtype, data: bytes | str) -> object:
    """Replacement of ``numpy.core.multiarray.scalar``, used for learning rates in DINO's optimizers."""
    return np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, dtype.dtype)[0]


_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_ALLOWED: list[Any] = [argparse.Namespace, (_Dtype, "numpy.dtype"), *((_scalar, f"{name}.scalar") for name in _NUMPY)]


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise RefusedError("it contains text in an unsupported encoding")
    return text.encode("latin1")


_FROM_NUMPY: dict[str, Callable[..., Any]] = {
    "_reconstruct": lambda *_: np.ndarray(0, np.int8),  # filled in by the array's state
    "scalar": lambda dtype, data: np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, dtype)[0],
}


class _GroundTruth(pickle.Unpickler):
    """Python's unpickler with an allow-list of names."""

    def find_class(self, module: str, name: str) -> Any:
        allowed: dict[str, Any] = {
            "collections.OrderedDict": OrderedDict, "_codecs.encode": _encode, "numpy.dtype": np.dtype,
            "numpy.ndarray": np.ndarray,
            **{f"{path}.{key}": make for path in _NUMPY for key, make in _FROM_NUMPY.items()},
            **{f"{path}.set": set for path in ("builtins", "__builtin__")},
            **{f"{path}.bytes": lambda: b"" for path in ("builtins", "__builtin__")},
        }  # fmt: skip
        if f"{module}.{name}" not in allowed:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return allowed[f"{module}.{name}"]


# ---- content

_PLAIN = (int, float, complex, bool, type(None), torch.Size, torch.dtype, torch.device)


def check_content(content: object, room: int, stored: int = 0) -> None:
    """Check that content has only plain values of limited size.

    Args:
        content: Content of a file.
        room: Maximum bytes, with each reference counted as a copy.
        stored: Maximum bytes of all tensor storages; 0: no maximum. A storage that is larger than the file would expose
            uninitialized memory.

    Raises:
        RefusedError: A value is of another kind, nested too deeply or in itself, or too large.
    """
    sizes: dict[int, int] = {}
    if _size(content, sizes, 0, room) > room:
        raise RefusedError("it expands to far more bytes than the file, as values in it are repeated many times")
    if stored and sum(size for place, size in sizes.items() if place < 0) > stored:
        raise RefusedError("its tensors claim more bytes than the file has")


def _size(value: object, sizes: dict[int, int], depth: int, room: int) -> int:
    """Return the bytes of a value. ``sizes`` caches containers by id, and storages by negative address."""
    if depth > DEPTH_LIMIT:
        raise RefusedError(f"it is nested more than {DEPTH_LIMIT} deep, or contains itself")
    if id(value) in sizes:
        return sizes[id(value)]
    if type(value) is argparse.Namespace or (type(value) is OrderedDict and vars(value)):
        inner: Any = (*vars(value).items(), *(value.items() if type(value) is OrderedDict else ()))  # type: ignore[union-attr]
    elif type(value) in (dict, OrderedDict):
        inner = value.items()  # type: ignore[attr-defined]
    elif type(value) in (list, tuple, set):
        inner = value
    else:
        if isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu":
            storage = value.untyped_storage()
            sizes[-storage.data_ptr()] = storage.nbytes()
        return _leaf_size(value)
    total = 1
    for one in inner:
        total += _size(one, sizes, depth + 1, room)
        if total > room:
            break
    sizes[id(value)] = total
    return total


def _leaf_size(value: Any) -> int:
    if isinstance(value, str | bytes):
        return 1 + len(value)
    if type(value) in (Tensor, torch.nn.Parameter):
        if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized or vars(value):
            raise RefusedError("it contains a tensor that is sparse, quantized, without data, or has attributes")
        if value.numel() > value.untyped_storage().nbytes() // value.element_size():
            raise RefusedError(f"a tensor claims {value.numel()} elements, but its storage has fewer")
        return 1 + int(value.nbytes)
    if type(value) is np.ndarray and value.dtype.kind in "biufc":
        return 1 + value.nbytes
    if type(value) in _PLAIN or (isinstance(value, np.generic) and value.dtype.kind in "biufc"):
        return 1
    raise RefusedError(
        f"it contains a {type(value).__name__}, expected only tensors, numbers, text and their containers"
    )
