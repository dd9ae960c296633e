"""What run_knn.py says on the screen: its tables and its notices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino_xcit.data import Source
from dino_xcit.errors import printable
from eval.knn.confusion import class_name
from eval.knn.few_shot import short_classes, takes_all
from eval.table import percent, table

Record = Mapping[str, Any]

_NAMES_SHOWN = 5
"""Of images that could not be read."""


def results_table(records: Sequence[Record]) -> str:
    """A row a model, k and T, with the recall of the search where it was approximate."""
    recall = any("recall" in record for record in records)
    header = ["model", "k", "T", "top-1 % [95% interval]", "top-5 % [95% interval]"]
    rows = [
        [
            record["model"],
            str(record["k"]),
            f"{record['temperature']:g}",
            percent(record["top1"], record["top1_interval"]),
            percent(record["top5"], record["top5_interval"]),
            *([f"{record['recall']:.1f}"] if recall else []),
        ]
        for record in records
    ]
    return table([*header, *(["recall@k %"] if recall else [])], rows)


def few_shot_table(records: Sequence[Record], draws: int) -> str:
    """A row a model, number of images a class, k and T: mean and deviation over the draws."""
    over = f"{draws} draws, mean ± deviation" if draws > 1 else "one draw"
    header = ["model", "images a class", "k", "T", f"top-1 % ({over})", "top-5 %"]
    rows = [
        [
            record["model"],
            str(record["shots"]),
            str(record["k"]),
            f"{record['temperature']:g}",
            _spread(record["top1"], record["top1_deviation"]),
            _spread(record["top5"], record["top5_deviation"]),
        ]
        for record in records
    ]
    return table(header, rows)


def short_classes_notices(
    labels: NDArray[np.int64] | None, names: Sequence[str] | None, shots: Sequence[int]
) -> list[str]:
    """A sentence for each number of images a class that some class has fewer of, or that no class has more of."""
    notices = []
    for count in shots:
        if labels is None:
            continue
        short = short_classes(labels, count)
        if short:
            number, least = min(short, key=lambda pair: pair[1])
            which = f"{len(short)} classes have" if len(short) > 1 else "1 class has"
            notices.append(
                f"{which} fewer than {count} training images (the least: {printable(class_name(number, names))} with "
                f"{least}): all that there are were used"
            )
        if takes_all(labels, count):
            notices.append(
                f"few-shot {count} takes all {len(labels):,} training images, as no class has more: every draw is the "
                "same, so it was measured once, and has no deviation"
            )
    return notices


def unreadable_notices(meant: str, source: Source, numbers: NDArray[np.int64]) -> list[str]:
    """A sentence, where images of a source could not be read.

    Args:
        meant: ``training`` or ``validation``.
        numbers: of those images.
    """
    if not len(numbers):
        return []
    names = ", ".join(printable(source.name(int(number))) for number in numbers[:_NAMES_SHOWN])
    more = " ..." if len(numbers) > _NAMES_SHOWN else ""
    return [f"{len(numbers):,} of {len(source):,} {meant} images could not be read and are left out: {names}{more}"]


def _spread(mean: float | None, deviation: float | None) -> str:
    """``61.2 ± 1.3``; ``-`` for a figure that means nothing."""
    return percent(mean) + ("" if deviation is None else f" ± {deviation:.1f}")
