"""paths.txt of a collection: one name a line, whatever letters it has."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def escape(name: str) -> str:
    """A name on one line: backslash, line feed and carriage return as in a Python string."""
    return name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


def unescape(line: str) -> str:
    """The inverse of :func:`escape`."""
    parts = line.split("\\\\")
    return "\\".join(part.replace("\\n", "\n").replace("\\r", "\r") for part in parts)


def read_names(path: Path) -> list[str]:
    """The names in a ``paths.txt``, one a row of the vectors."""
    # Not splitlines(): that would also split at characters which are legal in names.
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    return [unescape(line) for line in text.split("\n")[:-1]]


def write_names(path: Path, names: Iterable[str]) -> None:
    """Write a ``paths.txt``; flushed to the disk."""
    with open(path, "wb") as file:
        for name in names:
            file.write(escape(name).encode("utf-8", "surrogateescape") + b"\n")
        file.flush()
        os.fsync(file.fileno())
