"""ImageNet-1k as its organisers and Kaggle ship it, without unpacking the large archives: ``imagenet:DIR``.

What DIR may hold, the first that is there counts:

- training: ``ILSVRC2012_img_train.tar`` (an archive of an archive a class: each image is read by its place in it);
  Kaggle's ``ILSVRC/Data/CLS-LOC/train``; a folder ``train`` with a folder a class.
- validation: ``ILSVRC2012_img_val.tar``; a flat folder ``ILSVRC2012_img_val``, ``ILSVRC/Data/CLS-LOC/val`` or ``val``,
  with the ground truth beside it (:mod:`dino_xcit.data.imagenet.truth`); a folder ``val`` with a folder a class.

Classes are wnids in sorted order, as torchvision, timm and DINO number them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dino_xcit.data import files
from dino_xcit.data.folder import FileSource, open_folder
from dino_xcit.data.imagenet.truth import SITE, Truth, known_classes, read_truth
from dino_xcit.data.index import Index, Strings, cached
from dino_xcit.data.source import Source, hash_lines
from dino_xcit.data.tar.members import Member, scan
from dino_xcit.data.tar.source import TarSource, is_sound
from dino_xcit.errors import InputError
from dino_xcit.runtime.logging import progress_bar

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
KAGGLE = "ILSVRC/Data/CLS-LOC"
CLASSES = 1000

_CLASS_ARCHIVE = re.compile(r"(?:.*/)?(n\d{8})\.tar")
_IMAGE = re.compile(r"(?:.*/)?([^/]+)\.JPEG", re.IGNORECASE)


def open_imagenet(root: str, part: str) -> Source:
    """One part of ImageNet-1k, or of a smaller set in the same layout.

    Args:
        root: DIR above, on this machine.
        part: ``train`` or ``val``.

    Raises:
        InputError: nothing of that kind is there, something is damaged, or the parts do not fit each other.
    """
    if files.is_remote(root):
        raise InputError(f"imagenet:{root} is remote: expected a folder on this machine; for archives elsewhere pack "
                         "it here with python -m dino_xcit.data pack, and use tar:URL")  # fmt: skip
    folder, url = Path(root).expanduser().absolute(), f"imagenet:{root}/{part}"
    if not folder.is_dir():
        raise InputError(f"no folder {folder}: expected one with {TRAIN}, {VAL} and the development kit from {SITE}")
    try:
        source = _train(folder, url) if part == "train" else _val(folder, url)
    except OSError as error:  # a folder that may not be looked into
        raise files.explained(error.filename or str(folder), error) from error
    _mention(url, len(source.classes or ()))
    return source


@cache
def _mention(url: str, count: int) -> None:
    """Once a process: training and measuring both open the training part."""
    if count != CLASSES:
        print(f"{url} has {count:,} classes, ImageNet-1k has {CLASSES:,}", file=sys.stderr)


def _train(root: Path, url: str) -> Source:
    source: Source
    if (root / TRAIN).is_file():
        source = _train_archive(root / TRAIN, url)
    else:
        place = next((place for place in (root / KAGGLE / "train", root / "train") if place.is_dir()), None)
        if place is None:
            raise InputError(f"no training images in {root}: expected {TRAIN} (from {SITE}), {KAGGLE}/train or train")
        source = open_folder(str(place), url)
        if source.classes is None:
            raise InputError(f"{place} has images beside its folders: expected a folder a class, such as n01440764")
    expected = known_classes(root)
    if expected is not None and source.classes is not None and source.classes != expected[1]:
        missing = sorted(set(expected[1]) - set(source.classes))
        extra = sorted(set(source.classes) - set(expected[1]))
        which = f"{missing[0]} is missing" if missing else f"{extra[0]} is unknown there"
        raise InputError(
            f"{url} has {len(source.classes):,} classes, {expected[0]} names {len(expected[1]):,}, {which}: is it "
            f"complete? It comes from {SITE}"
        )
    return source


def _train_archive(archive: Path, url: str) -> TarSource:
    path = str(archive.absolute())
    size, version = files.stamp(path)
    made_of = hash_lines(["train", archive.name, str(size), version])
    index = cached(f"imagenet:{path}", lambda: _index_of_archives(path, made_of), _accept(made_of, size))
    return TarSource(url, [path], index, tuple(index.strings["class"]), made_of)


def _accept(made_of: str, size: int) -> Callable[[Index], bool]:
    limits = np.array([size], dtype=np.int64)
    return lambda index: list(index.strings["made_of"]) == [made_of] and is_sound(index, limits)


def _index_of_archives(path: str, made_of: str) -> Index:
    """Where each image lies in an archive of archives, class by class, sorted by name as in folders."""
    try:
        archives: dict[str, Member] = {}
        for member in scan(path):
            named = _CLASS_ARCHIVE.fullmatch(member.name)
            if named is None:
                raise InputError(f"{path} holds {member.name}: expected an archive a class, such as n01440764.tar")
            if named[1] in archives:
                raise InputError(f"{path} holds {member.name} twice")
            archives[named[1]] = member
        classes = sorted(archives)
        images: list[list[Member]] = []
        with progress_bar(len(classes), "indexing", shown=True, unit="class") as bar:
            for wnid in classes:
                archive = archives[wnid]
                try:
                    inside = [member for member in scan(path, archive.offset, archive.size) if _is_image(member)]
                except InputError as error:
                    raise InputError(f"in {archive.name}: {error}") from error
                if not inside:
                    raise InputError(f"{path} has no JPEG in {archive.name}")
                images.append(sorted(inside, key=lambda member: member.name))
                bar.update()
    except InputError as error:
        raise InputError(f"{error} (it comes from {SITE})") from error
    if not classes:
        raise InputError(f"{path} is empty: expected an archive a class, such as n01440764.tar (it comes from {SITE})")
    names = [f"{wnid}/{member.name}" for wnid, inside in zip(classes, images, strict=True) for member in inside]
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(inside) for inside in images])
    return _index([member for inside in images for member in inside], names, labels, classes, made_of)


def _is_image(member: Member) -> bool:
    return _IMAGE.fullmatch(member.name) is not None


def _index(
    members: list[Member], names: list[str], labels: NDArray[np.int64], classes: Iterable[str], made_of: str
) -> Index:
    numbers = {
        "shard": np.zeros(len(members), dtype=np.int64),
        "offset": np.array([member.offset for member in members], dtype=np.int64),
        "size": np.array([member.size for member in members], dtype=np.int64),
        "check": np.array([member.check for member in members], dtype=np.int64),
        "label": labels,
    }
    strings = {"name": names, "class": classes, "made_of": [made_of]}
    return Index(numbers, {name: Strings.pack(texts) for name, texts in strings.items()})


def _val(root: Path, url: str) -> Source:
    if (root / VAL).is_file():
        return _val_archive(root / VAL, read_truth(root), url)
    for place in (root / VAL.removesuffix(".tar"), root / KAGGLE / "val", root / "val"):
        if not place.is_dir():
            continue
        names = sorted(entry.name for entry in place.iterdir() if _IMAGE.fullmatch(entry.name))
        if not names:
            return open_folder(str(place), url)
        truth = read_truth(root)
        labels = _labels(names, truth, str(place))
        strings = {"name": names, "class": truth.classes}
        index = Index({"label": labels}, {name: Strings.pack(texts) for name, texts in strings.items()}, keep=False)
        return FileSource(url, str(place), index)
    raise InputError(f"no validation images in {root}: expected {VAL} (from {SITE}), {KAGGLE}/val or val")


def _val_archive(archive: Path, truth: Truth, url: str) -> TarSource:
    path = str(archive.absolute())
    size, version = files.stamp(path)
    said = (f"{name} {wnid}" for name, wnid in truth.wnid_of.items())
    made_of = hash_lines(["val", archive.name, str(size), version, *truth.classes, *said])

    def build() -> Index:
        try:
            members = sorted((member for member in scan(path) if _is_image(member)), key=lambda member: member.name)
        except InputError as error:
            raise InputError(f"{error} (it comes from {SITE})") from error
        names = [member.name for member in members]
        return _index(members, names, _labels(names, truth, path), truth.classes, made_of)

    index = cached(f"imagenet:{path}", build, _accept(made_of, size))
    return TarSource(url, [path], index, truth.classes, made_of)


def _labels(names: list[str], truth: Truth, where: str) -> NDArray[np.int64]:
    """A label an image.

    Raises:
        InputError: the images are not those of the truth.
    """
    stems = [match[1] if (match := _IMAGE.fullmatch(name)) else name for name in names]
    images, known = set(stems), set(truth.wnid_of)
    if images != known or len(stems) != len(images):
        odd = min(images ^ known, default=stems[0])
        reason = f"{odd} is only in the former" if odd in images else f"{odd} is only in the latter"
        raise InputError(
            f"{where} holds {len(stems):,} images, {truth.file} knows {len(known):,} ({reason}): both have to be whole "
            f"and of ILSVRC2012; they come from {SITE}"
        )
    number = {wnid: place for place, wnid in enumerate(truth.classes)}
    return np.array([number[truth.wnid_of[stem]] for stem in stems], dtype=np.int64)
