"""The standard variants of ImageNet's validation images, for a classifier whose classes are wnids (``--also``).

- ``imagenet-v2:DIR`` (arXiv 1902.10811): folders 0 to 999, numbered in the order of the sorted wnids.
- ``imagenet-a:DIR`` (arXiv 1907.07174), ``imagenet-r:DIR`` (arXiv 2006.16241): a folder for each of 200 wnids; the
  classifier chooses among those alone.
- ``sketch:DIR`` (arXiv 1905.13549): a folder a wnid.
- ``real:FILE`` (arXiv 2006.07159): no images but labels, a JSON list with a list of labels for each validation image in
  the order of the file names (of packed images: their names before); images without a label do not count, and any of
  its labels is right.

K classes, n images, M labels of an image at most.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino_xcit.data import Source, open_source
from dino_xcit.data.imagenet import WNID
from dino_xcit.data.storage import read_file
from dino_xcit.errors import InputError
from eval.results import own_name

NAMES = ("imagenet-v2", "imagenet-a", "imagenet-r", "sketch", "real")
_MAX_BYTES, _MAX_LABELS = 64 << 20, 100
"""Of ReaL's file, and of one image in it."""
_MIN_AGREEMENT = 0.5
"""Share of the images whose own label must be among ReaL's. Of labels that are another image's it is about 0."""


@dataclass(frozen=True)
class Variant:
    """Images, and what is right for each."""

    name: str
    source: Source | None
    """None: the validation images (ReaL)."""
    labels: NDArray[np.int64]
    """[n, M] labels of the classifier; -1: none."""
    among: NDArray[np.int64] | None = None
    """The labels that the classifier chooses from; None: all."""
    rows: NDArray[np.int64] | None = None
    """Which of the images count; None: all."""
    fingerprint: str = ""
    """Of the labels where they came from a file."""


def split(word: str) -> tuple[str, str]:
    """Name and place of ``NAME:PLACE``.

    Raises:
        InputError: not of that form, or no known name.
    """
    name, _, place = word.partition(":")
    if name not in NAMES or not place:
        raise InputError(
            f"also has {word!r}, expected imagenet-v2:DIR, imagenet-a:DIR, imagenet-r:DIR, sketch:DIR or real:FILE.json"
        )
    return name, place


def open_variant(word: str, train: Source, val: Source) -> Variant:
    """Open ``NAME:PLACE`` for a classifier of ``train``'s classes.

    Args:
        val: the validation images, in whose order ReaL's labels are.

    Raises:
        InputError: nothing there, not laid out as published, or the classifier has other classes.
    """
    name, place = split(word)
    wnids = train.classes or ()
    if not wnids or not all(WNID.fullmatch(each) for each in wnids):
        raise InputError(
            f"--also {name} needs training classes named by wnids such as n01440764, those of {train.url} are "
            f"{', '.join(wnids[:3]) or 'numbers'}: use ImageNet in folders, or imagenet:DIR"
        )
    if name == "real":
        return _open_real(place, wnids, val)
    source = open_source(place)
    if source.labels is None or source.classes is None:
        raise InputError(f"{place} is not laid out as {name}: expected one folder a class")
    names: Sequence[str] = source.classes
    if name == "imagenet-v2":
        if set(names) != {str(number) for number in range(len(wnids))}:
            raise InputError(
                f"{place} is not {name} for {train.url}: expected a folder for each of its {len(wnids):,} classes, "
                f"named 0 to {len(wnids) - 1}, found {len(names):,} such as {names[0][:40]!r}"
            )
        names = [sorted(wnids)[int(folder)] for folder in names]
    if unknown := sorted(set(names) - set(wnids)):
        raise InputError(
            f"{place} is not {name} for {train.url}: it has a class {unknown[0][:40]!r}, which is none of the "
            f"{len(wnids):,} training classes"
        )
    label_of = np.array([wnids.index(wnid) for wnid in names], dtype=np.int64)
    among = np.sort(label_of) if name in ("imagenet-a", "imagenet-r") else None
    return Variant(name, source, label_of[source.labels][:, None], among)


def _open_real(file: str, wnids: Sequence[str], val: Source) -> Variant:
    data, classes = read_file(os.path.expanduser(file), _MAX_BYTES), range(len(wnids))
    try:
        lists: Any = json.loads(data)
        right = len(lists) == len(val) and all(
            isinstance(one, list) and len(one) <= _MAX_LABELS and all(type(label) is int for label in one)
            and set(one) <= set(classes)
            for one in lists
        )  # fmt: skip
    except (ValueError, TypeError, RecursionError):
        right = False
    if not right:
        raise InputError(
            f"{file} is not ReaL's real.json for {val.url}: expected a list of {len(val):,} lists of classes from 0 to "
            f"{classes[-1]}"
        )
    names = [own_name(val.name(index).replace("\\", "/")) for index in range(len(val))]
    if len(set(names)) < len(names):
        raise InputError(f"{val.url} has files of the same name: ReaL's labels are in the order of the file names")
    labels = np.full((len(val), max([1, *map(len, lists)])), -1, dtype=np.int64)
    label_of = [wnids.index(wnid) for wnid in sorted(wnids)]
    for index, one in zip(sorted(range(len(val)), key=names.__getitem__), lists, strict=True):
        labels[index, : len(one)] = [label_of[number] for number in one]
    counted = np.flatnonzero(labels[:, 0] >= 0)
    if not len(counted):
        raise InputError(f"{file} has no label at all")
    agreeing = int((labels[counted] == np.asarray(val.labels)[counted, None]).any(axis=1).sum())
    if agreeing < _MIN_AGREEMENT * len(counted):
        raise InputError(
            f"{file} has an image's own label for {agreeing:,} of {len(counted):,} images of {val.url}, expected most: "
            "its labels are in the order of ImageNet's file names, which these images do not have: use the validation "
            "images in folders, or imagenet:DIR"
        )
    return Variant("real", None, labels[counted], None, counted, hashlib.sha256(data).hexdigest())
