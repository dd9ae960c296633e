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
import torch
from numpy.typing import NDArray

from dino_xcit.data import Source, open_source
from dino_xcit.data.imagenet import WNID
from dino_xcit.data.storage import read_file
from dino_xcit.errors import InputError
from eval.linear.heads import guesses
from eval.linear.pooled import Rows
from eval.results import own_name
from eval.stats import wilson_interval

FORMS = "imagenet-v2:DIR, imagenet-a:DIR, imagenet-r:DIR, sketch:DIR or real:FILE.json"
PUBLISHED = {
    "imagenet-v2": (1000, 10_000),
    "imagenet-a": (200, 7_500),
    "imagenet-r": (200, 30_000),
    "sketch": (1000, 50_889),
    "real": (1000, 46_837),
}
"""Classes and images of each as its authors ship it; of ReaL, images with a label."""

_RESTRICTED = ("imagenet-a", "imagenet-r")
_MOST_BYTES = 64 << 20
_MOST_LABELS = 100
"""Of one image."""
_LEAST_AGREEMENT = 0.5
"""Share of the images whose own label must be among ReaL's. Of labels that are another image's it is about 0."""


@dataclass(frozen=True)
class Variant:
    """Images, and what is right for each."""

    name: str
    source: Source | None
    """None: the validation images (ReaL)."""
    fingerprint: str
    """Of the labels where they came from a file."""
    rows: NDArray[np.int64] | None
    """Which of the images count; None: all."""
    labels: NDArray[np.int64]
    """[n, M] labels of the classifier; -1: none."""
    among: NDArray[np.int64] | None
    """The labels that the classifier chooses from; None: all."""

    def notice(self) -> str | None:
        """A clause where it is not of the size its authors published."""
        classes, images = PUBLISHED[self.name]
        found = len(np.unique(self.labels[self.labels >= 0]))
        if (found, len(self.labels)) == (classes, images) or (self.name == "real" and len(self.labels) == images):
            return None
        return (
            f"{self.name} has {found:,} classes and {len(self.labels):,} images here, as published {classes:,} and "
            f"{images:,}: its figure is not to be compared with published ones"
        )


def split(word: str) -> tuple[str, str]:
    """Name and place of ``NAME:PLACE``.

    Raises:
        InputError: not of that form, or no known name.
    """
    name, _, place = word.partition(":")
    if name not in PUBLISHED or not place:
        raise InputError(f"also has {word!r}, expected {FORMS}")
    return name, place


def open_variant(word: str, train: Source, val: Source) -> Variant:
    """Open ``NAME:PLACE`` for a classifier of ``train``'s classes.

    Args:
        val: the validation images, in whose order ReaL's labels are.

    Raises:
        InputError: nothing there, not laid out as published, or the classifier has other classes.
    """
    name, place = split(word)
    if train.classes is None or not all(WNID.fullmatch(each) for each in train.classes):
        named = ", ".join((train.classes or ("numbers",))[:3])
        raise InputError(
            f"--also {name} needs training classes named by wnids such as n01440764, those of {train.url} are {named}: "
            "use ImageNet in folders, or imagenet:DIR"
        )
    if name == "real":
        return _open_real(place, sorted(train.classes), train.classes, val)
    source = open_source(place)
    if source.labels is None or source.classes is None:
        raise InputError(f"{place} is not laid out as {name}: expected one folder a class")
    if name == "imagenet-v2":
        own = _numbered(source.classes, train, place)
    else:
        unknown = sorted(set(source.classes) - set(train.classes))
        if unknown:
            raise InputError(
                f"{place} is not {name} for {train.url}: it has a class {unknown[0][:40]!r}, which is none of the "
                f"{len(train.classes):,} training classes"
            )
        own = source.classes
    label_of = np.array([train.classes.index(wnid) for wnid in own], dtype=np.int64)
    among = np.sort(label_of) if name in _RESTRICTED else None
    return Variant(name, source, "", None, label_of[source.labels][:, None], among)


