"""Tables for the screen, for Markdown and for LaTeX."""

from __future__ import annotations

from eval.compare.typeset import Columns, aside, typeset

COLUMNS = Columns(["figure", "% [95%]"], [["k_1 a|b", "-0.2 [-1.2, +0.7]"], ["x & {y}", "< 0.0001"]], left=1)


def test_text_is_the_project_s_own_table() -> None:
    assert typeset(COLUMNS, "text").split("\n")[2] == "k_1 a|b  -0.2 [-1.2, +0.7]"


def test_markdown_has_a_rule_below_its_header_and_no_cell_breaks_it() -> None:
    assert typeset(COLUMNS, "markdown").split("\n") == [
        "| figure | % [95%] |",
        "| --- | ---: |",
        r"| k\_1 a\|b | -0.2 [-1.2, +0.7] |",
        r"| x & {y} | \< 0.0001 |",
    ]


def test_latex_is_escaped_and_has_minus_signs() -> None:
    lines = typeset(COLUMNS, "latex").split("\n")
    assert lines[0] == r"\begin{tabular}{lr}"
    assert lines[2] == r"figure & \% [95\%] \\"
    assert lines[4] == r"k\_1 a$|$b & $-$0.2 [$-$1.2, +0.7] \\"
    assert lines[5] == r"x \& \{y\} & $<$ 0.0001 \\"
    assert lines[-1] == r"\end{tabular}"


def test_words_with_a_hyphen_keep_it_in_latex() -> None:
    assert "top-1 & a-2.json" in typeset(Columns(["top-1", "a-2.json"], []), "latex")


def test_what_stands_beside_the_table_is_a_comment_in_latex_and_a_list_in_markdown() -> None:
    assert [aside("see 100 % of a_b", style) for style in ("text", "markdown", "latex")] == [
        "see 100 % of a_b",
        r"- see 100 % of a\_b",
        "% see 100 % of a_b",
    ]
