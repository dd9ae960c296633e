"""Keys of a file, which may be of any length and hold anything, as a few words of one line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def shown(keys: Iterable[object]) -> str:
    """Keys in one line, each cut short and without letters that a screen would obey."""
    return ", ".join("".join(c if c.isprintable() else "?" for c in str(key)[:80]) for key in keys)


def first(keys: Sequence[object], count: int) -> str:
    """The first so many keys, and how many more there are."""
    return f"{shown(keys[:count])}{f' and {len(keys) - count} more' if len(keys) > count else ''}"
