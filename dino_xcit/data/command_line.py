"""Command lines of ``python -m dino_xcit.data``: words in any order, mistakes as one sentence."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from dino_xcit.errors import InputError


class CommandLine(argparse.ArgumentParser):
    """An argument parser whose complaints are :class:`InputError`; flags with dashes or underscores."""

    def __init__(self, usage: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            usage=usage,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self._expected = usage

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; expected: {self._expected} (--help says more)")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The values of a command line.

        Raises:
            InputError: a word that has no place, or no value of its flag, or a flag that is given twice.
        """
        words = [_with_dashes(word) for word in argv]
        names = [word.partition("=")[0] for word in words if word.startswith("--")]
        again = next((name for name in names if names.count(name) > 1), None)
        if again:
            raise InputError(f"{again} is given twice: give it once")
        return self.parse_args(words)


def _with_dashes(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def count(text: str) -> int:
    """A whole number of at least 1, as ``type=`` of a flag."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def whole_number(text: str) -> int:
    """A whole number from 0, as ``type=`` of a flag."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 0")
    return int(text)
