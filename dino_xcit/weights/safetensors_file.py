"""A ``.safetensors`` file, read within bounds: the safetensors library checks every offset, this the rest.

The format (huggingface/safetensors, README): 8 bytes with the length of a JSON header, the header (name, type, shape
and place of each tensor), then the tensors' bytes, without gaps or overlaps. Nothing in it can be a program.
"""

from __future__ import annotations

import math
import stat
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dino_xcit.errors import InputError, one_line
from dino_xcit.safe_load import ENTRY_LIMIT, GIT_LFS_NOTE, HEADER_LIMIT
from dino_xcit.weights.printing import shown

HEADER_LIMIT = HEADER_LIMIT
"""Bytes of the header, which holds what a checkpoint's pickle holds: names and shapes."""

_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def is_safetensors(path: Path) -> bool:
    """Whether a file has that name, or begins as one does (the hub's cache has names of its own)."""
    if path.suffix == ".safetensors":
        return True
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with open(path, "rb") as file:
            start = file.read(9)
    except (OSError, ValueError):  # reading it as a checkpoint says why
        return False
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= HEADER_LIMIT


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor by its name, on the CPU, and the metadata of the header.

    Raises:
        InputError: no such file, a folder, or a file that is damaged, claims more than it has, or holds types of
            numbers that no backbone has.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise InputError(f"{path} is a pipe or a device: expected a .safetensors file")
        with open(path, "rb") as file:
            start = file.read(len(GIT_LFS_NOTE))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {one_line(error)}") from error
    if start == GIT_LFS_NOTE:
        raise InputError(f"{path} is git-lfs's note of where the file is, not the file: fetch it with git lfs pull")
    if len(start) < 8:
        raise InputError(
            f"{path} is no .safetensors file: it has {len(start)} bytes, expected a length of 8 bytes, a header and "
            "tensors; fetch or export it again"
        )
    length = int.from_bytes(start[:8], "little")
    if length > HEADER_LIMIT:
        raise InputError(
            f"{path} is no .safetensors file that is read here: its header would be {length:,} bytes long, expected at "
            f"most {HEADER_LIMIT:,}"
        )
    try:
        # The library refuses a header that does not account for every byte of the file once.
        with safe_open(path, framework="pt", device="cpu") as tensors:
            names = list(tensors.keys())
            if len(names) > ENTRY_LIMIT:
                raise InputError(f"{path} holds {len(names):,} tensors, expected at most {ENTRY_LIMIT:,}")
            for name in names:
                _check(tensors.get_slice(name), name, path)
            return {name: tensors.get_tensor(name) for name in names}, dict(tensors.metadata() or {})
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, OverflowError, MemoryError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} is no .safetensors file that can be read ({one_line(error)}): it is damaged, cut short, or of "
            "another kind"
        ) from error


def _check(part: object, name: str, path: Path) -> None:
    kind, shape = part.get_dtype(), part.get_shape()  # type: ignore[attr-defined]
    if kind not in _TYPES:
        raise InputError(
            f"{path} holds {shown([name])} as {kind}, expected one of {', '.join(_TYPES)}: convert it first"
        )
    # An empty tensor may claim any other lengths, and PyTorch multiplies them.
    if math.prod(length or 1 for length in shape) >= 2**62 or len(shape) > 64:
        raise InputError(f"{path} holds {shown([name])} in a shape that cannot be: {str(list(shape))[:80]}")
