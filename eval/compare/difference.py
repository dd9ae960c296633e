"""What makes two results unlike, and its sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from eval.compare.result_file import shown


@dataclass(frozen=True)
class Difference:
    """Something that makes two figures unlike."""

    name: str
    """What ``--allow`` calls it."""
    clause: str
    """What differs: ``crop 224 -> 28``."""
    allowable: bool = True


def changed(then: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """``name then -> now`` for each value that differs, sorted by name."""
    return [
        f"{key} {shown(then.get(key))} -> {shown(now.get(key))}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]
