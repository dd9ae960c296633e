"""A picture of which classes are taken for which, legible for ten classes and for a thousand.

Few classes: a cell a pair, with names and percentages. Many: classes that are taken for each other are put side by
side, neighbours share a cell, and the pairs most often confused are listed by name. C classes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from eval.knn.confusion import Labels, class_name, confusions, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMED = 40
"""So many classes get their names on both sides, in the order of their numbers; more are grouped."""
WRITTEN = 20
"""So many classes leave room for a percentage in every cell."""
CELLS = 200
"""Cells a side when there are more classes than can be named: each is still several pixels wide."""
LISTED = 30
"""Pairs in the list beside a picture of many classes."""

_LETTERS = 26
"""Of a class's name; the rest is cut."""


def draw_confusion(path: Path, predicted: Labels, labels: Labels, names: Sequence[str] | None, title: str) -> None:
    """Write the picture as a PNG. Classes without an image and without a prediction are left out.

    Args:
        predicted, labels: [images], at least one.
        names: of the classes, by number; None: their numbers stand for them.
        title: what was measured, such as ``k-NN, k = 20``.

    Raises:
        InputError: it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pairs = confusions(predicted, labels)
    classes = sorted({number for pair in pairs for number in pair})
    if len(classes) <= NAMED:
        side = 3.6 + (0.36 if len(classes) <= WRITTEN else 0.22) * len(classes)
        figure, axis = plt.subplots(figsize=(side + 0.6, side), layout="constrained")
        _draw_named(axis, pairs, classes, [_short(class_name(number, names)) for number in classes])
    else:
        figure, (axis, beside) = plt.subplots(1, 2, figsize=(15.5, 8.6), width_ratios=(8, 4.2), layout="constrained")
        _draw_grouped(axis, pairs, side_by_side(pairs, classes))
        _draw_pairs(beside, pairs, names)
    top1 = 100.0 * float((predicted == labels).mean())
    counted = f"{len(labels):,} image{'s' * (len(labels) > 1)}, {len(classes):,} class{'es' * (len(classes) > 1)}"
    figure.suptitle(f"{title}: top-1 {top1:.1f} % of {counted}", fontsize=12)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, bbox_inches="tight", pad_inches=0.15)
    plt.close(figure)
    write_whole(path, picture.getvalue())


def side_by_side(pairs: dict[tuple[int, int], int], classes: Sequence[int]) -> list[int]:
    """The classes in an order where those most often taken for each other stand near each other.

    Every class begins as a chain of its own; the most confused pairs first, the two chains of a pair are joined, each
    turned so that the pair comes as near as its chain allows.
    """
    together: dict[tuple[int, int], int] = {}
    for (truth, guess), count in pairs.items():
        if truth != guess:
            link = min(truth, guess), max(truth, guess)
            together[link] = together.get(link, 0) + count
    chains = {number: [number] for number in classes}
    for one, other in sorted(together, key=lambda link: (-together[link], link)):
        left, right = chains[one], chains[other]
        if left is right:
            continue
        if left.index(one) < len(left) / 2 - 0.5:
            left.reverse()
        if right.index(other) > len(right) / 2 - 0.5:
            right.reverse()
        left += right
        chains |= dict.fromkeys(right, left)
    ordered: dict[int, None] = {}
    for number in classes:
        if number not in ordered:
            ordered |= dict.fromkeys(chains[number])
    return list(ordered)


def cell_shares(pairs: dict[tuple[int, int], int], order: Sequence[int], cells: int) -> NDArray[np.float64]:
    """Percent of the images of a row's classes that were predicted as one of a column's: [cells, cells]; NaN in a row
    without images. With as many cells as classes, each has its own."""
    cell = {number: place * cells // len(order) for place, number in enumerate(order)}
    counts = np.zeros((cells, cells))
    for (truth, guess), count in pairs.items():
        counts[cell[truth], cell[guess]] += count
    images = counts.sum(axis=1, keepdims=True)
    return np.divide(100.0 * counts, images, out=np.full_like(counts, np.nan), where=images > 0)


def _draw_named(axis: Axes, pairs: dict[tuple[int, int], int], classes: Sequence[int], names: Sequence[str]) -> None:
    shares = cell_shares(pairs, classes, len(classes))
    _draw_cells(axis, shares)
    size = 10 if len(classes) <= WRITTEN else 8
    axis.set_xticks(range(len(classes)), names, rotation=90, fontsize=size)
    axis.set_yticks(range(len(classes)), names, fontsize=size)
    axis.set_xlabel("predicted (% of the row's images)")
    axis.set_ylabel("class")
    if len(classes) <= WRITTEN:
        for row, column in np.argwhere(shares >= 0.5):
            share = shares[row, column]
            colour = "white" if share > 35 else "black"
            axis.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8, color=colour)


def _draw_grouped(axis: Axes, pairs: dict[tuple[int, int], int], order: Sequence[int]) -> None:
    cells = min(CELLS, len(order))
    _draw_cells(axis, cell_shares(pairs, order, cells))
    axis.set_xticks([])
    axis.set_yticks([])
    most = -(-len(order) // cells)
    grouped = f"; a cell is {most} classes or fewer" if most > 1 else ""
    axis.set_xlabel("predicted, in the same order (% of the row's images)")
    axis.set_ylabel(f"classes, those taken for each other side by side{grouped}")


def _draw_cells(axis: Axes, shares: NDArray[np.float64]) -> None:
    """Percentages as colours, of which the lower ones get most: errors are rare, and what is looked for."""
    from matplotlib.colors import PowerNorm

    axis.set_facecolor("#d9dde3")  # rows without images
    image = axis.imshow(shares, cmap="Blues", norm=PowerNorm(0.4, 0, 100), interpolation="nearest", aspect="equal")
    bar = axis.figure.colorbar(image, ax=axis, fraction=0.045, pad=0.02, ticks=[0, 1, 5, 20, 50, 100])
    bar.ax.set_yticklabels(["0", "1", "5", "20", "50", "100 %"])


def _draw_pairs(axis: Axes, pairs: dict[tuple[int, int], int], names: Sequence[str] | None) -> None:
    """The most confused pairs as bars: percent of the first class's images that were predicted as the second."""
    images: dict[int, int] = {}
    for (truth, _), count in pairs.items():
        images[truth] = images.get(truth, 0) + count
    wrong = [(count / images[truth], truth, guess) for (truth, guess), count in pairs.items() if truth != guess]
    wrong = sorted(wrong, key=lambda pair: (-pair[0], pair[1:]))[:LISTED]
    texts = [f"{_short(class_name(a, names))} \N{RIGHTWARDS ARROW} {_short(class_name(b, names))}" for _, a, b in wrong]
    places = range(len(wrong))
    axis.barh(places, [100.0 * share for share, _, _ in wrong], color="#9ecae1", height=0.8)
    for place, ((share, _, _), text) in enumerate(zip(wrong, texts, strict=True)):
        axis.text(0.6, place, f"{100 * share:.0f}  {text}", va="center", ha="left", fontsize=8.5)
    axis.set_xlim(0, 100)
    axis.invert_yaxis()
    axis.axis("off")
    axis.set_title("taken for another most often (% of the class's images)", fontsize=10, loc="left")


def _short(name: str) -> str:
    """A name as it is drawn: without letters that no font has, and not too long. ``$`` would begin a formula."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in name).replace("$", r"\$")
    return plain if len(plain) <= _LETTERS else plain[: _LETTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"
