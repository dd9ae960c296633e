"""Command lines of the evaluators: DINO's names, words without a flag, and flags that are given several times."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol, TypeVar, get_origin, get_type_hints

from dino_xcit.cli import parse

_DINO_NAMES = {
    "pretrained_weights": "weights",
    "checkpoint_key": "network",
    "nb_knn": "ks",
    "temperature": "temperatures",
    "batch_size": "batch_size_per_gpu",
    "imsize": "image_size",
    "distractors_path": "distractors",
}
"""What DINO's evaluators (and habit) call a setting, to its name here."""


class Checked(Protocol):
    """Settings that know whether they can be."""

    def check(self) -> None: ...


Config = TypeVar("Config", bound=Checked)


def settings(config: type[Config], argv: Sequence[str], prog: str, positional: str = "") -> Config:
    """A runner's settings from its command line, under this project's names or DINO's.

    Args:
        positional: the setting that words without a flag belong to.

    Raises:
        InputError: an unknown flag, or a value that cannot be.
    """
    words = _rename(argv, config)
    if positional:
        words = _name_loose_words(words, config, positional)
    for name in filter(None, ("query", positional)):
        words = _gather(words, name)
    found = parse(config, words, prog)
    found.check()
    return found


def _name_loose_words(argv: Sequence[str], config: type, positional: str) -> list[str]:
    """``a --flag value b`` as ``--flag value --positional a b``. A flag of several values takes all words after it."""
    hints = get_type_hints(config)
    loose: list[str] = []
    rest: list[str] = []
    room = 0
    for token in argv:
        if token.startswith("--") or token == "-h":  # not -1: that is a value
            name, equals, _ = token.lstrip("-").partition("=")
            hint = hints.get(name.replace("-", "_"), str)
            several = len(argv) if get_origin(hint) is tuple else 1
            room = 0 if equals or hint is bool else several
            rest.append(token)
        elif room:
            rest.append(token)
            room -= 1
        else:
            loose.append(token)
    return [*rest, f"--{positional}", *loose] if loose else rest


def _rename(argv: Sequence[str], config: type) -> list[str]:
    known = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    out = []
    for token in argv:
        name, equals, value = token.partition("=")
        ours = _DINO_NAMES.get(name.removeprefix("--").replace("-", "_"), "") if name.startswith("--") else ""
        out.append(f"--{ours}{equals}{value}" if ours in known else token)
    return out


def _gather(argv: list[str], flag: str) -> list[str]:
    """``--flag a --flag b`` as ``--flag a b``: elsewhere giving a flag twice is a mistake, here every one is wanted."""
    words: list[str] = []
    rest: list[str] = []
    taking = False
    for token in argv:
        if token.startswith("--"):
            name, _, value = token.partition("=")
            taking = name == f"--{flag}"
            if taking:
                words += [value] if value else []
                continue
        (words if taking else rest).append(token)
    return [*rest, f"--{flag}", *words] if words else argv
