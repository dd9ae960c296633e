"""An extraction in parts: each is made by one process, kept with its hash, and never made twice. D features.

The parts lie in a folder inside the one that the collection will be in::

    plan.json          what is extracted, and where parts begin
    part-000000.npy    rows of the first images, float32
    part-000000.json   the file's size and SHA-256, and which images could not be read; written after it
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dino_xcit.data import Source, UndecodableImage
from dino_xcit.errors import InputError, one_line
from dino_xcit.runtime import atomic, distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import progress_bar
from dino_xcit.transform import EvalTransform, normalise
from eval.features import image_batches
from eval.pooling import Descriptor

FOLDER = ".parts"
_PLAN = "plan.json"
_VERSION = 1
_MOST_BYTES = 64_000_000
"""Of a JSON file that is read."""
_MOST_IN_A_PART = 1 << 30

_runs = itertools.count()


@dataclass(frozen=True)
class Plan:
    """What is extracted, and in which parts."""

    identity: dict[str, Any]
    """All that decides the rows, by name, as JSON has it."""
    images: int
    width: int
    """D."""
    part_images: int
    """In each part but the last."""

    def __len__(self) -> int:
        return -(-self.images // self.part_images)

    def bounds(self, number: int) -> tuple[int, int]:
        """The first image of a part, and the first of the next one."""
        start = number * self.part_images
        return start, min(start + self.part_images, self.images)


@dataclass(frozen=True)
class Parts:
    """The folder of an extraction under way."""

    folder: Path
    plan: Plan

    def missing(self, unreadable: Literal["refuse", "skip"]) -> list[int]:
        """The parts that are not there, not whole, or, unless unreadable images are skipped, not complete."""
        numbers = range(len(self.plan))
        there = [number for number in numbers if self._record(number).exists()]
        gone = set(numbers) - set(there)
        with (
            ThreadPoolExecutor(4) as pool,
            progress_bar(len(there), "comparing parts", shown=bool(there), unit="part") as bar,
        ):
            for number, missed in zip(there, pool.map(self._whole, there), strict=True):
                if missed is None or (missed and unreadable == "refuse"):
                    gone.add(number)
                bar.update()
        return sorted(gone)

    def write(self, number: int, rows: NDArray[np.float32], unreadable: list[int]) -> None:
        """Keep a part: rows [images of the part, D], NaN for ``unreadable`` ones (their numbers in the source)."""
        self._record(number).unlink(missing_ok=True)
        digest = atomic.write(
            self._file(number), lambda file: np.lib.format.write_array(file, rows, (1, 0), allow_pickle=False)
        )
        record = {"size": digest.size, "sha256": digest.sha256, "unreadable": unreadable}
        atomic.write_json(self._record(number), record)

    def unreadable(self) -> list[int]:
        """The images of all parts that could not be read, ascending."""
        return [image for number in range(len(self.plan)) for image in self._whole(number, look=False) or []]

    def rows(self) -> Iterator[NDArray[np.float32]]:
        """The rows of all images that could be read, a part at a time.

        Raises:
            InputError: a part is gone or damaged.
        """
        for number in range(len(self.plan)):
            missed = self._whole(number)
            if missed is None:
                raise InputError(
                    f"{self._file(number)} is not there, or not as it was written: name an --output-dir that all "
                    "processes see, and run the same command again"
                )
            rows: NDArray[np.float32] = np.load(self._file(number))
            yield np.delete(rows, np.asarray(missed, dtype=np.int64) - self.plan.bounds(number)[0], axis=0)

    def _whole(self, number: int, look: bool = True) -> list[int] | None:
        """The unreadable images of a part; None where it is not as it was written (``look``: by its hash)."""
        try:
            record = _read(self._record(number))
            start, stop = self.plan.bounds(number)
            missed = record["unreadable"]
            if not all(type(image) is int and start <= image < stop for image in missed):
                return None
            if look and atomic.digest_of(self._file(number)) != atomic.Digest(record["size"], record["sha256"]):
                return None
            return sorted(missed)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def _file(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.npy"

    def _record(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.json"


def remove(folder: Path) -> None:
    """The folder of an extraction, when the collection is whole."""
    shutil.rmtree(folder, ignore_errors=True)


def are_of(folder: Path, identity: dict[str, Any], images: int) -> bool:
    """Whether a folder's parts belong to the extraction of these rows; true of a folder where nothing was begun, or
    whose plan is damaged, so that its parts are of use to nobody."""
    there = _stored_plan(folder / _PLAN)
    return there is None or (there.identity, there.images) == (identity, images)


def begin(folder: Path, plan: Plan, replace: bool) -> Parts:
    """The parts of an extraction: those that are there, or none yet. Call it on one process.

    Parts whose plan is damaged cannot be told from those of another extraction: it is said, and they are made anew.

    Args:
        folder: exists.
        replace: remove the parts of another extraction.

    Raises:
        InputError: there are parts of another one, or the plan cannot be read.
    """
    path = folder / _PLAN
    there = _stored_plan(path)
    if there is None and path.exists():
        log.warning(f"{path} is damaged, so that the parts beside it are of no use: beginning anew")
    elif there is not None:
        if (there.identity, there.images, there.width) == (plan.identity, plan.images, plan.width):
            atomic.remove_leftovers(folder)
            return Parts(folder, there)
        if not replace:
            raise InputError(
                f"{folder} holds parts of an extraction that is not finished{_changed(there, plan)}: repeat the "
                "command that began it, choose another --output-dir, or --overwrite to begin anew"
            )
    for left in folder.glob("part-*"):
        left.unlink()
    atomic.remove_leftovers(folder)
    atomic.write_json(
        path,
        {
            "version": _VERSION,
            "identity": plan.identity,
            "images": plan.images,
            "width": plan.width,
            "part_images": plan.part_images,
        },
    )
    return Parts(folder, plan)


def _stored_plan(path: Path) -> Plan | None:
    """The plan of the parts that are there; None where there is none, or a damaged one.

    Raises:
        InputError: it cannot be read now, or another version of this project wrote it.
    """
    try:
        found = _read(path)
        if type(found["version"]) is int and found["version"] != _VERSION:
            raise InputError(
                f"{path} is of another version of this program ({found['version']!r:.20}, expected {_VERSION}): finish "
                "the extraction with that one, choose another --output-dir, or remove that folder"
            )
        plan = Plan(dict(found["identity"]), *(found[name] for name in ("images", "width", "part_images")))
        sound = all(type(value) is int and value > 0 for value in (plan.images, plan.width, plan.part_images))
        return plan if sound and found["version"] == _VERSION and plan.part_images < _MOST_IN_A_PART else None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot read {path}: {one_line(error)}; choose another --output-dir") from error
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _changed(there: Plan, plan: Plan) -> str:
    names = [name for name, value in plan.identity.items() if there.identity.get(name) != value]
    return f", with another {' and another '.join(names[:3])}" if names else ""


def _read(path: Path) -> Any:
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError("too long")
    return json.loads(path.read_bytes())


def extract_parts(
    parts: Parts,
    missing: list[int],
    backbone: nn.Module,
    source: Source,
    transform: EvalTransform,
    descriptor: Descriptor,
    device: torch.device,
    batch_size: int,
    num_workers: int,
    unreadable: Literal["refuse", "skip"],
) -> None:
    """Make the parts that are missing. Every process calls this and takes the next part when it is free.

    Where batches begin does not depend on who takes a part, so that its bits do not either.

    Args:
        missing: numbers of parts, the same on every process.
        backbone: on ``device``; its mode (train or eval) is restored.

    Raises:
        InputError: an image cannot be read, and shall be; or the vectors are not finite numbers.
    """
    run = next(_runs)
    taken, finished = _Counter(f"extract/{run}/parts"), _Counter(f"extract/{run}/images")
    under_way: deque[tuple[int, list[int]]] = deque()

    def batches() -> Iterator[list[int]]:
        # Loader processes work ahead, so parts are taken some batches before their rows are made.
        while (turn := taken.add(1) - 1) < len(missing):
            start, stop = parts.plan.bounds(missing[turn])
            for first in range(start, stop, batch_size):
                batch = list(range(first, min(first + batch_size, stop)))
                under_way.append((missing[turn], batch))
                yield batch

    left = sum(stop - start for start, stop in map(parts.plan.bounds, missing))
    done = parts.plan.images - left
    share = -(-left // distributed.world_size())
    was_training = backbone.training
    backbone.eval()
    rows: NDArray[np.float32] = np.empty((0, parts.plan.width), dtype=np.float32)
    missed: list[int] = []
    try:
        with progress_bar(parts.plan.images, f"features of {source.url}", distributed.is_main(), done) as bar:
            for images, places, error in image_batches(source, transform, batches(), share, num_workers, device):
                number, batch = under_way.popleft()
                if error and unreadable == "refuse":
                    first = next(image for place, image in enumerate(batch) if place not in places)
                    raise InputError(_unreadable(source.name(first), error)) from error
                start, stop = parts.plan.bounds(number)
                if batch[0] == start:
                    rows, missed = np.full((stop - start, parts.plan.width), np.nan, dtype=np.float32), []
                if places:
                    with torch.inference_mode():
                        ready = normalise(images.to(device, non_blocking=True), transform.mean, transform.std)
                        found = descriptor(backbone, ready).cpu().numpy()
                    if not np.isfinite(found).all():  # now, not when all is extracted
                        raise InputError(
                            "the vectors are not finite numbers (NaN or infinite): the weights are damaged, or their "
                            "training diverged"
                        )
                    rows[np.asarray(places) + batch[0] - start] = found
                missed += sorted(set(batch) - {batch[place] for place in places})
                if batch[-1] == stop - 1:
                    parts.write(number, rows, missed)
                bar.update(done + finished.add(len(batch)) - bar.n)
    finally:
        backbone.train(was_training)


def _unreadable(name: str, error: InputError) -> str:
    """Advice of its own: who removes the image, as decoding advises, has other data, which no part is of."""
    cause = error.cause if isinstance(error, UndecodableImage) else str(error)
    found = str(error) if cause == str(error) else f"{name} cannot be read: {cause}"
    return (
        f"{found} (--unreadable skip leaves such images out); a folder that is changed, this image removed or saved "
        "anew, is extracted from its start, with --overwrite"
    )


class _Counter:
    """A number that all processes of the run add to."""

    def __init__(self, name: str) -> None:
        self._name, self._store, self._value = name, distributed.store(), 0

    def add(self, amount: int) -> int:
        """The sum so far, this included."""
        if self._store is not None:
            return self._store.add(self._name, amount)
        self._value += amount
        return self._value
