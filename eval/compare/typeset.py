"""A table for the screen, for a Markdown document, or for a LaTeX paper."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from eval.table import table

Style = Literal["text", "markdown", "latex"]

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "|": "$|$",
}  # fmt: skip
_MINUS = re.compile(r"(?<![\w-])-(?=\d)")


@dataclass(frozen=True)
class Columns:
    """Cells below a header, the first ``left`` columns flush left, the others flush right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


def typeset(columns: Columns, style: Style) -> str:
    """The table as lines of text, as GitHub's Markdown, or as a LaTeX tabular (package booktabs)."""
    if style == "text":
        return table(columns.header, columns.rows, columns.left)
    return _markdown(columns) if style == "markdown" else _latex(columns)


def aside(line: str, style: Style) -> str:
    """A line beside the table: in LaTeX a comment, so that the whole may be read in with \\input."""
    if style == "latex":
        return f"% {line}"
    return f"- {_in_markdown(line)}" if style == "markdown" else line


def _markdown(columns: Columns) -> str:
    rules = ["---" if place < columns.left else "---:" for place in range(len(columns.header))]
    rows = [[_in_markdown(cell) for cell in row] for row in (columns.header, *columns.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rules, *rows[1:]))


def _in_markdown(cell: str) -> str:
    return re.sub(r"([\\`*_<>|])", r"\\\1", cell)


def _latex(columns: Columns) -> str:
    shape = "l" * columns.left + "r" * (len(columns.header) - columns.left)
    rows = [" & ".join(map(_in_latex, row)) + r" \\" for row in (columns.header, *columns.rows)]
    return "\n".join([rf"\begin{{tabular}}{{{shape}}}", r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule",
                      r"\end{tabular}"])  # fmt: skip


def _in_latex(cell: str) -> str:
    return _MINUS.sub("$-$", "".join(_LATEX.get(letter, letter) for letter in cell))
