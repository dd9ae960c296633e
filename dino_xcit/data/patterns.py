"""Many files by one pattern: ranges and choices in braces, and wildcards."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dino_xcit.data import files
from dino_xcit.errors import InputError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

MOST_NAMES = 1_000_000
"""A pattern may stand for so many files."""

_MOST_BRACES = 50
_BRACES = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}|\{([^{}]*,[^{}]*)\}")


def expand(pattern: str) -> list[str]:
    """The files that a pattern names, sorted.

    Args:
        pattern: a path or URL with ranges in braces (``{000..146}``, with as many digits as are written), choices in
            braces (``{train,val}``) and the wildcards ``*``, ``?`` and ``[abc]`` (in ``http`` URLs ``?`` is itself).
            A local file of exactly that name is taken as it is.

    Returns:
        Paths, absolute where they are local.

    Raises:
        InputError: nothing matches a wildcard, or a file that is named without one is missing.
    """
    if not files.is_remote(pattern):
        pattern = os.path.abspath(os.path.expanduser(pattern))
        if os.path.isfile(pattern):
            return [pattern]
    if pattern.count("{") > _MOST_BRACES:
        raise InputError(f"{pattern[:60]!r}... has more than {_MOST_BRACES} braces: expected fewer; use wildcards")
    names = list(itertools.islice(_alternatives(pattern), MOST_NAMES + 1))
    if len(names) > MOST_NAMES:
        raise InputError(f"{pattern!r} stands for more than {MOST_NAMES:,} files: expected fewer; check its braces")
    plain = sorted({name for name in names if not _has_wildcard(name)})
    missing = _first_missing(plain)
    if missing is not None:
        if not files.is_remote(missing) and os.path.exists(missing):
            if os.path.isdir(missing):
                raise InputError(f"{missing} is a folder: expected files, or a pattern of them such as {missing}/*")
            files.stamp(missing)  # says what it is instead of a file
        if files.is_remote(missing) and missing == pattern:
            files.stamp(missing)  # says what its server says
        of = "" if missing == pattern else f", which {pattern!r} names"
        raise InputError(f"there is no file {missing}{of}: check the path, or the range in its braces")
    matched = [path for name in names if _has_wildcard(name) for path in _match(name)]
    return sorted({*plain, *matched})


def _alternatives(pattern: str) -> Iterator[str]:
    """A pattern with one choice made in each of its braces, in every way."""
    braces = _BRACES.search(pattern)
    if braces is None:
        yield pattern
        return
    first, last, listed = braces.groups()
    choices: Iterator[str]
    if listed is not None:
        choices = iter(listed.split(","))
    else:
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        lower, upper = sorted((int(first), int(last)))
        choices = (str(number).zfill(width) for number in range(lower, upper + 1))
    for choice in choices:
        yield from _alternatives(pattern[: braces.start()] + choice + pattern[braces.end() :])


def _has_wildcard(name: str) -> bool:
    return any(letter in name for letter in ("*[" if name.startswith(("http://", "https://")) else "*?["))


def _match(name: str) -> list[str]:
    """The files that a name with wildcards stands for."""
    if not files.is_remote(name):
        found = [path for path in glob.iglob(name, recursive=True) if not os.path.isdir(path)]
    elif "::" in name:
        raise InputError(
            f"{name!r} has a wildcard and a chain of file systems: name the files by braces ({{000..146}})"
        )
    else:
        found = files.ask(name, _match_remote)
    if not found:
        raise InputError(f"no file matches {name!r}: check the path and the wildcards")
    return found


def _match_remote(system: AbstractFileSystem, inner: str) -> list[str]:
    system.invalidate_cache()  # a listing from before may be out of date
    try:
        found = system.glob(inner, detail=True)
    except FileNotFoundError:
        return []
    return [str(system.unstrip_protocol(path)) for path, info in found.items() if info.get("type") != "directory"]


def _first_missing(paths: list[str]) -> str | None:
    """The first of some paths at which there is no file; any other trouble with them is raised."""
    there = files.of_each(files.is_file, paths)
    return next((path for path, found in zip(paths, there, strict=True) if not found), None)
