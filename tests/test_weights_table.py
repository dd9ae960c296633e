"""docs/checkpoints.md names every layout that is read, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from dino_xcit.weights.stored_network import Layout

TEXT = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text()


def said_as() -> list[str]:
    """The second column of the table of layouts."""
    table = TEXT.partition("## Layouts")[2].partition("## Architectures")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    assert rows[0][:2] == ["written by", "said as"]
    return [row[1] for row in rows[2:]]


def test_the_table_names_every_layout_and_no_other() -> None:
    assert set(said_as()) == set(Layout)


def test_what_is_said_to_be_left_aside_is_what_the_code_leaves_aside() -> None:
    from dino_xcit.weights.fit import _CLASSIFIERS, _OF_TRAINING

    paragraph = TEXT.partition("Left aside, and said:")[2].partition("\n\n")[0]
    named = set(re.findall(r"`([\w.]+)`", paragraph))
    for key in (*_CLASSIFIERS, *_OF_TRAINING):
        shown = key.startswith("decoder_") and "decoder_..." in named
        assert shown or {key, key.rstrip(".")} & named, key
