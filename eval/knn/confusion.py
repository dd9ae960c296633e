"""Confusion between classes: a per-class table and a confusion matrix, legible for ten classes and for a thousand.

``predicted`` and ``labels`` are class numbers, [images]. The matrix shows names and percentages for few classes; for
many, adjacent classes share a cell. The most frequent confusions are listed by name.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dino_xcit.runtime import atomic

Labels = NDArray[np.int64]
Names = Sequence[str] | None
"""Class names by class number; None: use the numbers."""
Pairs = dict[tuple[int, int], int]
"""Number of images by (class, prediction), in ascending order, without zeros."""

NAMED = 40
"""Maximum number of classes with names on both axes."""
WRITTEN = 20
"""Maximum number of classes with a percentage in each cell."""
CELLS = 200
"""Maximum number of cells per side, each several pixels wide."""
LISTED = 30
"""Number of listed confusions."""
_MAX_NAME = 26
"""Maximum length of a drawn class name."""


def class_name(number: int, names: Names) -> str:
    """Return the name of a class, or its number as a string."""
    return names[number] if names is not None and 0 <= number < len(names) else str(number)


def confusions(predicted: Labels, labels: Labels) -> Pairs:
    """Count the pairs (class, prediction). A dense matrix of 20,000 classes would take 3 GB."""
    return dict(sorted(Counter(zip(labels.tolist(), predicted.tolist(), strict=True)).items()))


# ---- the table


def write_per_class(path: Path, predicted: Labels, labels: Labels, names: Names) -> None:
    """Write a CSV file with a row for each class that has a name or an image, in the order of class numbers.

    Columns: class, images, top1, most_confused_with (the lowest number in a tie), confused (percent of the class).
    """
    pairs = confusions(predicted, labels)
    images = Counter(labels.tolist())
    rivals: dict[int, tuple[int, int]] = {}
    for (truth, guess), count in pairs.items():
        if truth != guess and count > rivals.get(truth, (0, 0))[1]:
            rivals[truth] = guess, count
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["class", "images", "top1", "most_confused_with", "confused"])
    for number in sorted({*range(len(names or ())), *images}):
        count, cells = images[number], [""] * 3
        if count:
            cells[0] = f"{100.0 * pairs.get((number, number), 0) / count:.2f}"
        if number in rivals:
            rival, taken = rivals[number]
            cells[1:] = class_name(rival, names), f"{100.0 * taken / count:.2f}"
        writer.writerow([class_name(number, names), count, *cells])
    content = text.getvalue().encode("utf-8", "surrogateescape")
    atomic.write(path, lambda file: file.write(content))


# ---- the matrix


def draw_confusion(path: Path, predicted: Labels, labels: Labels, names: Names, title: str) -> None:
    """Draw the confusion matrix to a PNG, without classes that have neither images nor predictions.

    Args:
        predicted, labels: [images], at least one.
        title: name of the measurement, such as ``k-NN, k = 20``.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import PowerNorm

    pairs = confusions(predicted, labels)
    classes = np.union1d(labels, predicted)
    named = [_short(number, names) for number in classes.tolist()] if len(classes) <= NAMED else []
    figure, (axis, beside) = plt.subplots(1, 2, figsize=(15.5, 8.6), width_ratios=(8, 4.2), layout="constrained")
    shares = cell_shares(predicted, labels, classes)
    axis.set_facecolor("#d9dde3")  # rows without images
    # Low percentages get most of the colour range: errors are rare.
    image = axis.imshow(shares, cmap="Blues", norm=PowerNorm(0.4, 0, 100), interpolation="nearest", aspect="equal")
    figure.colorbar(image, ax=axis, fraction=0.045, pad=0.02, ticks=[0, 1, 5, 20, 50, 100], format="%d %%")
    axis.set(xlabel="predicted (% of the row's images)", ylabel="class")
    axis.set_xticks(range(len(named)), named, rotation=90)
    axis.set_yticks(range(len(named)), named)
    if len(classes) <= WRITTEN:
        for row, column in np.argwhere(shares >= 0.5):
            colour = "white" if shares[row, column] > 35 else "black"
            axis.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", fontsize=8, color=colour)
    images = Counter(labels.tolist())
    wrong = [(-100 * count / images[truth], truth, guess) for (truth, guess), count in pairs.items() if truth != guess]
    for place, (share, truth, guess) in enumerate(sorted(wrong)[:LISTED]):
        beside.barh(place, -share, color="#9ecae1", height=0.8)
        text = f"{-share:.0f}  {_short(truth, names)} \N{RIGHTWARDS ARROW} {_short(guess, names)}"
        beside.text(0.6, place, text, va="center", fontsize=8.5)
    beside.set(xlim=(0, 100), title="most frequent confusions (% of the class's images)")
    beside.invert_yaxis()
    beside.axis("off")
    top1 = 100.0 * float((predicted == labels).mean())
    figure.suptitle(f"{title}: top-1 {top1:.1f} % (images: {len(labels):,}, classes: {len(classes):,})", fontsize=12)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, bbox_inches="tight", pad_inches=0.15)
    plt.close(figure)
    atomic.write(path, lambda file: file.write(picture.getvalue()))


def cell_shares(predicted: Labels, labels: Labels, classes: Labels) -> NDArray[np.float64]:
    """Return the percentage of each row's images predicted as each column, [cells, cells]; NaN in rows without images.
    Each of the ascending ``classes`` has its own cell up to :data:`CELLS`; beyond, adjacent classes share cells."""
    cells = min(CELLS, len(classes))
    places = [np.searchsorted(classes, one) * cells // len(classes) for one in (labels, predicted)]
    counts = np.zeros((cells, cells))
    np.add.at(counts, tuple(places), 1)
    images = counts.sum(axis=1, keepdims=True)
    return np.divide(100.0 * counts, images, out=np.full_like(counts, np.nan), where=images > 0)


def _short(number: int, names: Names) -> str:
    """Shorten a class name and replace unprintable characters; an unescaped ``$`` would start a formula."""
    name = class_name(number, names)
    plain = "".join(letter if letter.isprintable() else "?" for letter in name).replace("$", r"\$")
    return plain if len(plain) <= _MAX_NAME else plain[: _MAX_NAME - 1] + "\N{HORIZONTAL ELLIPSIS}"
