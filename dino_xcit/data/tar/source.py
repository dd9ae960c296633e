"""Images in tar archives, such as WebDataset's shards: ``tar:PATTERN``. Read in any order, and never extracted."""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino_xcit.data import files
from dino_xcit.data.index import Index, Strings, cached
from dino_xcit.data.patterns import expand
from dino_xcit.data.source import MOST_CLASSES, Item, hash_lines
from dino_xcit.data.tar.members import BLOCK
from dino_xcit.data.tar.samples import MOST_IMAGE_BYTES, Label, Shard, look_through
from dino_xcit.errors import InputError
from dino_xcit.runtime.logging import progress_bar

_AT_ONCE = 8
"""Local shards that are looked through together: Python is busy with one at a time, disks are not."""
_MOST_CLASS_FILE = 16 << 20


class TarSource:
    """Images by where they lie in their shards."""

    def __init__(
        self, url: str, shards: Sequence[str], index: Index, classes: tuple[str, ...] | None, version: str
    ) -> None:
        """``version`` is a hash of the shards' names, sizes and times."""
        self.url = url
        self.classes = classes
        self.labels: NDArray[np.int64] | None = index.numbers["label"] if classes is not None else None
        self._shards, self._index, self._version = list(shards), index, version
        self._names = index.strings["name"]
        bases = [_base(shard) for shard in shards]
        self._short = bases if len(set(bases)) == len(bases) else self._shards

    def __reduce__(self) -> tuple[Any, ...]:
        return TarSource, (self.url, self._shards, self._index, self.classes, self._version)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """``shard.tar/path/in/it.jpg``."""
        return f"{self._short[self._index.numbers['shard'][index]]}/{self._names[index]}"

    def read(self, index: int) -> tuple[Item, int | None]:
        """Item ``index``: one request for its bytes and the header before them.

        The header's checksum tells whether the shard is still the one that was indexed.

        Raises:
            InputError: the shard is gone, or holds something else at this place.
        """
        numbers = self._index.numbers
        shard = self._shards[numbers["shard"][index]]
        start = int(numbers["offset"][index]) - BLOCK
        data = files.read_range(shard, start, int(numbers["size"][index]) + BLOCK)
        if zlib.crc32(data[:BLOCK]) != numbers["check"][index]:
            raise InputError(
                f"{self.name(index)} is not where it was: {shard} was replaced since it was opened; start the same "
                "command again"
            )
        return data[BLOCK:], None if self.labels is None else int(self.labels[index])

    def fingerprint(self) -> str:
        labels = b"" if self.labels is None else self.labels.tobytes()
        return hash_lines([self._version, str(zlib.crc32(labels)), *(self.classes or ())])


def open_tar(pattern: str, url: str) -> TarSource:
    """The images of all archives that a pattern names (:func:`dino_xcit.data.patterns.expand`).

    Samples are WebDataset's (:mod:`dino_xcit.data.tar.samples`). Labels are those of ``.cls`` members or of ``label``
    in ``.json`` members: numbers, or names of classes, which are numbered in sorted order; where there are none and
    the images lie in folders, each folder is a class, numbered likewise. ``classes.json`` or ``classes.txt`` beside
    the shards names numbered classes; without it they are called "0", "1" ...

    Raises:
        InputError: no such archive, one that cannot be read, or no image in any.
    """
    shards = expand(pattern)
    stamps = files.stamps(shards)
    version = hash_lines(f"{_base(shard)} {size} {time}" for shard, (size, time) in zip(shards, stamps, strict=True))
    made_of = hash_lines([version, *shards])
    limits = np.array([size for size, _ in stamps], dtype=np.int64)

    def accept(index: Index) -> bool:
        return list(index.strings["made_of"]) == [made_of] and is_sound(index, limits)

    where = pattern if files.is_remote(pattern) else os.path.abspath(os.path.expanduser(pattern))
    index = cached(f"tar:{where}", lambda: _build(shards, made_of), accept)
    return TarSource(url, shards, index, _classes(index, shards[0]), version)


def is_sound(index: Index, limits: NDArray[np.int64]) -> bool:
    """Whether every item of a stored index lies within its shard, and every label has a class."""
    shard, offset, size, check = (index.numbers[name] for name in ("shard", "offset", "size", "check"))
    if any(len(column) != len(index.strings["name"]) for column in (shard, offset, size, check)):
        return False
    if len(shard) == 0:
        return False
    inside = shard.min() >= 0 and shard.max() < len(limits) and offset.min() >= BLOCK and size.min() >= 0
    if not inside or size.max() > MOST_IMAGE_BYTES or (offset > limits[shard] - size).any():
        return False
    label = index.numbers.get("label")
    if label is None:
        return True
    most = len(index.strings["class"]) if "class" in index.strings else MOST_CLASSES
    return len(label) == len(shard) and bool(label.min() >= 0 and label.max() < most)


