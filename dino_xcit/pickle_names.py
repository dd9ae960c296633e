"""What a pickle of tensors or arrays may name, and what each name makes here: checked shapes and lengths, no memory.

A checkpoint is replayed with these before PyTorch reads it; ground truths are read with them alone.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np

from dino_xcit.pickle_replay import ENCODE, Name, RefusedError, StandIn, plain_key


class _Storage:
    def __init__(self, itemsize: int, count: int) -> None:
        self.itemsize = itemsize
        self.count = count


class Storages:
    """Makes the storages that a checkpoint's pickle refers to, each with the length that it has in the file."""

    def __init__(self, lengths: dict[str, int] | None) -> None:
        self._lengths = lengths
        self.claimed: dict[str, tuple[int, int]] = {}

    def __call__(self, reference: object) -> _Storage:
        if type(reference) is not tuple or len(reference) != (6 if self._lengths is None else 5):
            raise RefusedError("it refers to something outside of itself")
        tag, kind, key, place, count = reference[:5]
        if (tag, reference[5:] or (None,)) != ("storage", (None,)) or type(place) is not str:
            raise RefusedError("it refers to something outside of itself")
        if not isinstance(kind, Name) or type(kind.value) is not int or not _is_length(count):
            raise RefusedError("it holds a storage of a kind that is not read here")
        if type(key) is not str or not re.fullmatch(r"[0-9]{1,20}", key):
            raise RefusedError("it holds a storage under another name than a number")
        if self._lengths is not None and self._lengths.get(key) != kind.value * count:
            raise RefusedError(f"a storage claims {kind.value * count} bytes, the file has {self._lengths.get(key, 0)}")
        if self.claimed.setdefault(key, (kind.value, count)) != (kind.value, count) and count:
            raise RefusedError("it holds one storage in two lengths")
        return _Storage(kind.value, count)


