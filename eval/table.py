"""Text and Markdown tables."""

from __future__ import annotations

import re
from collections.abc import Sequence

Interval = tuple[float, float]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Format rows below a header; the first ``left`` columns are left-aligned, the others right-aligned."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Format like :func:`table` in GitHub Markdown."""
    rules = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rules, *([*map(escaped, row)] for row in rows)))


def escaped(text: str) -> str:
    """Escape Markdown's special characters."""
    return re.sub(r"([\\`*_<>|])", r"\\\1", text)


def percent(value: float | None, interval: Interval | None = None) -> str:
    """Format ``82.3 [80.9, 83.6]``; ``-`` for None."""
    if value is None:
        return "-"
    return f"{value:.1f}" + ("" if interval is None else f" [{interval[0]:.1f}, {interval[1]:.1f}]")


def signed(value: float | None, interval: Interval | None = None) -> str:
    """Format ``+0.7 [-0.2, +1.6]``; ``-`` for None."""
    if value is None:
        return "-"
    return f"{value:+.1f}" + ("" if interval is None else f" [{interval[0]:+.1f}, {interval[1]:+.1f}]")
