"""Figures of several files held against the first's: the numbers, and the table that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from eval.accuracy import bootstrap_interval
from eval.compare.likeness import paired
from eval.compare.means import (
    draw_interval,
    draw_p,
    query_interval,
    randomisation_p,
    spread_is_unknown,
    unpaired_query_interval,
)
from eval.compare.result_file import Result
from eval.compare.significance import discordant, holm, mcnemar, paired_interval, unpaired_interval
from eval.compare.typeset import Columns
from eval.figures import ALL, Figure, Unit
from eval.retrieval.benchmarks import mean_interval
from eval.table import Interval, percent, signed


@dataclass(frozen=True)
class Comparison:
    """A figure of one file, held against the first file's."""

    figure: str
    file: str
    percent: float
    interval: Interval | None
    """None: nobody has what it is the mean of."""
    unit: Unit
    """What it is the mean over."""
    units: int | None
    """How many of these."""
    difference: float | None = None
    """Percentage points above the first file's; None for the first file itself."""
    difference_interval: Interval | None = None
    only_first: int | None = None
    """Images or queries that the first file alone has right; None where they are not paired, or not right or wrong."""
    only_this: int | None = None
    p: float | None = None
    p_holm: float | None = None
    """Corrected for the number of tests among these comparisons."""
    unknown: str = ""
    """Of a mean over draws: why it, or its difference, has no interval."""


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
        rows.append(_row(first, figure))
        rows += [_against(first, figure, other, own) for other, own in partners]
    places = [place for place, row in enumerate(rows) if row.p is not None]
    corrected = holm([row.p for row in rows if row.p is not None])
    for place, value in zip(places, corrected, strict=True):
        rows[place] = replace(rows[place], p_holm=value)
    return rows


def columns(comparisons: Sequence[Comparison]) -> Columns:
    """The table."""
    several = sum(one.p is not None for one in comparisons) > 1
    accuracies = all(one.unit == "image" for one in comparisons)
    header = ["figure", "file", f"{'top-1 ' * accuracies}% [95%]", "difference [95%]"]
    counted = any(one.only_first is not None for one in comparisons) or accuracies
    header += ["only first right", "only this right"] * counted + ["p"] + ["p (Holm)"] * several
    rows = []
    named = ""
    for one in comparisons:
        new = one.difference is None or one.figure != named  # under --allow k, figures of other files have other names
        cells = [one.figure if new else "", one.file]
        named = one.figure
        cells += [percent(one.percent, one.interval), signed(one.difference, one.difference_interval)]
        if counted:
            cells += ["-" if count is None else f"{count:,}" for count in (one.only_first, one.only_this)]
        rows.append(cells + [_p(one.p)] + [_p(one.p_holm)] * several)
    return Columns(header, rows, left=2)


def notes(comparisons: Sequence[Comparison]) -> list[str]:
    """What has to be known to read the table."""
    tests = [one for one in comparisons if one.p is not None]
    lines = []
    for unit, plural in (("image", "images"), ("query", "queries")):
        if any(one.unit == unit and one.only_first is not None for one in tests):
            lines.append(
                "difference: to the first file, in points, interval by paired bootstrap; p: McNemar's exact test, "
                f"two-sided, on the {plural} that one of the two alone has right"
            )
    if any(one.unit == "query" and one.only_first is None for one in tests):
        lines.append(
            "means over queries: interval of the difference by paired bootstrap over the queries; p: Fisher's "
            "randomisation test, two-sided (each query's two values exchanged at random)"
        )
    if any(one.unit == "draw" for one in comparisons):
        lines.append(
            "means over draws: intervals and p by Student's t over the draws, the same training images in both files; "
            "they tell of other draws, not of other validation images"
        )
    if len(tests) > 1:
        lines.append(f"p (Holm): corrected for the {len(tests)} tests of this table; --figure WORDS leaves fewer")
    if any(one.units is None for one in comparisons):
        lines.append("no interval: the figure comes without its hits image by image")
    lines += [f"no interval: {why}" for why in dict.fromkeys(one.unknown for one in comparisons) if why]
    if any(one.difference_interval is not None and one.p is None for one in comparisons):
        lines.append("no p: the images are not paired; the interval of that difference resamples each file by itself")
    return lines


def _row(result: Result, figure: Figure) -> Comparison:
    row = Comparison(figure.name, result.label, figure.percent, _interval(figure), figure.unit, figure.units)
    if figure.unit == "draw" and figure.values is not None and spread_is_unknown(figure.values):
        return replace(row, unknown=_why_unknown(figure))
    return row


def _against(first: Result, figure: Figure, other: Result, own: Figure) -> Comparison:
    row = replace(_row(other, own), difference=own.percent - figure.percent)
    together = paired(first, other, figure, own)
    if figure.hits is not None and own.hits is not None:
        if not together:
            return replace(row, difference_interval=unpaired_interval(figure.hits, own.hits))
        only_first, only_this = discordant(figure.hits, own.hits)
        return replace(
            row,
            difference_interval=paired_interval(figure.hits, own.hits),
            only_first=only_first,
            only_this=only_this,
            p=mcnemar(only_first, only_this),
        )
    if figure.values is None or own.values is None:
        return row
    if figure.unit == own.unit == "query":
        if not together:
            return replace(row, difference_interval=unpaired_query_interval(figure.values, own.values))
        interval = query_interval(figure.values, own.values)
        return replace(row, difference_interval=interval, p=randomisation_p(figure.values, own.values))
    if not together:  # other draws: too few of each to say how far they are from each other
        return replace(row, unknown=row.unknown or "the two files drew other images, so that they are not paired")
    gains = own.values - figure.values
    if spread_is_unknown(gains):
        why = "all draws differ by the same, which does not tell by how much others would (more --draws may)"
        return replace(row, unknown=row.unknown or why)
    return replace(row, difference_interval=draw_interval(gains), p=draw_p(gains))


def _why_unknown(figure: Figure) -> str:
    if figure.settings.get("draws") == ALL:
        return "all training images were taken: there are no other draws; k-NN without few shots is compared by images"
    if figure.units == 1:
        return "there is one draw; --draws 5 has five"
    return "all draws have the same accuracy, which does not tell how far others would be (more --draws may)"


def _interval(figure: Figure) -> Interval | None:
    if figure.hits is not None:
        return bootstrap_interval(figure.hits)
    if figure.values is None:
        return None
    return draw_interval(figure.values) if figure.unit == "draw" else mean_interval(figure.values)


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"
