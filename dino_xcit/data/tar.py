"""Images in tar archives such as WebDataset shards, with random access and without extraction: ``tar:PATTERN``.

A sample is a set of members with the same key, the path up to the first dot of its last component
(https://github.com/webdataset/webdataset, "The WebDataset Format").
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dino_xcit.data import storage
from dino_xcit.data.folder import ARRAY_SUFFIX, IMAGE_SUFFIXES
from dino_xcit.data.index import Index, Strings, cached
from dino_xcit.data.source import MAX_CLASSES, Item, hash_lines, number_classes
from dino_xcit.errors import InputError, one_line
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import progress_bar

BLOCK = tarfile.BLOCKSIZE

_LOCAL_READERS = 8
_MAX_CLS, _MAX_JSON, _MAX_CLASS_FILE = 200, 1 << 20, 16 << 20
_ODD_LABELS = "labels in .json members that are neither class numbers nor names"
_NUMBER = re.compile(rb"-?\d{1,9}")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

Label = int | str | None


class Member(NamedTuple):
    """A regular file in an archive."""

    name: str
    """Path without a leading ``./``; bytes that are not UTF-8 are surrogates."""
    offset: int
    """Offset of the content in the archive, in bytes."""
    size: int
    """Size of the content in bytes."""
    check: int
    """CRC-32 of the last block of the header, to detect a changed archive."""


def scan(
    file: BinaryIO, path: str, start: int = 0, end: int | None = None, skipped: Counter[str] | None = None
) -> Iterator[Member]:
    """Yield the regular members of an archive in order, repeated names included. The caller may seek in the file.

    Args:
        file: File with the archive.
        path: Name of the archive, for errors.
        start, end: Range of the archive in the file, in bytes; None: to the end of the file.
        skipped: Counts members that are not regular files, and names with absolute paths or ``..``.

    Raises:
        InputError: The file is not a tar archive, or is compressed, truncated or damaged.
    """
    skipped = Counter() if skipped is None else skipped
    end = file.seek(0, 2) if end is None else end
    file.seek(start)
    try:
        archive = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        for info in iter(archive.next, None):
            archive.members.clear()  # type: ignore[attr-defined]  # else tarfile keeps them all
            if info.size < 0:
                raise InputError(f"{path} is damaged: {info.name[:200]!r} has a negative size; download it again")
            if info.offset_data + (info.size if info.isreg() else 0) > end:
                raise InputError(f"{path} is truncated within {info.name[:200]!r}: copy or download it again")
            name = re.sub(r"^(\./+)+", "", info.name)
            if info.issparse() or not info.isreg():
                if not info.isdir():
                    skipped["links, devices or sparse files"] += 1
            elif name.startswith("/") or "\0" in name or ".." in name.split("/"):
                skipped["names that lead out of the archive"] += 1
            elif name:
                file.seek(info.offset_data - BLOCK)
                yield Member(name, info.offset_data, info.size, zlib.crc32(file.read(BLOCK)))
        file.seek(archive.offset)
        stopped_at = file.read(max(0, min(BLOCK, end - archive.offset)))
    except (tarfile.TarError, ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        file.seek(start)
        raise _not_a_tar(file.read(min(BLOCK, end - start)), path, one_line(error)) from error
    # tarfile treats a damaged header as the end of the archive.
    if stopped_at != bytes(BLOCK):
        if archive.offset == start:
            raise _not_a_tar(stopped_at, path, "no header")
        where = "is truncated" if len(stopped_at) < BLOCK else "is damaged: it has no valid header"
        raise InputError(f"{path} {where} after byte {archive.offset:,}: copy or download it again")


def _not_a_tar(begin: bytes, path: str, reason: str) -> InputError:
    program = next((name for mark, name in _COMPRESSED.items() if begin.startswith(mark)), None)
    if program is not None:
        return InputError(f"{path} is compressed: decompress it with {program} -d, and give the resulting .tar")
    if not begin:
        return InputError(f"{path} is empty: expected a tar archive; copy or download it again")
    if begin.lstrip().lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        return InputError(f"{path} is a web page, not a tar archive: download it again, signed in if needed")
    return InputError(f"{path} is not a tar archive, or damaged ({reason}): check the path, or download it again")


@dataclass
class _Shard:
    """The images of one archive, in order."""

    members: list[Member]
    labels: list[Label]
    """Label of each image, from ``.cls`` or ``.json``; else None."""
    skipped: Counter[str]


def _index_shard(path: str) -> _Shard:
    """Read all headers and labels of a shard.

    ``a.v2.cls`` or ``a.v2.json`` labels ``a.v2.jpg``; without these, ``a.cls`` or ``a.json`` does. If all members with
    a key are images, each is an item. Otherwise the items are the images with their own label, or else the one image
    with the shortest suffix (``a.jpg`` rather than ``a.mask.png``).

    Raises:
        InputError: As :func:`scan`; a ``.cls`` is neither number nor name; a label has no image.
    """
    skipped: Counter[str] = Counter()
    images: defaultdict[str, dict[str, Member]] = defaultdict(dict)  # key to name to member
    arrays: defaultdict[str, dict[str, Member]] = defaultdict(dict)
    with_others: set[str] = set()
    labels: dict[str, Label] = {}
    classes: set[str] = set()
    with storage.open_file(path) as file:
        try:
            for member in scan(file, path, skipped=skipped):
                parts = member.name.split("/")
                if "." not in parts[-1] or any(part.startswith(".") for part in parts):
                    continue
                key = _key(member.name)
                found = images[key]
                stored_as, _, ending = member.name.rpartition(".")
                if f".{ending}".lower() in (*IMAGE_SUFFIXES, ARRAY_SUFFIX):
                    if ending.lower() == "npy":
                        with_others.add(key)
                        found = arrays[key]
                    if member.size > storage.MAX_IMAGE_BYTES:
                        skipped["images of more than 1 GiB"] += 1
                        continue
                    skipped["earlier members of the same name"] += member.name in found
                    found[member.name] = member  # the last one wins, as in an extraction
                    continue
                with_others.add(key)
                if ending.lower() == "cls":
                    labels[stored_as] = _label_of_cls(member, file, path)
                    classes.add(stored_as)
                elif ending.lower() == "json" and stored_as not in classes:
                    label = _label_of_json(member, file, skipped)
                    if label is not None:
                        labels[stored_as] = label
        except OSError as error:
            raise storage.explained(path, error) from error
    if any(images.values()):
        skipped["arrays beside images"] += sum(map(len, arrays.values()))
    else:
        images = arrays
    shard = _Shard([], [], skipped)
    unused = {name for name, label in labels.items() if label is not None}
    for key, found in images.items():
        if not found:
            continue
        by_path = {name.rpartition(".")[0]: member for name, member in reversed(found.items())}  # the first of each
        chosen = list(found.values())
        if key in with_others:
            chosen = [member for stored_as, member in reversed(by_path.items()) if stored_as in labels]
            chosen = chosen or [min(found.values(), key=lambda member: member.name.count("."))]
        skipped["further images of a sample"] += len(found) - len(chosen)
        for member in chosen:
            stored_as = member.name.rpartition(".")[0]
            labelled_by = stored_as if stored_as in labels else key
            unused.discard(labelled_by)
            shard.members.append(member)
            shard.labels.append(labels.get(labelled_by))
    if unused:
        raise InputError(
            f"{path} has a label in {min(unused)}.cls or .json, but no image for it: expected both; pack the archive "
            "again"
        )
    return shard


def _key(name: str) -> str:
    """Return the key of a member: its path up to the first dot of the last component."""
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def _label_of_cls(member: Member, file: BinaryIO, path: str) -> Label:
    """Read a label: a number, or a class name (one line with at least one letter)."""
    file.seek(member.offset)
    text = file.read(min(member.size, _MAX_CLS)).strip()
    if member.size <= _MAX_CLS:
        if _NUMBER.fullmatch(text):
            number = int(text)
            if number < MAX_CLASSES:
                return number if number >= 0 else None  # -1: unknown
        name = text.decode("utf-8", "replace")
        if name.isprintable() and "\ufffd" not in name and any(letter.isalpha() for letter in name):
            return name
    raise InputError(
        f"{path}/{member.name} contains {text[:20]!r}: expected a class number, 0 to {MAX_CLASSES - 1:,} or -1 for "
        f"unknown, or a class name, one line of at most {_MAX_CLS} bytes; pack the archive again"
    )


def _label_of_json(member: Member, file: BinaryIO, skipped: Counter[str]) -> Label:
    if member.size > _MAX_JSON:
        return None
    file.seek(member.offset)
    value = _parsed(file.read(member.size))
    label = value.get("label") if isinstance(value, dict) else None
    if isinstance(label, str) and label == label.encode(errors="ignore").decode():  # no lone surrogates
        return label[:_MAX_CLS] or None
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < MAX_CLASSES:
        return label
    skipped[_ODD_LABELS] += label not in (None, -1)
    return None


def _parsed(text: str | bytes) -> Any:
    """Parse JSON; None if invalid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


