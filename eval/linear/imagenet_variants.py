"""Standard variants of ImageNet's validation set for a classifier with wnids as classes (``--also``).

- ``imagenet-v2:DIR`` (arXiv 1902.10811): folders 0 to 999, numbered in the order of the sorted wnids.
- ``imagenet-a:DIR`` (arXiv 1907.07174), ``imagenet-r:DIR`` (arXiv 2006.16241): one folder for each of 200 wnids;
  predictions are restricted to these classes.
- ``sketch:DIR`` (arXiv 1905.13549): one folder per wnid.
- ``real:FILE`` (arXiv 2006.07159): labels for the validation images, a JSON list with a list of labels per image in the
  order of file names (for packed images: the names before packing). Each of an image's labels is correct; images
  without labels are ignored.

K classes, n images, M is the maximum number of labels per image.
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
"""Maximum size of ReaL's file and maximum number of labels per image in it."""
_MIN_AGREEMENT = 0.5
"""Minimum share of images whose label is among ReaL's labels; it is about 0 for labels in another order."""


@dataclass(frozen=True)
class Variant:
    """Images and their labels."""

    name: str
    source: Source | None
    """None: the validation images (ReaL)."""
    labels: NDArray[np.int64]
    """[n, M] correct labels, padded with -1."""
    among: NDArray[np.int64] | None = None
    """Classes that may be predicted; None: all."""
    rows: NDArray[np.int64] | None = None
    """Indices of the evaluated images; None: all."""
    fingerprint: str = ""
    """Hash of a file of labels."""


def split(word: str) -> tuple[str, str]:
    """Split ``NAME:PLACE``.

    Raises:
        InputError: the form or the name is unknown.
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
        val: the validation images, to which ReaL's labels refer.

    Raises:
        InputError: the data is missing, its layout differs from the published one, or the classes differ.
    """
    name, place = split(word)
    wnids = train.classes or ()
    if not wnids or not all(WNID.fullmatch(each) for each in wnids):
        raise InputError(
            f"--also {name} needs training classes named by wnids such as n01440764, but those of {train.url} are "
            f"{', '.join(wnids[:3]) or 'numbers'}: give ImageNet in folders, or imagenet:DIR"
        )
    if name == "real":
        return _open_real(place, wnids, val)
    source = open_source(place)
    if source.labels is None or source.classes is None:
        raise InputError(f"{place} does not have the layout of {name}: expected one folder per class")
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
            f"{place} is not {name} for {train.url}: its class {unknown[0][:40]!r} is not one of the {len(wnids):,} "
            "training classes"
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
        raise InputError(f"{val.url} has files of the same name, but ReaL's labels are in the order of the file names")
    labels = np.full((len(val), max([1, *map(len, lists)])), -1, dtype=np.int64)
    label_of = [wnids.index(wnid) for wnid in sorted(wnids)]
    for index, one in zip(sorted(range(len(val)), key=names.__getitem__), lists, strict=True):
        labels[index, : len(one)] = [label_of[number] for number in one]
    counted = np.flatnonzero(labels[:, 0] >= 0)
    if not len(counted):
        raise InputError(f"{file} has no labels")
    agreeing = int((labels[counted] == np.asarray(val.labels)[counted, None]).any(axis=1).sum())
    if agreeing < _MIN_AGREEMENT * len(counted):
        raise InputError(
            f"{file} has the correct label for only {agreeing:,} of {len(counted):,} images of {val.url}, whose names "
            "are not in the order of ImageNet's file names: give the validation images in folders, or imagenet:DIR"
        )
    return Variant("real", None, labels[counted], None, counted, hashlib.sha256(data).hexdigest())
