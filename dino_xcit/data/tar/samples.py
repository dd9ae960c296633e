"""The samples of one shard, by WebDataset's rules: members whose paths agree up to the first dot of the last part.

https://github.com/webdataset/webdataset, "The WebDataset Format".
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from dino_xcit.data.files import explained, open_file
from dino_xcit.data.folder import IMAGE_SUFFIXES
from dino_xcit.data.index import Strings
from dino_xcit.data.source import MOST_CLASSES
from dino_xcit.data.tar.members import Member, members
from dino_xcit.errors import InputError

Label = int | str | None

MOST_IMAGE_BYTES = 1 << 30
"""Larger images are passed over."""

_MOST_CLS, _MOST_JSON = 200, 1 << 20
_IMAGES = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
_NUMBER = re.compile(rb"-?\d{1,9}")


@dataclass(frozen=True)
class Shard:
    """The images of one archive, in its order."""

    names: Strings
    """Paths in the archive."""
    offsets: NDArray[np.int64]
    """Where each image's bytes begin, in bytes from the beginning of the file."""
    sizes: NDArray[np.int64]
    """Bytes."""
    checks: NDArray[np.int64]
    """CRC-32 of the 512 bytes before each (:class:`dino_xcit.data.tar.members.Member`)."""
    labels: list[Label]
    """What a ``.cls`` or ``.json`` says; None where neither does."""
    folders: list[str]
    """The folder of each image; empty for the top."""
    passed_over: Counter[str]
    """How many members of which kinds are no samples though they might be expected to be."""


@dataclass(slots=True)
class _Sample:
    """Members with the same key."""

    images: list[tuple[str, Member]] = field(default_factory=list)
    """(suffix, member) each."""
    label: Label = None
    has_others: bool = False
    """Whether there are members that are no images, so that it is one sample for certain."""
    has_cls: bool = False


def look_through(path: str) -> Shard:
    """Read all headers of a shard, and its labels.

    One image is taken of a sample that has other members too: the first whose suffix is an image's as a whole
    (``x.jpg`` rather than ``x.mask.png``). Where nothing but images has a key, each is an item, since dots in the
    names of photographs mean nothing. Of members with the same name the last is taken, as extracting them would.

    Raises:
        InputError: what :func:`dino_xcit.data.tar.members.scan` says, or a ``.cls`` that is neither number nor name.
    """
    passed_over: Counter[str] = Counter()
    samples: dict[str, _Sample] = {}
    with open_file(path) as file:
        try:
            for member in members(file, path, 0, None, passed_over):
                _place(member, file, path, samples, passed_over)
        except OSError as error:
            raise explained(path, error) from error
    chosen = [(member, sample.label) for sample in samples.values() for member in _images_of(sample, passed_over)]
    interned: dict[str, str] = {}
    folders = [member.name.rpartition("/")[0] for member, _ in chosen]
    return Shard(
        Strings.pack(member.name for member, _ in chosen),
        np.array([member.offset for member, _ in chosen], dtype=np.int64),
        np.array([member.size for member, _ in chosen], dtype=np.int64),
        np.array([member.check for member, _ in chosen], dtype=np.int64),
        [label for _, label in chosen],
        [interned.setdefault(folder, folder) for folder in folders],
        passed_over,
    )


def _place(member: Member, file: BinaryIO, path: str, samples: dict[str, _Sample], passed_over: Counter[str]) -> None:
    """Put a member where it belongs."""
    stem, dot, suffix = member.name.rpartition("/")[2].partition(".")
    if not stem or not dot:
        return
    sample = samples.setdefault(member.name[: -len(suffix) - 1], _Sample())
    suffix = suffix.lower()
    if suffix.rpartition(".")[2] in _IMAGES:
        if member.size > MOST_IMAGE_BYTES:
            passed_over[f"images of more than {MOST_IMAGE_BYTES >> 30} GiB"] += 1
            return
        before = [one for one in sample.images if one[1].name != member.name]
        passed_over["names that come again (the last is taken)"] += len(sample.images) - len(before)
        sample.images = [*before, (suffix, member)]
        return
    sample.has_others = True
    if suffix == "cls":
        sample.label, sample.has_cls = _label_of_cls(member, file, path), True
    elif suffix == "json" and not sample.has_cls:
        sample.label = _label_of_json(member, file)


def _images_of(sample: _Sample, passed_over: Counter[str]) -> list[Member]:
    if not sample.has_others or len(sample.images) < 2:
        return [member for _, member in sample.images]
    passed_over["further images of a sample"] += len(sample.images) - 1
    return [min(sample.images, key=lambda image: "." in image[0])[1]]  # the first of the least


def _label_of_cls(member: Member, file: BinaryIO, path: str) -> Label:
    """A number, or a class's name: one line of text that has something in it besides digits."""
    file.seek(member.offset)
    text = file.read(min(member.size, _MOST_CLS)).strip()
    if member.size <= _MOST_CLS and _NUMBER.fullmatch(text):
        number = int(text)
        if number < MOST_CLASSES:
            return number if number >= 0 else None  # -1 says that it is not known
    name = text.decode("utf-8", "replace")
    is_name = name.isprintable() and "\ufffd" not in name and any(letter.isalpha() for letter in name)
    if member.size <= _MOST_CLS and is_name:
        return name
    raise InputError(
        f"{path}/{member.name} holds {text[:20]!r}: expected the number of a class, 0 to {MOST_CLASSES - 1:,}, in "
        f"ASCII digits, or -1 where it is not known; or a class's name, one line of at most {_MOST_CLS} bytes; write "
        "them anew"
    )


def _label_of_json(member: Member, file: BinaryIO) -> Label:
    if member.size > _MOST_JSON:
        return None
    file.seek(member.offset)
    try:
        value = json.loads(file.read(member.size))
    except (ValueError, RecursionError):
        return None
    label = value.get("label") if isinstance(value, dict) else None
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        return None
    if isinstance(label, str):
        return label[:200] or None
    return label if 0 <= label < MOST_CLASSES else None
