"""Command lines of tests: a common beginning, and what one test wants otherwise."""

from __future__ import annotations

from collections.abc import Sequence


def last_words(words: Sequence[object]) -> list[str]:
    """Of a flag that comes several times the last: the commands themselves refuse that."""
    groups: dict[str, list[str]] = {}
    group = groups.setdefault("", [])
    for word in map(str, words):
        if word.startswith("--"):
            name = word.partition("=")[0].replace("_", "-").replace("--no-", "--")
            groups.pop(name, None)
            group = groups.setdefault(name, [])
        group.append(word)
    return [word for group in groups.values() for word in group]
