"""Images in Parquet files, as the Hugging Face hub ships them: ``parquet:PATTERN``.

Each image is read on its own, by a few bytes of its file, in any order, where its column is not compressed or
compressed with Snappy (pyarrow's default, and the hub's). Otherwise its row group has to be decoded, which is slow
where images are shuffled, and said in a notice.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from dino_xcit.data import files
from dino_xcit.data.decode import UndecodableImage
from dino_xcit.data.index import Index, Strings, cached
from dino_xcit.data.parquet.columns import NONE, Columns
from dino_xcit.data.parquet.pages import MAX_PAGE
from dino_xcit.data.parquet.scan import BY_GROUP, Scanned, decode_group, import_pyarrow, look, scan
from dino_xcit.data.parquet.snappy import piece_run
from dino_xcit.data.parquet.values import COLUMNS
from dino_xcit.data.patterns import expand
from dino_xcit.data.source import Item, hash_lines
from dino_xcit.errors import InputError
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import progress_bar

_AT_ONCE = 4
"""Files that are looked through at once."""
_KEPT = 64 << 20
"""Bytes of decoded row groups that a process keeps besides the last one, where images can only be had so."""
_QUERY = re.compile(r"\?((?:image|label)=[^&?]*(?:&(?:image|label)=[^&?]*)*)$")
_PART = re.compile(r"(train|val|validation|test)(?![a-z0-9])")
"""How the names of a part's files begin, in the hub's repositories."""
_FORM = 1
"""Of the stored index: another number, and earlier ones are built anew."""
_SAID = {
    "image": "column of images",
    "label": "column of labels",
    "text_label": "labels' type (words or numbers)",
    "classes": "class names",
}


class ParquetSource:
    """Images in Parquet files; what is known of them lies in an :class:`~dino_xcit.data.index.Index`.

    Reading an image takes memory for it and at most 128 KiB around it. Where row groups have to be decoded, the last
    one is kept, 512 MiB at most, and earlier ones while all are within 64 MiB.
    """

    def __init__(self, url: str, index: Index) -> None:
        self.url = url
        self._index = index
        self._columns = index.numbers
        words = index.strings["classes"]
        self.labels: NDArray[np.int64] | None = index.numbers["label"] if len(words) else None
        self.classes: tuple[str, ...] | None = tuple(words) or None
        self._paths, self._image = list(index.strings["paths"]), index.strings["image"][0]
        self._stamps = [_stamp(text) for text in index.strings["stamps"]]
        self._shown = _without_common_folder(self._paths)
        self._groups: OrderedDict[tuple[int, int], list[bytes | None]] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return ParquetSource, (self.url, self._index)

    def __len__(self) -> int:
        return len(self._columns["file"])

    def name(self, index: int) -> str:
        """Such as ``train-00003.parquet/000017/cat.jpg``: file, row, and the last part of the image's own path."""
        file = int(self._columns["file"][index])
        row = range(len(self))[index] - int(self._columns["first"][file])
        own = self._index.strings["names"][index]
        return f"{self._shown[file]}/{row:06d}" + (f"/{own}" if own else "")

    def read(self, index: int) -> tuple[Item, int | None]:
        """Item ``index``.

        Raises:
            InputError: its file is gone, or another since it was opened (of remote files that is not looked for).
            UndecodableImage: there is no image in its row, or it is damaged.
        """
        file = int(self._columns["file"][index])
        start, stored, unpacked, skip, length = (int(self._columns[name][index]) for name in COLUMNS)
        if unpacked == BY_GROUP:
            group = self._group(file, start)
            image = group[skip] if skip < len(group) else None
        elif length < 0:
            image = None
        else:
            image = files.read_range(self._paths[file], start, stored, self._stamps[file])
            if unpacked:
                image = self._decompress(image, unpacked, index)
            image = image[skip : skip + length]
        if image is None:
            cause = "the row holds no image"
            raise UndecodableImage(f"{self.name(index)} cannot be read: {cause}; leave the row out", cause)
        return image, None if self.labels is None else int(self.labels[index])

    def _decompress(self, pieces: bytes, unpacked: int, index: int) -> bytes:
        import pyarrow as pa

        try:
            data: bytes = pa.Codec("snappy").decompress(piece_run(pieces, unpacked), unpacked, asbytes=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            cause = "its bytes in the Parquet file are damaged"
            raise UndecodableImage(f"{self.name(index)} cannot be read: {cause}; fetch the file anew", cause) from error
        return data

    def _group(self, file: int, number: int) -> list[bytes | None]:
        """A decoded row group, kept for the next images."""
        if (file, number) in self._groups:
            self._groups.move_to_end((file, number))
            return self._groups[file, number]
        decoded = decode_group(self._paths[file], number, self._image, self._stamps[file])
        self._groups[file, number] = decoded
        sizes = [sum(len(image or b"") for image in group) for group in self._groups.values()]
        while len(sizes) > 1 and sum(sizes) > _KEPT:
            self._groups.popitem(last=False)
            del sizes[0]
        return decoded

    def fingerprint(self) -> str:
        labels = b"" if self.labels is None else np.ascontiguousarray(self.labels).tobytes()
        strings = self._index.strings
        return hash_lines([*self._shown, *strings["stamps"], self._image, hashlib.sha256(labels).hexdigest()])


def open_parquet(pattern: str, part: str | None = None) -> ParquetSource:
    """Open Parquet files, indexed the first time: that reads them once from end to end.

    Args:
        pattern: files, as :func:`dino_xcit.data.patterns.expand` takes them; or a folder in which, or in whose folder
            ``data``, the files' names begin with their part, as in the hub's repositories. ``?image=COLUMN`` and
            ``?label=COLUMN`` at its end (both: ``?image=COLUMN&label=COLUMN``) choose columns; ``label=none``: no
            labels.
        part: ``train`` or ``val``, for folders; None: ``train``.

    Raises:
        InputError: pyarrow is missing; no such file, or one that is damaged, or of other columns than the first.
    """
    import_pyarrow()
    query = _QUERY.search(pattern)
    question = "" if query is None else query[0]
    chosen = dict(pair.partition("=")[::2] for pair in question[1:].split("&") if pair)
    image, label = unquote(chosen.get("image", "")), unquote(chosen.get("label", ""))
    pattern = _in_folder(pattern.removesuffix(question), part)
    url = f"parquet:{pattern}{question}"
    paths = expand(pattern)
    stamps = [f"{size} {version}" for size, version in files.stamps(paths)]
    index = cached(
        f"{url if files.is_remote(pattern) else os.path.abspath(os.path.expanduser(pattern)) + question} {_FORM}",
        lambda: _build(url, paths, stamps, image, label),
        lambda index: _is_sound(index, paths, stamps),
    )
    for reason in index.strings["slow"]:
        log.warning(
            f"{url} can only be read by decoding whole row groups ({reason}), which is slow where images are "
            "shuffled: python -m dino_xcit.data pack SRC DST makes shards that are not"
        )
    return ParquetSource(url, index)


def is_folder_of_parquet(pattern: str) -> bool:
    """Whether a pattern is a folder, which may hold several parts."""
    question = _QUERY.search(pattern)
    pattern = pattern[: question.start()] if question else pattern
    return not any(letter in pattern for letter in "*?[{") and files.is_folder(pattern)


def _in_folder(pattern: str, part: str | None) -> str:
    """The pattern itself, or where it is a folder, that of the part's files in it."""
    if not is_folder_of_parquet(pattern):
        return pattern
    folder = pattern.rstrip("/")
    wanted = ("val", "validation", "test") if part == "val" else ("train",)
    for name in (*wanted, ""):
        for place in (f"{folder}/{name}*.parquet", f"{folder}/data/{name}*.parquet"):
            try:
                found = expand(place)
            except InputError:
                continue
            parts = sorted({known[1] for path in found if (known := _PART.match(path.rpartition("/")[2]))})
            if name or not (parts or part == "val"):
                return place
            raise InputError(
                f"no Parquet file in {folder} has a name that begins with {' or '.join(wanted)}; there are those of "
                f"{', '.join(parts) or 'no part'}: give a pattern of files, such as parquet:{folder}/NAME-*.parquet"
            )
    raise InputError(
        f"no file in {folder}, or in its folder 'data', ends in .parquet: expected files such as train-00000.parquet"
    )


def _build(url: str, paths: list[str], stamps: list[str], image: str, label: str) -> Index:
    """Look through all files."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        looked = list(pool.map(lambda path: look(path, image, label), paths))
        _demand_the_same(paths, [columns for _, columns in looked])
        with progress_bar(sum(rows for rows, _ in looked), f"indexing {url}", shown=True) as bar:
            advancing = Lock()

            def advance(count: int) -> None:
                with advancing:
                    bar.update(count)

            scanned = list(pool.map(lambda path, known: scan(path, known[0], known[1], advance), paths, looked))
    values = np.concatenate([one.values for one in scanned])
    if not len(values):
        raise InputError(f"no image in {url}: its files have no rows; check the pattern")
    counts = [len(one.values) for one in scanned]
    labels, classes = _merge_labels(scanned, looked[0][1], url)
    numbers = {name: np.ascontiguousarray(values[:, place]) for place, name in enumerate(COLUMNS)} | {
        "file": np.repeat(np.arange(len(paths)), counts),
        "first": np.cumsum([0, *counts[:-1]]),
        "label": labels,
    }
    strings = {
        "names": [name for one in scanned for name in one.names],
        "paths": paths,
        "stamps": stamps,
        "image": [looked[0][1].image],
        "classes": classes,
        "slow": [one.slow for one in scanned if one.slow][:1],
    }
    return Index(numbers, {name: Strings.pack(texts) for name, texts in strings.items()})


def _demand_the_same(paths: list[str], columns: list[Columns]) -> None:
    """All files shall have the first one's columns; where their images' own paths are does not matter."""
    first = columns[0]
    for path, other in zip(paths, columns, strict=True):
        for what in ("image", "label", "text_label", "classes"):
            if getattr(first, what) != getattr(other, what):
                raise InputError(
                    f"{path} differs from {paths[0]} in its {_SAID[what]} ({_short(getattr(other, what))} instead of "
                    f"{_short(getattr(first, what))}): expected files of one data set; narrow the pattern, or choose "
                    "columns by ?image=NAME&label=NAME"
                )


def _merge_labels(scanned: list[Scanned], columns: Columns, url: str) -> tuple[NDArray[np.int64], list[str]]:
    """[images] labels, and class names; neither where no image has a label."""
    parts = [one.labels for one in scanned if one.labels is not None]
    labels = np.concatenate(parts) if parts else np.empty(0, np.int64)
    if not len(labels) or labels.max() < 0:  # the hub's way to publish a test part without its labels
        return np.empty(0, np.int64), []
    missing = int((labels < 0).sum())
    if missing:
        raise InputError(
            f"{missing:,} of the {len(labels):,} images of {url} have no label in column {columns.label!r}: expected "
            f"one for each, or none; to read without labels add ?label={NONE} to the URL"
        )
    if not columns.text_label:
        return labels, list(columns.classes or map(str, range(int(labels.max()) + 1)))
    classes = sorted({word for one in scanned for word in one.words})
    number = {word: place for place, word in enumerate(classes)}
    return np.concatenate([np.array([number[w] for w in one.words])[one.labels] for one in scanned]), classes


def _is_sound(index: Index, paths: list[str], stamps: list[str]) -> bool:
    """Whether a stored index is of these files as they are, and asks for nothing that they do not have."""
    strings, numbers = index.strings, index.numbers
    if list(strings["paths"]) != paths or list(strings["stamps"]) != stamps:
        return False
    file, start, stored, unpacked, skip, length = (numbers[name] for name in ("file", *COLUMNS))
    count = len(file)
    if not count or {len(numbers[name]) for name in COLUMNS} != {count} or len(strings["names"]) != count:
        return False
    if len(numbers["first"]) != len(paths) or len(strings["image"]) != 1:
        return False
    if not _are_within(file, len(paths)) or not _are_within(numbers["first"], count + 1):
        return False
    labels, classes = numbers["label"], strings["classes"]
    if len(labels) != (count if len(classes) else 0) or (len(classes) and not _are_within(labels, len(classes))):
        return False
    sizes = np.array([_stamp(text)[0] for text in stamps])[file]
    by_group = unpacked == BY_GROUP
    room = np.where(unpacked > 0, unpacked, stored)
    there = (start >= 0) & (stored >= 0) & (skip >= 0) & (unpacked <= MAX_PAGE)
    # Differences, as sums of what a damaged index says could go round past the largest number.
    within = (unpacked >= 0) & (length >= -1) & (stored <= sizes) & (start <= sizes - stored)
    within &= (skip <= room) & (length <= room - skip)
    return bool((there & (by_group | within)).all())


def _stamp(text: str) -> files.Stamp:
    """From what an index keeps of it."""
    size, _, version = text.partition(" ")
    return int(size), version


def _are_within(values: NDArray[np.int64], end: int) -> bool:
    return bool(0 <= values.min() <= values.max() < end)


def _without_common_folder(paths: list[str]) -> list[str]:
    """Paths as short as they may be and still differ: file names, where all files are in one folder."""
    parts = [path.split("/") for path in paths]
    depth = 0
    for level in zip(*(part[:-1] for part in parts), strict=False):
        if len(set(level)) > 1:
            break
        depth += 1
    return ["/".join(part[depth:]) for part in parts]


def _short(value: object) -> str:
    text = f"{len(value)} names" if isinstance(value, tuple) else str(value)
    return text[:60]
