"""PCA whitening of vectors: learned on one set of images, applied to others, kept in a file without pickles.

N vectors, E their features, W features after whitening.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino_xcit.errors import InputError, one_line
from dino_xcit.runtime import atomic
from dino_xcit.runtime.logging import progress_bar

Rows = NDArray[np.float16] | NDArray[np.float32]

FORMAT = "dino-xcit-whitening-1"

_ROWS_AT_ONCE = 16_384
_LEAST_VARIANCE = 1e-8
"""Share of the greatest variance below which a direction is noise of float32, and whitening would blow it up."""
_MOST_BYTES = 1 << 30
_MOST_CARD = 1 << 20
_MEMBERS = ("mean.npy", "projection.npy", "card.npy")


@dataclass(frozen=True)
class Whitening:
    """y = (x - mean) projection (Jégou and Chum, ECCV 2012): the directions of greatest variance, each scaled to
    variance 1 on the set it was learned from."""

    mean: NDArray[np.float32]
    """[E]"""
    projection: NDArray[np.float32]
    """[E, W], greatest variance first."""
    made_for: dict[str, Any]
    """What vectors it fits: weights, descriptor, normalised, as :func:`eval.collection.card.kind_of` says them."""
    learned_on: dict[str, Any]
    """For people: url, images and fingerprint of the set."""

    def __call__(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """[some, E] to [some, W] in float32."""
        centred: NDArray[np.float32] = np.asarray(rows, dtype=np.float32) - self.mean
        found: NDArray[np.float32] = centred @ self.projection
        return found

    @property
    def hash(self) -> str:
        """SHA-256 of the numbers."""
        digest = hashlib.sha256(repr(self.projection.shape).encode())
        digest.update(self.mean.astype("<f4").tobytes())
        digest.update(self.projection.astype("<f4").tobytes())
        return digest.hexdigest()


def learn(vectors: Rows, dim: int, made_for: Mapping[str, Any], learned_on: Mapping[str, Any]) -> Whitening:
    """PCA whitening of vectors [N, E]; they are read twice, a piece at a time, and summed in float64.

    Args:
        vectors: may be memory-mapped.
        dim: W; 0: all directions in which the vectors vary.

    Raises:
        InputError: fewer directions than ``dim``, or fewer than two vectors.
    """
    count, width = vectors.shape
    if count < 2:
        raise InputError(f"whitening is learned from many vectors, found {count}: give --index a larger collection")
    starts = range(0, count, _ROWS_AT_ONCE)
    total, scatter = np.zeros(width), np.zeros((width, width))
    with progress_bar(2 * count, "whitening", shown=count > _ROWS_AT_ONCE, unit="vec") as bar:
        for start in starts:
            piece = vectors[start : start + _ROWS_AT_ONCE].astype(np.float64)
            total += piece.sum(axis=0)
            bar.update(len(piece))
        mean = total / count
        for start in starts:
            piece = vectors[start : start + _ROWS_AT_ONCE].astype(np.float64) - mean
            scatter += piece.T @ piece
            bar.update(len(piece))
    variances, directions = np.linalg.eigh(scatter / (count - 1))
    variances, directions = variances[::-1], directions[:, ::-1]
    usable = int((variances > max(variances[0] * _LEAST_VARIANCE, 0.0)).sum())
    if not 0 < (dim or usable) <= usable:
        raise InputError(
            f"whiten_dim is {dim}, but these {count:,} vectors of {width} numbers vary in {usable} directions: give at "
            f"most {usable}, or learn from more images"
        )
    chosen = dim or usable
    # An eigenvector's sign is the library's whim: the greatest entry is positive, so that a file is the same anywhere.
    columns = directions[:, :chosen] / np.sqrt(variances[:chosen])
    columns *= np.sign(columns[np.abs(columns).argmax(axis=0), np.arange(chosen)])
    return Whitening(mean.astype(np.float32), columns.astype(np.float32), dict(made_for), dict(learned_on))


def save(whitening: Whitening, path: Path) -> None:
    """Write a ``.npz`` that holds mean, projection, and a text of JSON; aside, then renamed.

    Raises:
        InputError: the folder cannot be made or written to.
    """
    card = {"format": FORMAT, "made_for": whitening.made_for, "learned_on": whitening.learned_on}
    arrays = {
        "mean": whitening.mean.astype("<f4"),
        "projection": np.ascontiguousarray(whitening.projection, dtype="<f4"),
        "card": np.frombuffer(json.dumps(card).encode(), dtype=np.uint8),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, lambda file: _write_archive(file, arrays))
    except (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        raise InputError(f"cannot write the whitening {path}: {error.strerror}") from error


def load(path: Path) -> Whitening:
    """Read what :func:`save` wrote. Nothing in the file is executed or taken on trust.

    Raises:
        InputError: no such file, another kind of file, or a damaged one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if sorted(member.filename for member in members) != sorted(_MEMBERS):
                raise ValueError(f"it does not hold {', '.join(_MEMBERS)} alone")
            # Stored as they are, no member can become larger than the file.
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise ValueError("its members are compressed")
            if sum(member.file_size for member in members) > _MOST_BYTES:
                raise ValueError(f"it is larger than {_MOST_BYTES >> 30} GiB")
            if archive.getinfo("card.npy").file_size > _MOST_CARD:
                raise ValueError("its card is too long")
            mean, projection, text = (_array(archive, member) for member in _MEMBERS)
        if text.dtype != np.uint8 or text.ndim != 1:
            raise ValueError("its card is no text")
        card = json.loads(text.tobytes())
        if card["format"] != FORMAT:
            raise ValueError(f"its format is {card['format']!r:.40}, expected {FORMAT}")
        made_for, learned_on = dict(card["made_for"]), dict(card["learned_on"])
        if mean.dtype != np.float32 or projection.dtype != np.float32 or mean.ndim != 1 or projection.ndim != 2:
            raise ValueError("its arrays are of other types or shapes")
        width, dim = projection.shape
        if len(mean) != width or not 0 < dim <= width:
            raise ValueError(f"a mean of {len(mean)} numbers and a projection from {width} to {dim}")
        if not (np.isfinite(mean).all() and np.isfinite(projection).all()):
            raise ValueError("its numbers are not finite")
    except FileNotFoundError as error:
        raise InputError(
            f"there is no whitening {path}: learn one with run_extract.py --learn-whitening FILE --index FOLDER"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, RecursionError) as error:
        raise InputError(f"{path} is no whitening that can be used: {one_line(error)}") from error
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{path} is no whitening: {one_line(error)}") from error
    return Whitening(mean, projection, made_for, learned_on)


def _array(archive: zipfile.ZipFile, member: str) -> NDArray[Any]:
    try:
        with archive.open(member) as file:
            found = np.load(file)
        if not isinstance(found, np.ndarray):
            raise ValueError(f"its {member} is no array")
        return found
    except (OSError, MemoryError):
        raise
    except Exception as error:  # NumPy reads a member's header as Python's literals, of which anything may be wrong
        raise ValueError(one_line(error) or type(error).__name__) from error


def _write_archive(file: Any, arrays: Mapping[str, NDArray[Any]]) -> None:
    stream: Any = _Stream(file)
    # Members have zip's first date: the same numbers give the same bytes.
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


class _Stream:
    """A file that can only be written to: zip then puts sizes behind its members instead of going back."""

    def __init__(self, file: Any) -> None:
        self.write, self.flush = file.write, file.flush
