"""Figures of several files held against the first's: the numbers, and the table that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from eval.accuracy import bootstrap_interval
from eval.compare.likeness import paired
from eval.compare.result_file import Result
from eval.compare.significance import discordant, holm, mcnemar, paired_interval, unpaired_interval
from eval.figures import Figure
from eval.table import Interval, percent, signed, table


@dataclass(frozen=True)
class Comparison:
    """A figure of one file, held against the first file's."""

    figure: str
    file: str
    top1: float
    interval: Interval | None
    """None: nobody has its hits."""
    difference: float | None = None
    """Percentage points above the first file's; None for the first file itself."""
    difference_interval: Interval | None = None
    only_first: int | None = None
    """Images that the first file alone has right; None where images are not paired."""
    only_this: int | None = None
    p: float | None = None
    p_holm: float | None = None
    """Corrected for the number of tests among these comparisons."""


def compare(
    first: Result, others: Sequence[tuple[Result, Sequence[tuple[Figure, Figure]]]], baselines: bool = False
) -> list[Comparison]:
    """A row a figure and file, the first file's before the others'.

    Args:
        others: each with the pairs of the first's figures and its own that are alike.
        baselines: also figures of baselines, such as raw pixels, which do not depend on the weights.
    """
    rows = []
    for figure in first.figures:
        partners = [(other, own) for other, pairs in others for mine, own in pairs if mine is figure]
        if not partners or (figure.baseline and not baselines):
            continue
        rows.append(Comparison(figure.name, first.label, figure.top1, _interval(figure)))
        rows += [_against(first, figure, other, own) for other, own in partners]
    places = [place for place, row in enumerate(rows) if row.p is not None]
    corrected = holm([row.p for row in rows if row.p is not None])
    for place, value in zip(places, corrected, strict=True):
        rows[place] = replace(rows[place], p_holm=value)
    return rows


def report(comparisons: Sequence[Comparison]) -> str:
    """The table, and what has to be known to read it."""
    tests = sum(one.p is not None for one in comparisons)
    header = ["figure", "file", "top-1 % [95%]", "difference [95%]", "only first right", "only this right", "p"]
    rows = []
    named = ""
    for one in comparisons:
        new = one.difference is None or one.figure != named  # under --allow k, figures of other files have other names
        cells = [one.figure if new else "", one.file]
        named = one.figure
        cells += [percent(one.top1, one.interval), signed(one.difference, one.difference_interval)]
        cells += ["-" if count is None else f"{count:,}" for count in (one.only_first, one.only_this)]
        cells += [_p(one.p), *([_p(one.p_holm)] if tests > 1 else [])]
        rows.append(cells)
    text = table(header + ["p (Holm)"] * (tests > 1), rows, left=2)
    if tests:
        text += (
            "\ndifference: to the first file, in points, interval by paired bootstrap; p: McNemar's exact test, "
            "two-sided, on the images that one of the two alone has right"
        )
    if tests > 1:
        text += f"\np (Holm): corrected for the {tests} tests of this table; --figure WORDS leaves fewer"
    if any(one.interval is None for one in comparisons):
        text += "\nno interval: the figure comes without its hits image by image"
    if any(one.difference_interval is not None and one.p is None for one in comparisons):
        text += "\nno p: the images are not paired; the interval of that difference resamples each file by itself"
    return text


def _against(first: Result, figure: Figure, other: Result, own: Figure) -> Comparison:
    row = Comparison(own.name, other.label, own.top1, _interval(own), own.top1 - figure.top1)
    if figure.hits is None or own.hits is None:
        return row
    if not paired(first, other):
        return replace(row, difference_interval=unpaired_interval(figure.hits, own.hits))
    only_first, only_this = discordant(figure.hits, own.hits)
    return replace(
        row,
        difference_interval=paired_interval(figure.hits, own.hits),
        only_first=only_first,
        only_this=only_this,
        p=mcnemar(only_first, only_this),
    )


def _interval(figure: Figure) -> Interval | None:
    return None if figure.hits is None else bootstrap_interval(figure.hits)


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"
