"""The images of a finished collection, found again in the sources it was made of. N images.

The card tells which rows are of which source: as many as it had images, without those that could not be read. Within a
source an image is found by its name, never by its number, which those that were left out have shifted.
"""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dino_xcit.data import Source, decode, open_source
from dino_xcit.data.source import Item, hash_lines
from dino_xcit.errors import InputError
from eval.collection.card import data_of, images_in, url_of


class CollectedImages:
    """A source of a collection's images, in the order of its rows."""

    def __init__(self, parts: Sequence[Source], places: NDArray[np.int64]) -> None:
        """``places`` [N, 2]: which part, and which image of it."""
        self.parts, self._places = parts, places
        self.url = ", ".join(part.url for part in parts)
        self.classes: tuple[str, ...] | None = None
        self.labels: NDArray[np.int64] | None = None
        named = [part.classes for part in parts if part.classes is not None]
        if len(named) == len(parts):  # classes of one name are one class, whichever part they come from
            self.classes = tuple(sorted({name for classes in named for name in classes}))
            number = {name: label for label, name in enumerate(self.classes)}
            relabelled = [
                np.array([number[name] for name in classes], dtype=np.int64)[part.labels]
                for part, classes in zip(parts, named, strict=True)
            ]
            self.labels = np.array([relabelled[part][row] for part, row in places.tolist()], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._places)

    def read(self, index: int) -> tuple[Item, int | None]:
        part, row = self._places[index].tolist()
        return self.parts[part].read(row)[0], None if self.labels is None else int(self.labels[index])

    def name(self, index: int) -> str:
        part, row = self._places[index].tolist()
        return self.parts[part].name(row)

    def fingerprint(self) -> str:
        return hash_lines([*(part.fingerprint() for part in self.parts), repr(self._places.tolist())])


def images_of(card: Mapping[str, Any], names: Sequence[str]) -> CollectedImages | None:
    """The images of a collection, if every one is still there under its name; else None.

    They are found by their names, so that one that was replaced since goes unseen here: see :func:`changed_since`.

    Args:
        card: the collection's.
        names: [N], as it has them.
    """
    parts: list[Source] = []
    places: list[tuple[int, int | None]] = []
    for number, (data, rows) in enumerate(_parts_of(card, range(len(names)))):
        source = _opened(data)
        if source is None:
            return None
        found = _find(source, data, [names[row] for row in rows])
        if None in found:
            return None
        parts.append(source)
        places += [(number, place) for place in found]
    return CollectedImages(parts, np.array(places, dtype=np.int64).reshape(-1, 2))


def changed_since(card: Mapping[str, Any], images: CollectedImages) -> list[str]:
    """URLs of the sources that are not as they were when their vectors were made: images came, went or were replaced.

    It looks at every file's size and time. A fingerprint is of a place as it was typed: of a relative one nothing can
    be told from another folder, and it is passed over.

    Args:
        card: the collection's.
        images: what :func:`images_of` found for it.
    """
    return [
        str(data["url"])
        for data, part in zip(data_of(card), images.parts, strict=True)
        if _opened_from(data) == data["url"] and part.fingerprint() != data["fingerprint"]
    ]


def pictures_of(card: Mapping[str, Any], names: Sequence[str], rows: Iterable[int]) -> dict[int, Image.Image | None]:
    """Some images of a collection by their rows; None for one that is not there or cannot be read any more.

    Args:
        card: the collection's.
        names: [N], as it has them.
    """
    wanted: dict[int, Image.Image | None] = dict.fromkeys(sorted(set(rows)))
    for data, some in _parts_of(card, list(wanted)):
        in_source = []
        for row in some:
            # Where names are paths, a file is the image: no folder of millions has to be listed for ten of them.
            if _is_path(data["url"]) and (path := Path(_base(data), names[row])).is_file():
                with contextlib.suppress(InputError, OSError):
                    wanted[row] = decode(path.read_bytes(), names[row])
            else:
                in_source.append(row)
        source = _opened(data) if in_source else None
        if source is None:
            continue
        for row, place in zip(in_source, _find(source, data, [names[row] for row in in_source]), strict=True):
            if place is not None:
                with contextlib.suppress(InputError, OSError):
                    wanted[row] = decode(source.read(place)[0], names[row])
    return wanted


def _parts_of(card: Mapping[str, Any], rows: Sequence[int]) -> Iterator[tuple[Mapping[str, Any], Sequence[int]]]:
    """Each source's data card, with those of the rows (ascending) that are of its images."""
    start = 0
    for data in data_of(card):
        stop = start + images_in(data)
        yield data, rows[bisect_left(rows, start) : bisect_left(rows, stop)]
        start = stop


def _find(source: Source, data: Mapping[str, Any], names: Sequence[str]) -> list[int | None]:
    """For each name, as a collection has it, its number in the source; None where it is not there."""
    # A source of files may name them from another folder than the collection does, which has the names that the
    # source had when it was extracted, perhaps relative to where that was.
    wanted = {os.path.normpath(name) for name in names}
    wanted |= {os.path.normpath(os.path.join(_base(data), name)) for name in names}
    places: dict[str, int] = {}
    for place in range(len(source)):
        name = os.path.normpath(source.name(place))
        if name in wanted:
            places.setdefault(name, place)
    ways = ((os.path.normpath(name), os.path.normpath(os.path.join(_base(data), name))) for name in names)
    return [next((places[way] for way in both if way in places), None) for both in ways]


def _opened(data: Mapping[str, Any]) -> Source | None:
    try:
        return open_source(_opened_from(data))
    except InputError:
        return None


def _opened_from(data: Mapping[str, Any]) -> str:
    """As it was typed where that leads to the same place."""
    return str(data["url"]) if data.get("names_start_from") == os.getcwd() else url_of(data)


def _base(data: Mapping[str, Any]) -> str:
    """The folder from which relative names of this source start."""
    return str(data.get("names_start_from") or ".")


def _is_path(url: str) -> bool:
    """Whether a source's URL is a folder's or a list's, whose names are paths of files."""
    return ":" not in url.partition("/")[0]
