"""From what was measured to a table and figures: the arithmetic of benchmarks/step.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from step_turns import Measured

PEAK_FLOPS = 2 * 2048**3
"""Of the product of two 2048 x 2048 matrices."""


@dataclass(frozen=True)
class Spread:
    """The median over the rounds, and the least and the greatest."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value a round."""
        return cls(median(values), min(values), max(values))

    def text(self, digits: int = 2) -> str:
        """``median (least - greatest)``."""
        return f"{self.median:.{digits}f} ({self.least:.{digits}f} - {self.greatest:.{digits}f})"


def ratio(slower: Measured, faster: Measured) -> Spread:
    """How many times the images a second of ``slower`` the ``faster`` has, round by round."""
    return Spread.of(
        [
            (theirs / slower.batch) / (own / faster.batch)
            for theirs, own in zip(slower.seconds, faster.seconds, strict=True)
        ]
    )


@dataclass(frozen=True)
class Line:
    """A pipeline's line of the table."""

    measured: Measured
    step: Spread
    """Seconds."""
    images_per_s: float
    flops_per_s: float
    of_peak: float | None
    """Share of what a large product reaches in this precision; None: not measured."""
    speed: Spread | None
    """Images a second over the baseline's."""
    memory: float | None
    """Peak memory over the baseline's, both as a whole."""
    memory_above_imports: float | None
    """The same without what each had before it built anything."""


def line_of(
    measured: Measured,
    flops: float,
    peaks: Mapping[str, float],
    baseline: Measured | None,
    baseline_memory: Measured | None,
) -> Line:
    """A line.

    Args:
        flops: the work of an image, the same for all pipelines.
        peaks: floating-point operations a second of a large product, by precision.
        baseline: what the speed is held against.
        baseline_memory: what the memory is held against.
    """
    step = Spread.of(measured.seconds)
    images_per_s = measured.batch / step.median
    per_s = flops * images_per_s
    peak = peaks.get(measured.row.precision)
    memory = above = None
    if baseline_memory:
        memory = measured.peak / baseline_memory.peak
        above = (measured.peak - measured.imports) / (baseline_memory.peak - baseline_memory.imports)
    speed = ratio(baseline, measured) if baseline else None
    return Line(measured, step, images_per_s, per_s, per_s / peak if peak else None, speed, memory, above)


HEADER = (
    f"{'':34s} {'img/s':>8s}  {'s a step':^22s} {'GFLOP/s':>9s} {'of peak':>8s} {'peak MB':>9s} {'imports':>8s} "
    f"{'memory':>7s}  {'speed':^21s} {'first step: cold / warm':>25s}"
)


def text_of(line: Line) -> str:
    """One line for the screen."""
    measured = line.measured
    share = f"{line.of_peak:.0%}" if line.of_peak is not None else "-"
    memory = f"{line.memory:.2f}" if line.memory is not None else "-"
    speed = line.speed.text() if line.speed else "-"
    cold = f"{measured.cold_start:.1f} / " if measured.cold_start is not None else ""
    return (
        f"{measured.row.title:34s} {line.images_per_s:8.3g}  {line.step.text(3):^22s} {line.flops_per_s / 1e9:9.1f} "
        f"{share:>8s} {measured.peak / 1e6:9.0f} {measured.imports / 1e6:8.0f} {memory:>7s}  {speed:^21s} "
        f"{cold + f'{measured.first_step:.1f} s':>25s}"
    )


def json_of(line: Line) -> dict[str, Any]:
    """The same for the JSON line."""
    measured = line.measured
    values: dict[str, Any] = {
        "batch": measured.batch,
        "img_per_s": round(line.images_per_s, 4),
        "step_s": [round(value, 5) for value in (line.step.median, line.step.least, line.step.greatest)],
        "gflop_per_s": round(line.flops_per_s / 1e9, 2),
        "peak_MB": round(measured.peak / 1e6, 1),
        "imports_MB": round(measured.imports / 1e6, 1),
        "first_step_s": round(measured.first_step, 3),
    }
    if line.of_peak is not None:
        values["share_of_peak"] = round(line.of_peak, 4)
    if line.speed:
        values["ratio"] = [round(value, 3) for value in (line.speed.median, line.speed.least, line.speed.greatest)]
    if line.memory is not None and line.memory_above_imports is not None:
        values["memory_ratio"] = round(line.memory, 4)
        values["memory_ratio_above_imports"] = round(line.memory_above_imports, 4)
    if measured.cold_start is not None:
        values["cold_start_s"] = round(measured.cold_start, 3)
    values["core_while_waiting"] = round(measured.waiting, 4)
    if measured.helpers:
        values["helpers_MB"] = round(measured.helpers / 1e6, 1)
    return values


def peaks_of(measured: Sequence[Measured]) -> dict[str, float]:
    """Floating-point operations a second of the large product, by precision: the median of the rounds."""
    products = [found for found in measured if found.row.project == "peak"]
    return {found.row.precision: PEAK_FLOPS / median(found.seconds) for found in products}