class TarSource:
    """Images by shard and offset."""

    def __init__(self, url: str, shards: Sequence[str], index: Index, classes: tuple[str, ...] | None) -> None:
        self.url = url
        self.classes = classes
        self.labels: NDArray[np.int64] | None = index.numbers["label"] if classes is not None else None
        self.label_problem = "".join(index.strings.get("label_problem", ()))
        """Why there are no labels; else empty."""
        self._shards, self._index = list(shards), index
        self._names = index.strings["name"]
        bases = [_base(shard) for shard in shards]
        self._short = bases if len(set(bases)) == len(bases) else self._shards

    def __reduce__(self) -> tuple[Any, ...]:
        return TarSource, (self.url, self._shards, self._index, self.classes)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """Return ``shard.tar/path/in/it.jpg``."""
        return f"{self._short[self._index.numbers['shard'][index]]}/{self._names[index]}"

    def read(self, index: int) -> tuple[Item, int | None]:
        """Read item ``index``, with one request for its header and content.

        Raises:
            InputError: The shard is missing or has changed.
        """
        numbers = self._index.numbers
        shard = self._shards[numbers["shard"][index]]
        start = int(numbers["offset"][index]) - BLOCK
        data = storage.read_range(shard, start, int(numbers["size"][index]) + BLOCK)
        if zlib.crc32(data[:BLOCK]) != numbers["check"][index]:
            raise InputError(f"cannot read {self.name(index)}: {shard} was replaced; start the command again")
        return data[BLOCK:], None if self.labels is None else int(self.labels[index])

    def fingerprint(self) -> str:
        labels = b"" if self.labels is None else self.labels.tobytes()
        return hash_lines([*self._index.strings["version"], str(zlib.crc32(labels)), *(self.classes or ())])


