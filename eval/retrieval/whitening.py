"""PCA whitening of vectors, stored in a file without pickles.

N vectors, E features before and W features after whitening.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino_xcit.errors import InputError, one_line
from dino_xcit.runtime import atomic
from eval.pooling import Descriptor

FORMAT = "dino-xcit-whitening-2"

_ROWS_AT_ONCE = 16_384
_MIN_VARIANCE = 1e-8
"""Minimum variance of a direction relative to the largest; whitening would amplify float32 noise below it."""


@dataclass(frozen=True)
class Whitening:
    """PCA whitening y = (x - mean) projection (Jégou and Chum, ECCV 2012), with unit variances on the training set."""

    mean: NDArray[np.float32]
    """[E]"""
    projection: NDArray[np.float32]
    """[E, W], largest variance first."""
    made_for: dict[str, Any]
    """Kind of the vectors: weights, descriptor, normalised (:func:`kind_of`)."""
    learned_on: dict[str, Any]
    """Informative: url, images and fingerprint of the training set."""

    def __call__(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Whiten rows [n, E] to [n, W] in float32."""
        centered: NDArray[np.float32] = np.asarray(rows, dtype=np.float32) - self.mean
        found: NDArray[np.float32] = centered @ self.projection
        return found

    @property
    def hash(self) -> str:
        """SHA-256 of mean and projection."""
        digest = hashlib.sha256(repr(self.projection.shape).encode())
        digest.update(self.mean.astype("<f4").tobytes())
        digest.update(self.projection.astype("<f4").tobytes())
        return digest.hexdigest()


def learn(
    vectors: NDArray[np.floating], dim: int, made_for: Mapping[str, Any], learned_on: Mapping[str, Any]
) -> Whitening:
    """Learn PCA whitening from vectors [N, E], in two passes over chunks with float64 sums.

    Args:
        vectors: may be memory-mapped.
        dim: W; 0: all directions with variance.

    Raises:
        InputError: the vectors vary in fewer directions than ``dim``, or there are fewer than two vectors.
    """
    count, width = vectors.shape
    if count < 2:
        raise InputError(f"found {count} vectors, but whitening needs more: give --index a larger collection")
    starts = range(0, count, _ROWS_AT_ONCE)
    total, scatter = np.zeros(width), np.zeros((width, width))
    for start in starts:
        total += vectors[start : start + _ROWS_AT_ONCE].astype(np.float64).sum(axis=0)
    mean = total / count
    for start in starts:
        piece = vectors[start : start + _ROWS_AT_ONCE].astype(np.float64) - mean
        scatter += piece.T @ piece
    variances, directions = np.linalg.eigh(scatter / (count - 1))
    variances, directions = variances[::-1], directions[:, ::-1]
    usable = int((variances > max(variances[0] * _MIN_VARIANCE, 0.0)).sum())
    chosen = dim or usable
    if not 0 < chosen <= usable:
        raise InputError(f"whiten_dim is {dim}, but these {count:,} vectors vary in {usable} directions")
    columns = directions[:, :chosen] / np.sqrt(variances[:chosen])
    # Fix the sign of each eigenvector, so that files are identical on all machines.
    columns *= np.sign(columns[np.abs(columns).argmax(axis=0), np.arange(chosen)])
    return Whitening(mean.astype(np.float32), columns.astype(np.float32), dict(made_for), dict(learned_on))


def save(whitening: Whitening, path: Path) -> None:
    """Write a ``.npz`` with mean, projection and JSON metadata; equal whitenings give equal bytes."""
    metadata = {"format": FORMAT, "made_for": whitening.made_for, "learned_on": whitening.learned_on}
    content = io.BytesIO()
    np.savez(
        content,
        mean=whitening.mean.astype("<f4"),
        projection=np.ascontiguousarray(whitening.projection, dtype="<f4"),
        metadata=np.frombuffer(json.dumps(metadata).encode(), dtype=np.uint8),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, lambda file: file.write(content.getvalue()))


def load(path: Path, wanted: Mapping[str, Any] | None = None) -> Whitening:
    """Read a file written by :func:`save`; NumPy refuses pickles.

    Args:
        wanted: required kind of vectors, see :func:`kind_of`.

    Raises:
        InputError: the file is missing, damaged, of another type, or for another kind of vectors.
    """
    try:
        with np.load(path) as file:
            if "metadata" not in file:
                raise ValueError(f"its format is not {FORMAT}: learn it again with run_extract.py --learn-whitening")
            mean, projection, metadata = file["mean"], file["projection"], json.loads(file["metadata"].tobytes())
        found = Whitening(mean, projection, dict(metadata["made_for"]), dict(metadata["learned_on"]))
        if metadata["format"] != FORMAT or not mean.dtype == projection.dtype == np.float32:
            raise ValueError(f"its format is not {FORMAT}")
        if projection.ndim != 2 or mean.shape != projection.shape[:1] or not np.isfinite(mean @ projection).all():
            raise ValueError("its mean [E] and projection [E, W] have different shapes or are not finite")
    except FileNotFoundError as error:
        raise InputError(f"found no whitening {path}: learn one with run_extract.py --learn-whitening") from error
    except Exception as error:  # NumPy's header parser raises many types for damaged files
        raise InputError(f"{path} is no valid whitening: {one_line(error)}") from error
    if wanted and (changed := differences(found.made_for, wanted)):
        raise InputError(f"the whitening {path} was learned from other vectors: {changed}; learn another one")
    return found


def kind_of(weights: str, descriptor: Descriptor, normalised: bool = True) -> dict[str, Any]:
    """Return the settings that identify vectors before whitening, by name. ``weights`` is a hash."""
    return {"weights": weights, **descriptor.to_dict(), "normalised": normalised}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Describe differing settings as ``name is this there and that here``; empty if there are none."""
    return "; ".join(
        f"{name} is {there.get(name, 'none')!s:.200} there and {here.get(name, 'none')!s:.200} here"
        for name in [*here, *(there.keys() - here.keys())]
        if there.get(name) != here.get(name)
    )