def _is_length(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62


class _Tensor:
    """Where a tensor will be."""


def _tensor(
    storage: object, offset: object, size: object, stride: object, grad: object, hooks: object, extra: object = None
) -> _Tensor:
    """``torch._utils._rebuild_tensor_v2``, which would lengthen a storage to the shape that the file claims."""
    if not isinstance(storage, _Storage) or type(grad) is not bool or hooks != OrderedDict() or extra is not None:
        raise RefusedError("it holds a tensor of a kind that is not read here")
    if type(size) is not tuple or type(stride) is not tuple or len(size) != len(stride) or len(size) > 64:
        raise RefusedError("it holds a tensor without a shape")
    if not _is_length(offset) or not all(map(_is_length, size + stride)):
        raise RefusedError("it holds a tensor without a shape")
    check_shape(storage.count, offset, size, stride)
    return _Tensor()


def check_shape(room: int, offset: Any, size: Iterable[int], stride: Iterable[int]) -> None:
    """A tensor must lie within its storage, and have no more elements than that."""
    size = tuple(size)
    last = sum((length - 1) * step for length, step in zip(size, stride, strict=True)) + 1
    count = math.prod(size)
    if offset + (last if count else 0) > room or count > room:
        raise RefusedError(f"a tensor claims {_shown(size)} elements, its storage has {room}")


def _shown(size: tuple[int, ...]) -> str:
    return (" x ".join(map(str, size[:4])) or "1") + (" x ..." if len(size) > 4 else "")


def _parameter(tensor: object, grad: object, hooks: object) -> _Tensor:
    if not isinstance(tensor, _Tensor) or type(grad) is not bool or hooks != OrderedDict():
        raise RefusedError("it holds a parameter of a kind that is not read here")
    return tensor


def _size(lengths: object) -> tuple[int, ...]:
    if type(lengths) is not tuple or not all(map(_is_length, lengths)):
        raise RefusedError("it holds a shape that is none")
    return lengths


def _set(items: object = ()) -> set[object]:
    if type(items) not in (list, tuple):
        raise RefusedError("it holds a set that is none")
    return set(map(plain_key, items))  # type: ignore[call-overload]


def _device(kind: object, index: object = 0) -> str:
    if type(kind) is not str or type(index) is not int:
        raise RefusedError("it holds a device that is none")
    return kind


class _Namespace(StandIn):
    """DINO's arguments: attributes with ordinary names."""

    def build(self, state: object) -> object:
        if type(state) is not dict or not all(type(key) is str and not key.startswith("__") for key in state):
            raise RefusedError("it holds a namespace with attributes that are none")
        return self


class _Dtype(StandIn):
    """``numpy.dtype``, of numbers alone. NumPy's own would take a type of two gigabytes, and any state after it."""

    def __init__(self, code: object, align: object = False, copy: object = True) -> None:
        super().__init__()
        if type(code) is not str or not re.fullmatch(r"b1|[iu][1248]|f[248]|f16|c8|c16", code):
            raise RefusedError("it holds a NumPy type that is no number")
        self.dtype = np.dtype(code)

    def build(self, state: object) -> object:
        if type(state) is not tuple or len(state) < 5 or state[1] not in ("<", ">", "|", "=") or any(state[2:5]):
            raise RefusedError("it holds a NumPy type that is no number")
        self.dtype = self.dtype.newbyteorder(state[1])
        return self

    __setstate__ = build


def _scalar(dtype: object, data: object) -> object:
    """``numpy.core.multiarray.scalar``: the learning rates of DINO's optimizers."""
    if type(data) is str:  # the bytes of Python 2
        data = data.encode("latin1")
    if type(dtype) is not _Dtype or type(data) is not bytes or len(data) != dtype.dtype.itemsize:
        raise RefusedError("it holds a NumPy number that is none")
    return np.frombuffer(data, dtype.dtype)[0]


class _Array(StandIn):
    """A NumPy array, made empty and then filled in."""

    def __init__(self, kind: object, shape: object, code: object) -> None:
        super().__init__()
        if not isinstance(kind, Name) or kind is not _NDARRAY:
            raise RefusedError("it holds an array of a kind that is not read here")

    def build(self, state: object) -> object:
        if type(state) is not tuple or len(state) != 5 or type(state[1]) is not tuple or len(state[1]) > 32:
            raise RefusedError("it holds an array of a kind that is not read here")
        _, shape, dtype, by_column, data = state
        if type(data) is str:  # the bytes of Python 2
            data = data.encode("latin1")
        if type(dtype) is not _Dtype or type(data) is not bytes or not all(map(_is_length, shape)):
            raise RefusedError("it holds an array of a kind that is not read here")
        if math.prod(shape) * dtype.dtype.itemsize != len(data):
            raise RefusedError(f"an array claims {_shown(shape)} elements, and has {len(data)} bytes")
        return np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if by_column else "C")


def _ordered() -> OrderedDict[str, object]:
    return OrderedDict()


def _no_bytes() -> bytes:
    return b""


_NDARRAY = Name()
_SCALARS = [f"numpy.{package}.multiarray.scalar" for package in ("core", "_core")]
_COMMON = {
    "collections.OrderedDict": Name(_ordered),
    "_codecs.encode": ENCODE,
    "numpy.dtype": Name(_Dtype),
    **{f"{module}.set": Name(_set) for module in ("builtins", "__builtin__")},
    **dict.fromkeys(_SCALARS, Name(_scalar)),
}
_STORAGES = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1,
}  # fmt: skip
NAMES = {
    **_COMMON,
    "argparse.Namespace": Name(_Namespace, by_new=True),
    "torch._utils._rebuild_tensor_v2": Name(_tensor),
    "torch._utils._rebuild_parameter": Name(_parameter),
    "torch.Size": Name(_size),
    "torch.device": Name(_device),
    **{f"torch.{kind}Storage": Name(value=itemsize) for kind, itemsize in _STORAGES.items()},
    **{f"torch.{kind}": Name() for kind in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8")},
}
GROUND_TRUTH_NAMES = {
    **_COMMON,
    "numpy.ndarray": _NDARRAY,
    **{f"{module}.bytes": Name(_no_bytes) for module in ("builtins", "__builtin__")},
    **{f"numpy.{package}.multiarray._reconstruct": Name(_Array) for package in ("core", "_core")},
}
ALLOWED: list[Any] = [argparse.Namespace, (_Dtype, "numpy.dtype"), *((_scalar, name) for name in _SCALARS)]
"""What PyTorch reads besides tensors: a bag of attributes, and NumPy's numbers, made by our functions."""