def open_tar(pattern: str, url: str) -> TarSource:
    """Open the images of all archives that match a pattern (:func:`dino_xcit.data.storage.expand`).

    Labels come from ``.cls`` members or ``label`` in ``.json`` members: class numbers, or class names, which are
    numbered in sorted order. Without labels each folder in the archives is a class. ``classes.json`` or
    ``classes.txt`` beside the shards names numbered classes; the default names are "0", "1" ...

    Raises:
        InputError: An archive is missing or cannot be read, or there is no image.
    """
    shards = storage.expand(pattern)
    stamps = storage.stamps(shards)
    version = hash_lines(f"{_base(shard)} {size} {time}" for shard, (size, time) in zip(shards, stamps, strict=True))
    made_of = [version, hash_lines(shards)]
    where = pattern if storage.is_remote(pattern) else os.path.abspath(os.path.expanduser(pattern))
    index = cached(f"tar:{where}", lambda: _build(shards, made_of), lambda one: list(one.strings["made_of"]) == made_of)
    for warning in index.strings["warning"]:
        log.warn_once(warning)
    return TarSource(url, shards, index, _classes(index, shards[0]))


def index_of(members: Sequence[Member], **strings: Sequence[str]) -> Index:
    """Build the index of one archive, with columns of strings; ``name`` and ``version`` are required."""
    return Index(
        {
            "shard": np.zeros(len(members), dtype=np.int64),
            "offset": np.array([member.offset for member in members], dtype=np.int64),
            "size": np.array([member.size for member in members], dtype=np.int64),
            "check": np.array([member.check for member in members], dtype=np.int64),
        },
        {name: Strings.pack(texts) for name, texts in strings.items()},
    )


