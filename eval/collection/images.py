"""The images of a finished collection, found again in the sources it was made of. N images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino_xcit.data import Source, open_source
from dino_xcit.data.source import Item, hash_lines
from dino_xcit.errors import InputError
from eval.collection.card import data_of


class CollectedImages:
    """A source of a collection's images, in the order of its rows."""

    def __init__(self, parts: Sequence[Source], places: NDArray[np.int64]) -> None:
        """``places`` [N, 2]: which part, and which image of it."""
        self._parts, self._places = parts, places
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
        return self._parts[part].read(row)[0], None if self.labels is None else int(self.labels[index])

    def name(self, index: int) -> str:
        part, row = self._places[index].tolist()
        return self._parts[part].name(row)

    def fingerprint(self) -> str:
        return hash_lines([*(part.fingerprint() for part in self._parts), repr(self._places.tolist())])


def images_of(card: Mapping[str, Any], names: Sequence[str]) -> CollectedImages | None:
    """The images of a collection, if every one is still there under its name; else None.

    Args:
        card: the collection's.
        names: [N], as it has them.
    """
    parts: list[Source] = []
    found: dict[str, tuple[int, int]] = {}
    bases = []
    for data in data_of(card):
        try:
            source = open_source(str(data.get("absolute_url", data["url"])))
        except InputError:
            return None
        for row in range(len(source)):
            found.setdefault(os.path.normpath(source.name(row)), (len(parts), row))
        bases.append(str(data.get("names_start_from", ".")))
        parts.append(source)
    places = []
    for name in names:
        # Relative names start from the folder in which their part was extracted.
        ways = (os.path.normpath(os.path.join(base, name)) for base in ("", *bases))
        place = next((found[way] for way in ways if way in found), None)
        if place is None:
            return None
        places.append(place)
    return CollectedImages(parts, np.array(places, dtype=np.int64).reshape(-1, 2))