def _build(shards: list[str], made_of: str) -> Index:
    """Look through all shards."""
    found: list[Shard | None] = [None] * len(shards)
    together = files.AT_ONCE if files.is_remote(shards[0]) else _AT_ONCE
    with progress_bar(len(shards), "indexing", shown=len(shards) > 1, unit="shard") as bar:
        pool = ThreadPoolExecutor(min(together, len(shards)))
        try:
            places = {pool.submit(look_through, shard): place for place, shard in enumerate(shards)}
            for future in as_completed(places):
                found[places[future]] = future.result()
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    whole = [shard for shard in found if shard is not None]
    passed_over = sum((shard.passed_over for shard in whole), Counter())
    if passed_over:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in passed_over.most_common())
        print(f"{_some(shards)}: passed over {kinds}", file=sys.stderr)
    counts = [len(shard.names) for shard in whole]
    if not any(counts):
        raise InputError(f"no image in {_some(shards)}: expected members such as a/001.jpg, with or without a/001.cls")
    numbers = {
        "shard": np.repeat(np.arange(len(whole), dtype=np.int64), counts),
        "offset": np.concatenate([shard.offsets for shard in whole]),
        "size": np.concatenate([shard.sizes for shard in whole]),
        "check": np.concatenate([shard.checks for shard in whole]),
    }
    text_ends = np.cumsum([0, *(len(shard.names.text) for shard in whole)])
    names = Strings(
        np.concatenate([shard.names.text for shard in whole]),
        np.concatenate([shard.names.ends + before for shard, before in zip(whole, text_ends, strict=False)]),
    )
    strings = {"name": names, "made_of": Strings.pack([made_of])}
    labels, classes = _labels(whole, _some(shards))
    if labels is not None:
        numbers["label"] = labels
    if classes is not None:
        strings["class"] = Strings.pack(classes)
    return Index(numbers, strings)


def _labels(shards: Sequence[Shard], where: str) -> tuple[NDArray[np.int64] | None, list[str] | None]:
    """Labels, and the classes' names where they have some; None for what there is not."""
    labels: list[Label] = [label for shard in shards for label in shard.labels]
    known = sum(label is not None for label in labels)
    if not known:
        return _labels_of_folders([folder for shard in shards for folder in shard.folders])
    if known < len(labels):
        print(
            f"{where}: {len(labels) - known:,} of {len(labels):,} images have no label, so none is used",
            file=sys.stderr,
        )
        return None, None
    if all(isinstance(label, int) for label in labels):
        return np.array(labels, dtype=np.int64), None
    if any(isinstance(label, int) for label in labels):
        number, name = (next(label for label in labels if isinstance(label, kind)) for kind in (int, str))
        raise InputError(
            f"{where}: the labels of some images are numbers, of others names (such as {number} and {name!r}, in .cls "
            "or .json members): expected one of the two; pack them anew"
        )
    names = sorted({str(label) for label in labels})
    return _numbered([str(label) for label in labels], names), names


def _labels_of_folders(folders: list[str]) -> tuple[NDArray[np.int64] | None, list[str] | None]:
    """As in a folder of images: the class is the uppermost folder in which not all images lie."""
    distinct = sorted(set(folders))
    split = {folder: folder.split("/") if folder else [] for folder in distinct}
    first, last = min(split.values()), max(split.values())
    differ = [place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b]
    shared = differ[0] if differ else len(first)
    if len(distinct) == 1 and shared:
        shared -= 1
    if any(len(parts) <= shared for parts in split.values()):  # images beside folders
        return None, None
    class_of = {folder: parts[shared] for folder, parts in split.items()}
    names = sorted(set(class_of.values()))
    return _numbered([class_of[folder] for folder in folders], names), names


def _numbered(labels: list[str], names: list[str]) -> NDArray[np.int64]:
    number = {name: place for place, name in enumerate(names)}
    return np.array([number[label] for label in labels], dtype=np.int64)


def _classes(index: Index, shard: str) -> tuple[str, ...] | None:
    """Class names in label order, all different; None without labels."""
    if "label" not in index.numbers:
        return None
    if "class" in index.strings:
        return tuple(index.strings["class"])
    count = int(index.numbers["label"].max()) + 1
    folder = files.folder_of(shard)
    for name, understand in (("classes.json", _names_in_json), ("classes.txt", str.splitlines)):
        path = f"{folder}/{name}"
        try:
            text = files.read_file(path, _MOST_CLASS_FILE).decode("utf-8", "replace")
        except InputError:  # mostly absent; not every server tells that from forbidden
            continue
        names = understand(text)
        if names is None or len(names) < count:
            raise InputError(
                f"{path} names {len(names or []):,} classes, but there are labels up to {count - 1:,}: expected a name "
                "for each number (a line each, or a JSON list)"
            )
        again = Counter(names)  # ImageNet has two cranes
        return tuple(f"{name} ({place})" if again[name] > 1 else name for place, name in enumerate(names))
    return tuple(str(number) for number in range(count))


def _names_in_json(text: str) -> list[str] | None:
    """Of ``["tench", ...]``, ``{"0": "tench", ...}`` or ``{"tench": 0, ...}``."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        pairs = (
            value.items()
            if all(isinstance(name, str) for name in value.values())
            else ((number, name) for name, number in value.items())
        )
        by_number = {str(number): name for number, name in pairs}
        value = [by_number.get(str(number)) for number in range(len(by_number))]
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        return None
    return value


def _base(shard: str) -> str:
    """A shard's own name, without what a web address may have behind it (which can be secret)."""
    return os.path.basename(shard.partition("?")[0] if files.is_remote(shard) else shard)


def _some(shards: list[str]) -> str:
    return _base(shards[0]) + (f" and {len(shards) - 1:,} more" if len(shards) > 1 else "")