def _build(shards: list[str], made_of: list[str]) -> Index:
    """Index all shards concurrently."""
    found: dict[int, _Shard] = {}
    readers = storage.MAX_REQUESTS if storage.is_remote(shards[0]) else _LOCAL_READERS
    with progress_bar(len(shards), "indexing", shown=len(shards) > 1, unit="shard") as bar:
        pool = ThreadPoolExecutor(min(readers, len(shards)))
        try:
            places = {pool.submit(_index_shard, shard): place for place, shard in enumerate(shards)}
            for future in as_completed(places):
                found[places[future]] = future.result()
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    where = _base(shards[0]) + (f" and {len(shards) - 1:,} more" if len(shards) > 1 else "")
    ordered = [found[place] for place in range(len(shards))]
    members = [member for shard in ordered for member in shard.members]
    if not members:
        raise InputError(f"no image in {where}: expected members such as a/001.jpg, with or without a/001.cls")
    skipped = +sum((shard.skipped for shard in ordered), Counter())
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in skipped.most_common())
    labels = [label for shard in ordered for label in shard.labels]
    numbers, classes, problem = _numbered(labels, members, where, skipped[_ODD_LABELS])
    index = index_of(
        members,
        name=[member.name for member in members],
        version=made_of[:1],
        made_of=made_of,
        warning=[f"{where}: skipped {kinds}"] if kinds else [],
        label_problem=[problem] if problem else [],
        **({} if classes is None else {"class": classes}),
    )
    counts = [len(shard.members) for shard in ordered]
    shard_of = {"shard": np.repeat(np.arange(len(ordered), dtype=np.int64), counts)}
    label = {} if numbers is None else {"label": numbers}
    return Index({**index.numbers, **shard_of, **label}, index.strings)


def _numbered(
    labels: list[Label], members: Sequence[Member], where: str, odd: int
) -> tuple[NDArray[np.int64] | None, list[str] | None, str]:
    """Return labels as numbers, the class names if labels are names, and why there are no labels."""
    unlabelled = [member.name for member, label in zip(members, labels, strict=True) if label is None]
    if len(unlabelled) == len(labels):
        if odd:
            return None, None, f"it has {odd:,} {_ODD_LABELS}"
        folders = [member.name.rpartition("/")[0] for member in members]
        classes_of = _classes_of_folders(folders)
        problem = "some images lie beside its folders" if any(folders) else ""
        return (*number_classes(classes_of), "") if classes_of else (None, None, problem)
    if unlabelled:
        problem = f"{len(unlabelled):,} of {len(labels):,} images have no label, such as {unlabelled[0]}"
        return None, None, problem
    names = [label for label in labels if isinstance(label, str)]
    numbers = [label for label in labels if isinstance(label, int)]
    if names and numbers:
        raise InputError(
            f"{where} has both numbers and names as labels (such as {numbers[0]} and {names[0]!r}): expected one of "
            "the two; pack the archives again"
        )
    return (*number_classes(names), "") if names else (np.array(numbers, dtype=np.int64), None, "")


def _classes_of_folders(folders: list[str]) -> list[str] | None:
    """Return the class of each folder: the uppermost folder that does not contain all images."""
    distinct = sorted(set(folders))
    split = {folder: folder.split("/") if folder else [] for folder in distinct}
    common = os.path.commonpath(distinct)
    shared = common.count("/") + 1 if common else 0
    if len(distinct) == 1 and shared:
        shared -= 1
    if any(len(parts) <= shared for parts in split.values()):  # images beside folders
        return None
    return [split[folder][shared] for folder in folders]


def _classes(index: Index, shard: str) -> tuple[str, ...] | None:
    """Return the distinct class names in label order; None without labels."""
    if "label" not in index.numbers:
        return None
    if "class" in index.strings:
        return tuple(index.strings["class"])
    count = int(index.numbers["label"].max()) + 1
    folder = storage.folder_of(shard)
    for name, understand in (("classes.json", _names_in_json), ("classes.txt", str.splitlines)):
        path = f"{folder}/{name}"
        try:
            text = storage.read_file(path, _MAX_CLASS_FILE).decode("utf-8", "replace")
        except InputError:  # usually missing; some servers report "forbidden" instead
            continue
        names = understand(text)
        if names is None or len(names) < count:
            raise InputError(
                f"{path} names {len(names or []):,} classes, but there are labels up to {count - 1:,}: expected a name "
                "for each number, one per line or as a JSON list"
            )
        again = Counter(names)  # ImageNet has two cranes
        return tuple(f"{name} ({place})" if again[name] > 1 else name for place, name in enumerate(names))
    return tuple(str(number) for number in range(count))


def _names_in_json(text: str) -> list[str] | None:
    """Parse ``["tench", ...]``, ``{"0": "tench", ...}`` or ``{"tench": 0, ...}``."""
    value = _parsed(text)
    if isinstance(value, dict):
        by_number = {str(b): a for a, b in value.items()} if all(isinstance(b, int) for b in value.values()) else value
        value = [by_number.get(str(number)) for number in range(len(by_number))]
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        return None
    return value


def _base(shard: str) -> str:
    """Return the file name of a shard, without the query of a URL, which may be secret."""
    return os.path.basename(shard.partition("?")[0] if storage.is_remote(shard) else shard)
