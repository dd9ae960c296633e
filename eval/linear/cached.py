"""Features of a few augmented epochs, kept once, for heads to be trained on in minutes (``--cached``).

Epoch e of the probe learns from kept epoch e mod E, in an order of its own. The views of a kept epoch are those that
the full protocol sees in that epoch: what is given up is that after E epochs the views come again. Each epoch's file is
whole or absent, so that an interrupted run goes on with the next one; at its end, behind the array, stands
its digest, checked when a probe begins.

B batch, W features of a row, E kept epochs, n images.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dino_xcit.data import Source
from dino_xcit.data.loader import StepSampler
from dino_xcit.data.workers import choose_workers
from dino_xcit.errors import InputError
from dino_xcit.runtime import atomic, distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import progress_bar
from dino_xcit.transform import EvalTransform
from eval.features import width_of
from eval.linear.views import EachOnce, frozen_features, probe_batches
from eval.results import write_json

CACHE_VERSION = "1"
Precision = Literal["float16", "float32"]

_SPARE_BYTES = 1 << 30
"""Left free on the disk."""


class AugmentedEpochs:
    """The features of E augmented epochs over a training set, on the disk."""

    def __init__(
        self,
        cache_dir: Path,
        train: Source,
        fingerprint: str,
        weights: str,
        transform: EvalTransform,
        crop_scale: tuple[float, float],
        seed: int,
        width: int,
        precision: Precision,
    ) -> None:
        """Where they are, whether or not they are there yet.

        Args:
            cache_dir: a folder that all processes see.
            fingerprint: of ``train``.
            weights: identifies what makes a row of ``width`` features of an image.
            crop_scale: share of an image's area that a crop covers: least, most.
            seed: of the crops.
        """
        self._train, self._crop_scale, self._seed, self._transform = train, crop_scale, seed, transform
        self._shape, self._type = (len(train), width), np.dtype("<f2" if precision == "float16" else "<f4")
        self.card: dict[str, object] = {
            "version": CACHE_VERSION,
            "weights": weights,
            "data": fingerprint,
            "images": len(train),
            "dimension": width,
            "type": precision,
            "crop": transform.crop,
            "crop_scale": list(crop_scale),
            "mean": list(transform.mean),
            "std": list(transform.std),
            "seed": seed,
        }
        """All that decides what the features are, but for the epoch."""
        key = hashlib.sha256(json.dumps(self.card, sort_keys=True).encode()).hexdigest()[:20]
        self.folder = cache_dir / f"augmented-{key}"

    def file(self, epoch: int) -> Path:
        """Of a kept epoch, 0-based."""
        return self.folder / f"epoch-{epoch:03d}.npy"

    def _intact(self, epoch: int) -> bool:
        """Whether a kept epoch is there and holds what was written; says so where it does not."""
        if not self.file(epoch).exists():
            return False
        digest = hashlib.sha256()
        with open(self.file(epoch), "rb") as file:
            left = os.fstat(file.fileno()).st_size - digest.digest_size
            while left > 0 and (part := file.read(min(left, 1 << 20))):
                digest.update(part)
                left -= len(part)
            if file.read() == digest.digest() and self.rows(epoch) is not None:
                return True
        log.warning(f"{self.file(epoch)} is not what was written there: it is made anew")
        return False

    def rows(self, epoch: int) -> NDArray[Any] | None:
        """[n, W] of a kept epoch, memory-mapped; None where it is not there, or damaged."""
        try:
            found: NDArray[Any] = np.load(self.file(epoch), mmap_mode="r")
        except (FileNotFoundError, NotADirectoryError, ValueError, EOFError):
            return None
        return found if found.shape == self._shape and found.dtype == self._type else None

    def make(
        self, epochs: int, backbone: nn.Module, device: torch.device, batch_size: int, num_workers: int
    ) -> list[NDArray[Any]]:
        """All E, memory-mapped, after extracting those that are missing. Under torchrun the processes share the work.

        Args:
            epochs: E.
            backbone: on ``device``, in eval mode; its class token is the row.

        Raises:
            InputError: the disk has no room for them, a feature does not fit its type, or they are gone again.
            UndecodableImage: an image cannot be read; it is named.
        """
        # One process looks, and all do as it says: they must not disagree about whether there is work to share.
        missing = distributed.on_main(lambda: [epoch for epoch in range(epochs) if not self._intact(epoch)])
        size = self._shape[0] * self._shape[1] * self._type.itemsize
        if missing:
            log.info(
                f"keeping the features of {len(missing)} of {epochs} augmented epochs in {self.folder} "
                f"({size * len(missing) / 2**30:.2f} GiB)"
            )
            if refusal := distributed.on_main(lambda: self._why_not(size * len(missing))):
                raise InputError(refusal)
        images = self._shape[0]
        with progress_bar(epochs * images, "augmented", distributed.is_main(), (epochs - len(missing)) * images) as bar:
            for epoch in missing:
                chunks = self._extract(epoch, backbone, device, batch_size, num_workers, bar)
                if distributed.is_main():
                    atomic.write(self.file(epoch), partial(self._write, chunks))
                else:
                    for _ in chunks:
                        pass
                distributed.barrier()
        kept = [self.rows(epoch) for epoch in range(epochs)]
        if any(rows is None for rows in kept):
            raise InputError(f"features just kept in {self.folder} are gone: name a --cache-dir that all can see")
        return [rows for rows in kept if rows is not None]

    def _why_not(self, size: int) -> str | None:
        """A sentence if so many bytes cannot be kept."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic.remove_leftovers(self.folder)
            write_json(self.folder / "card.json", self.card | {"source": self._train.url})
            free = shutil.disk_usage(self.folder).free
        except (OSError, InputError) as error:
            return f"cannot keep features in {self.folder}: {error}; name another --cache-dir"
        if size + _SPARE_BYTES <= free:
            return None
        return (
            f"the augmented epochs take {size / 2**30:.1f} GiB, and {self.folder} has {free / 2**30:.1f} GiB free: "
            "name another --cache-dir, lower --cached-epochs, or leave --cached out"
        )

    def _extract(
        self, epoch: int, backbone: nn.Module, device: torch.device, batch_size: int, num_workers: int, bar: Any
    ) -> Iterator[NDArray[Any]]:
        """The rows of an epoch in the order of the source, some at a time, on every process."""
        sampler = EachOnce(
            len(self._train), batch_size, epoch, self._seed, distributed.rank(), distributed.world_size()
        )
        workers = choose_workers(num_workers, distributed.processes_here())
        views = probe_batches(self._train, self._transform.crop, self._crop_scale, sampler, workers, device)
        features = frozen_features(backbone, views, self._transform, device)
        nothing = torch.empty(0, width_of(backbone), device=device)
        for own in sampler.batches:
            gathered = distributed.gather_rows(next(features)[0] if own else nothing).cpu().numpy()
            with np.errstate(over="ignore"):
                kept = gathered.astype(self._type)
            if not np.isfinite(kept).all():
                if np.isfinite(gathered).all():
                    raise InputError(
                        f"a feature of {np.abs(gathered).max():g} does not fit float16, which ends at 65504: use "
                        "--cached-precision float32"
                    )
                raise InputError(f"a feature of {self._train.url} is not finite: these weights cannot be measured")
            yield kept
            bar.update(len(gathered))

    def _write(self, chunks: Iterator[NDArray[Any]], file: Any) -> None:
        header = {"descr": self._type.str, "fortran_order": False, "shape": self._shape}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in chunks:
            file.write(chunk.tobytes())
        # In the same file, so that there is never one without the other; numpy reads no further than the array.
        file.write(bytes.fromhex(file.digest().sha256))


def stored_features(
    epochs: Sequence[NDArray[Any]], sampler: StepSampler, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """As :func:`eval.linear.views.frozen_features` for every step of ``sampler``, from what was kept.

    Args:
        epochs: E arrays [n, W].
    """
    for keys in sampler:
        chosen = np.array([index for _, index in keys], dtype=np.int64)
        rows = epochs[keys[0][0] % len(epochs)][chosen].astype(np.float32)
        yield torch.from_numpy(rows).to(device), torch.from_numpy(chosen).to(device)
