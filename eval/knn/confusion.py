"""Which classes are told apart, and which are taken for each other: a table and a picture.

C classes; ``predicted`` and ``labels`` are class numbers, [images].
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dino_xcit.errors import InputError
from dino_xcit.runtime import atomic

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class ClassResult:
    """One class of the validation images."""

    number: int
    name: str
    images: int
    right: int
    """How many of its images were predicted as it."""
    rival: str
    """The class that the others were most often taken for; empty where none was."""
    taken_for_rival: int

    @property
    def top1(self) -> float | None:
        """Percent; None for a class without images."""
        return 100.0 * self.right / self.images if self.images else None


def class_name(number: int, names: Sequence[str] | None) -> str:
    """The name of a class, or its number where it has none."""
    return names[number] if names is not None and 0 <= number < len(names) else str(number)


def per_class(predicted: Labels, labels: Labels, names: Sequence[str] | None) -> list[ClassResult]:
    """A result for every class that has a name or an image, in the order of their numbers.

    Among rivals that were taken equally often the lowest number is named.
    """
    counts = confusions(predicted, labels)
    images, right, rivals = dict[int, int](), dict[int, int](), dict[int, tuple[int, int]]()
    for (truth, guess), count in counts.items():  # ascending, so that the first of equal rivals stays
        images[truth] = images.get(truth, 0) + count
        if truth == guess:
            right[truth] = count
        elif count > rivals.get(truth, (0, 0))[1]:
            rivals[truth] = guess, count
    results = []
    for number in sorted({*range(len(names or ())), *images}):
        rival, taken = rivals.get(number, (-1, 0))
        rival_name = class_name(rival, names) if taken else ""
        found = images.get(number, 0), right.get(number, 0)
        results.append(ClassResult(number, class_name(number, names), *found, rival_name, taken))
    return results


def confusions(predicted: Labels, labels: Labels) -> dict[tuple[int, int], int]:
    """How many images of a class were predicted as which: {(class, prediction): images}, ascending, without zeros.

    Counted by pairs, not in a C x C table: of 20,000 classes that would be 3 GB, nearly all of it zeros.
    """
    pairs, counts = np.unique(np.stack([labels, predicted], axis=1), axis=0, return_counts=True)
    return {(int(truth), int(guess)): int(count) for (truth, guess), count in zip(pairs, counts, strict=True)}


def write_per_class(path: Path, results: Sequence[ClassResult]) -> None:
    """A CSV file: class, images, top1, most_confused_with, confused (percent of the class's images).

    Raises:
        InputError: it cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["class", "images", "top1", "most_confused_with", "confused"])
    for row in results:
        top1 = "" if row.top1 is None else f"{row.top1:.2f}"
        confused = f"{100.0 * row.taken_for_rival / row.images:.2f}" if row.taken_for_rival else ""
        writer.writerow([row.name, row.images, top1, row.rival, confused])
    write_whole(path, text.getvalue().encode("utf-8", "surrogateescape"))


def write_whole(path: Path, content: bytes) -> None:
    """A file that is whole or absent, its folder made if need be.

    Raises:
        InputError: it cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, lambda file: file.write(content))
    except OSError as error:  # a full or read-only disk and a name that is too long, too
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another file") from error
