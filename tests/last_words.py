"""Command lines of tests: a common beginning, and what one test wants otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from dino_xcit.cli import replace_flags


def last_words(words: Sequence[object]) -> list[str]:
    """Of a flag that comes several times the last: the commands themselves refuse that."""
    kept: list[str] = []
    group: list[str] = []
    for word in map(str, words):
        if word.startswith("--"):
            kept, group = replace_flags(kept, group), []
        group.append(word)
    return replace_flags(kept, group)