def _numbered(folders: Sequence[str], train: Source, place: str) -> tuple[str, ...]:
    """The wnid of each of ImageNet-V2's folders."""
    assert train.classes is not None
    wnids = sorted(train.classes)
    if set(folders) != {str(number) for number in range(len(wnids))}:
        raise InputError(
            f"{place} is not imagenet-v2 for {train.url}: expected a folder for each of its {len(wnids):,} classes, "
            f"named 0 to {len(wnids) - 1}, found {len(folders):,} such as {folders[0][:40]!r}"
        )
    return tuple(wnids[int(folder)] for folder in folders)


def _open_real(file: str, wnids: Sequence[str], classes: Sequence[str], val: Source) -> Variant:
    data = read_file(os.path.expanduser(file), _MOST_BYTES)
    try:
        lists: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is no JSON: expected ReaL's real.json, a list of lists of labels") from error
    if not isinstance(lists, list) or not all(isinstance(one, list) and len(one) <= _MOST_LABELS for one in lists):
        raise InputError(f"{file} is not ReaL's: expected a list with a list of labels for each validation image")
    if len(lists) != len(val):
        raise InputError(
            f"{file} has labels of {len(lists):,} images, {val.url} has {len(val):,}: expected as many, all of "
            "ImageNet's validation images"
        )
    known = range(len(wnids))
    wrong = next((label for one in lists for label in one if type(label) is not int or label not in known), None)
    if wrong is not None:
        raise InputError(f"{file} has the label {str(wrong)[:40]}: expected numbers of classes from 0 to {known[-1]}")
    names = [own_name(val.name(index).replace("\\", "/")) for index in range(len(val))]
    order = sorted(range(len(val)), key=lambda index: names[index])
    if len(set(names)) < len(names):
        raise InputError(f"{val.url} has files of the same name: ReaL's labels are in the order of the file names")
    most = max((len(one) for one in lists), default=0)
    labels = np.full((len(val), max(1, most)), -1, dtype=np.int64)
    label_of = [list(classes).index(wnid) for wnid in wnids]
    for index, one in zip(order, lists, strict=True):
        labels[index, : len(one)] = [label_of[number] for number in one]
    counted = np.flatnonzero(labels[:, 0] >= 0)
    if not len(counted):
        raise InputError(f"{file} has no label at all")
    if val.labels is not None:
        own = val.labels[counted, None]
        agreeing = int((labels[counted] == own).any(axis=1).sum())
        if agreeing < _LEAST_AGREEMENT * len(counted):
            raise InputError(
                f"{file} has an image's own label for {agreeing:,} of {len(counted):,} images of {val.url}, expected "
                "most: its labels are in the order of ImageNet's file names, which these images do not have: use the "
                "validation images in folders, or imagenet:DIR"
            )
    return Variant("real", None, hashlib.sha256(data).hexdigest(), counted, labels[counted], None)


def measure(
    variant: Variant, features: Rows, weight: torch.Tensor, bias: torch.Tensor, device: torch.device
) -> dict[str, Any]:
    """Top-1 and top-5 of a classifier, in percent, with 95% intervals over the images.

    Args:
        features: of the variant's images, all of them.
        weight, bias: [K, D], [K].
    """
    rows = features if variant.rows is None else features.some(variant.rows)
    found = guesses(weight, bias, rows, device, variant.among)
    classes = len(weight) if variant.among is None else len(variant.among)
    result: dict[str, Any] = {"images": len(rows), "classes": classes}
    for top, meant in ((1, True), (5, classes > 5)):
        hits = (found[:, :top, None] == variant.labels[:, None, :]).any(axis=(1, 2))
        result[f"top{top}"] = 100.0 * float(hits.mean()) if meant else None
        result[f"top{top}_interval"] = list(wilson_interval(hits)) if meant else None
    return result
