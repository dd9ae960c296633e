"""ImageNet-1k as distributed by its organisers and by Kaggle, without unpacking the archives: ``imagenet:DIR``.

Contents of DIR. Of several alternatives the first is used:

- training: ``ILSVRC2012_img_train.tar`` (one archive per class inside, read in place);
  Kaggle's ``ILSVRC/Data/CLS-LOC/train``; a folder ``train`` with one folder per class.
- validation: ``ILSVRC2012_img_val.tar``; a flat folder ``ILSVRC2012_img_val``, ``ILSVRC/Data/CLS-LOC/val`` or ``val``,
  with the ground truth in DIR; a folder ``val`` with one folder per class.
- ground truth: the organisers' development kit, packed or unpacked, with the class number of each image in
  ``ILSVRC2012_validation_ground_truth.txt`` and their WordNet ids (wnids, ``n01440764``) in ``meta.mat``; or Kaggle's
  ``LOC_val_solution.csv`` and ``LOC_synset_mapping.txt``, which contain wnids.

Classes are wnids in sorted order, numbered as in torchvision, timm and DINO.
"""

from __future__ import annotations

import csv
import io
import re
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino_xcit.data import storage
from dino_xcit.data.folder import FileSource, open_folder
from dino_xcit.data.index import Index, Strings, cached
from dino_xcit.data.source import Source, hash_lines
from dino_xcit.data.tar import Member, TarSource, index_of, scan
from dino_xcit.errors import InputError, one_line
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import progress_bar

SITE = "https://image-net.org/download"
TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
KAGGLE = "ILSVRC/Data/CLS-LOC"
KIT, GROUND_TRUTH, META = "ILSVRC2012_devkit_t12", "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
SOLUTION, MAPPING = "LOC_val_solution.csv", "LOC_synset_mapping.txt"
CLASSES = 1000
WNID = re.compile(r"n\d{8}")

_CLASS_ARCHIVE = re.compile(r"(?:.*/)?(n\d{8})\.tar")
_IMAGE = re.compile(r"(?:.*/)?([^/.][^/]*)\.JPEG", re.IGNORECASE)
_MAX_BYTES = 64 << 20
"""Maximum size of a ground truth file. The largest is Kaggle's table of 2 MB."""


def open_imagenet(root: str, part: str) -> Source:
    """Open one part of ImageNet-1k, or of a smaller set in the same layout.

    Args:
        root: Local folder (DIR above).
        part: ``train`` or ``val``.

    Raises:
        InputError: The part is missing or damaged, or images and ground truth do not match.
    """
    if storage.is_remote(root):
        raise InputError(
            f"imagenet:{root} is remote: expected a folder on this machine; for remote data, pack a local copy with "
            "python -m dino_xcit.data pack and use tar:URL"
        )
    folder, url = Path(root).expanduser().absolute(), f"imagenet:{root}/{part}"
    if not folder.is_dir():
        raise InputError(f"no folder {folder}: expected one with {TRAIN}, {VAL} and the development kit from {SITE}")
    try:
        source = _train(folder, url) if part == "train" else _val(folder, url)
    except OSError as error:  # such as a folder without permission
        raise storage.explained(error.filename or str(folder), error) from error
    if len(source.classes or ()) != CLASSES:
        log.warn_once(f"{url} has {len(source.classes or ()):,} classes, ImageNet-1k has {CLASSES:,}")
    return source


def _train(root: Path, url: str) -> Source:
    place = next((place for place in (root / TRAIN, root / KAGGLE / "train", root / "train") if place.exists()), None)
    if place is None:
        raise InputError(f"no training images in {root}: expected {TRAIN} (from {SITE}), {KAGGLE}/train or train")
    source: Source = open_folder(str(place), url) if place.is_dir() else _train_archive(place, url)
    if source.classes is None:
        raise InputError(f"{place} has images beside its folders: expected one folder per class, such as n01440764")
    where, expected = _known_classes(root)
    if expected and source.classes != expected:
        odd = min(set(expected) ^ set(source.classes))
        raise InputError(
            f"{url} has {len(source.classes):,} classes, {where} names {len(expected):,}, and only one of them has "
            f"{odd}: expected the complete set from {SITE}"
        )
    return source


def _archive(archive: Path, url: str, version: str, build: Callable[[str], Index]) -> TarSource:
    """Open one archive as a source; ``version`` hashes the index's further dependencies."""
    path = str(archive)
    version = hash_lines([version, archive.name, *map(str, storage.stamp(path))])

    def build_here() -> Index:
        try:
            return build(version)
        except InputError as error:
            raise InputError(f"{error} (it comes from {SITE})") from error

    index = cached(f"imagenet:{path}", build_here, lambda one: list(one.strings["version"]) == [version])
    return TarSource(url, [path], index, tuple(index.strings["class"]))


def _train_archive(archive: Path, url: str) -> TarSource:
    """Open an archive of one archive per class. Images are ordered by class and name, as in folders."""
    path = str(archive)

    def build(version: str) -> Index:
        found: dict[str, list[Member]] = {}
        with storage.open_file(path) as file:
            archives = list(scan(file, path))
            with progress_bar(len(archives), "indexing", shown=True, unit="class") as bar:
                for member in archives:
                    named = _CLASS_ARCHIVE.fullmatch(member.name)
                    if named is None or named[1] in found:
                        raise InputError(f"{path} contains {member.name}: expected n01440764.tar ..., one per class")
                    inside = scan(file, f"{path}/{member.name}", member.offset, member.offset + member.size)
                    images = sorted((one for one in inside if _IMAGE.fullmatch(one.name)), key=lambda one: one.name)
                    if not images:
                        raise InputError(f"{path} has no JPEG in {member.name}")
                    found[named[1]] = images
                    bar.update()
        if not found:
            raise InputError(f"{path} is empty: expected n01440764.tar ..., one per class")
        classes = sorted(found)
        members = [member for wnid in classes for member in found[wnid]]
        names = [f"{wnid}/{member.name}" for wnid in classes for member in found[wnid]]
        index = index_of(members, **{"name": names, "class": classes, "version": [version]})
        labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(found[wnid]) for wnid in classes])
        return Index({**index.numbers, "label": labels}, index.strings)

    return _archive(archive, url, "train", build)


def _val(root: Path, url: str) -> Source:
    if (root / VAL).is_file():
        return _val_archive(root / VAL, _read_truth(root), url)
    for place in (root / VAL.removesuffix(".tar"), root / KAGGLE / "val", root / "val"):
        if not place.is_dir():
            continue
        names = sorted(entry.name for entry in place.iterdir() if _IMAGE.fullmatch(entry.name))
        if not names:
            return open_folder(str(place), url)
        truth = _read_truth(root)
        strings = {"name": Strings.pack(names), "class": Strings.pack(truth.classes)}
        index = Index({"label": truth.labels(names, str(place))}, strings, keep=False)
        return FileSource(url, str(place), index)
    raise InputError(f"no validation images in {root}: expected {VAL} (from {SITE}), {KAGGLE}/val or val")


def _val_archive(archive: Path, truth: _Truth, url: str) -> TarSource:
    path = str(archive)

    def build(version: str) -> Index:
        with storage.open_file(path) as file:
            members = sorted((one for one in scan(file, path) if _IMAGE.fullmatch(one.name)), key=lambda one: one.name)
        names = [member.name for member in members]
        index = index_of(members, **{"name": names, "class": truth.classes, "version": [version]})
        return Index({**index.numbers, "label": truth.labels(names, path)}, index.strings)

    version = hash_lines(["val", *truth.classes, *(f"{name} {wnid}" for name, wnid in truth.wnid_of.items())])
    return _archive(archive, url, version, build)


@dataclass(frozen=True)
class _Truth:
    """The classes, and the class of each validation image."""

    file: str
    """File of the ground truth, for errors."""
    classes: tuple[str, ...]
    """All wnids, sorted. A label is an index into them."""
    wnid_of: dict[str, str]
    """Image file name without suffix to wnid."""

    def labels(self, names: list[str], where: str) -> NDArray[np.int64]:
        """Return the labels of image files, [len(names)].

        Raises:
            InputError: The images and the ground truth do not match.
        """
        stems = [name.rpartition("/")[2].rpartition(".")[0] for name in names]
        odd = min(set(stems) ^ set(self.wnid_of), default=None)
        if odd is not None or len(stems) != len(self.wnid_of):
            raise InputError(
                f"{where} has {len(stems):,} images, {self.file} lists {len(self.wnid_of):,}, and only one of them has "
                f"{odd}: expected both complete and of ILSVRC2012, from {SITE}"
            )
        number = {wnid: place for place, wnid in enumerate(self.classes)}
        return np.array([number[self.wnid_of[stem]] for stem in stems], dtype=np.int64)


def _read_truth(root: Path) -> _Truth:
    """Read the ground truth in an ImageNet folder.

    Raises:
        InputError: It is missing, damaged or inconsistent.
    """
    if (root / SOLUTION).is_file():
        where, classes, wnid_of = str(root / SOLUTION), _mapped(root), _solution(root / SOLUTION)
    else:
        kit = _kit_files(root)
        if kit is None:
            raise InputError(
                f"no ground truth of the validation images in {root}: expected {KIT}.tar.gz (from {SITE}), the folder "
                f"{KIT}, or Kaggle's {SOLUTION}"
            )
        where, wnids = f"{kit.where} ({GROUND_TRUTH})", _wnids_by_number(kit)
        classes, lines = tuple(sorted(wnids.values())), kit.truth.decode("ascii", "replace").split()
        wnid_of = {
            f"ILSVRC2012_val_{number:08d}": wnids.get(int(line) if line.isdecimal() else -1, line)
            for number, line in enumerate(lines, start=1)
        }
    unknown = sorted(set(wnid_of.values()) - set(classes))
    if unknown or not wnid_of:
        raise InputError(f"{where} has the class {(unknown or [''])[0][:40]!r}, which is unknown: download it again")
    return _Truth(where, classes, wnid_of)


def _known_classes(root: Path) -> tuple[str, tuple[str, ...]]:
    """Return (file of the list, all wnids sorted), or ("", ()) if there is no list.

    Raises:
        InputError: The list is damaged.
    """
    if (root / MAPPING).is_file():
        return str(root / MAPPING), _mapped(root)
    kit = _kit_files(root)
    return ("", ()) if kit is None else (kit.where, tuple(sorted(_wnids_by_number(kit).values())))


def _solution(file: Path) -> dict[str, str]:
    """Read Kaggle's table: image to wnid."""
    text = storage.read_file(str(file), _MAX_BYTES).decode("utf-8", "replace")
    wnid_of: dict[str, str] = {}
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""))
        for row in rows:
            (wnid,) = set(row["PredictionString"].split()[0::5])  # wnid and box of each object
            if row["ImageId"] in wnid_of:
                raise ValueError(f"line {rows.line_num} repeats an image")
            wnid_of[row["ImageId"]] = wnid
    except (KeyError, AttributeError, TypeError, ValueError, csv.Error) as error:
        raise InputError(
            f"{file} is damaged ({error}): expected ImageId,PredictionString and lines such as ILSVRC2012_val_00000001,"
            "n01440764 1 2 3 4 (from Kaggle's imagenet-object-localization-challenge)"
        ) from error
    return wnid_of


def _mapped(root: Path) -> tuple[str, ...]:
    """Read Kaggle's list of classes."""
    lines = storage.read_file(str(root / MAPPING), _MAX_BYTES).decode("utf-8", "replace").splitlines()
    return _checked([line.split()[0] for line in lines if line.strip()], str(root / MAPPING))


def _checked(wnids: list[str], where: str) -> tuple[str, ...]:
    if not wnids or not all(WNID.fullmatch(wnid) for wnid in wnids) or len(set(wnids)) < len(wnids):
        raise InputError(f"{where} is damaged: expected wnids such as n01440764, each once; download it again")
    return tuple(sorted(wnids))


@dataclass(frozen=True)
class _Kit:
    where: str
    truth: bytes
    meta: bytes


def _kit_files(root: Path) -> _Kit | None:
    folder, archive = root / KIT / "data", root / f"{KIT}.tar.gz"
    if folder.is_dir():
        return _Kit(str(folder), *(storage.read_file(str(folder / name), _MAX_BYTES) for name in (GROUND_TRUTH, META)))
    if not archive.is_file():
        return None
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive) as kit:
            for member in kit:
                content = kit.extractfile(member) if member.size <= _MAX_BYTES else None
                if content is not None and member.name.rpartition("/")[2] in (GROUND_TRUTH, META):
                    found[member.name.rpartition("/")[2]] = content.read()
        return _Kit(str(archive), found[GROUND_TRUTH], found[META])
    except (OSError, EOFError, ValueError, KeyError, zlib.error, tarfile.TarError) as error:
        raise InputError(
            f"{archive} is damaged ({one_line(error)}): expected the kit of ILSVRC2012 from {SITE}; download it again"
        ) from error


def _wnids_by_number(kit: _Kit) -> dict[int, str]:
    """Map ILSVRC2012_ID to wnid, for the synsets without children: the classes."""
    from scipy.io import loadmat  # slow to import, rarely needed

    try:
        synsets: Any = np.atleast_1d(loadmat(io.BytesIO(kit.meta), squeeze_me=True)["synsets"])
        below = synsets["num_children"] if "num_children" in synsets.dtype.names else np.zeros(len(synsets))
        rows = zip(synsets["ILSVRC2012_ID"], synsets["WNID"], below, strict=True)
        classes = [(int(number), str(wnid)) for number, wnid, children in rows if int(children) == 0]
    except Exception as error:  # damaged files make SciPy raise any exception
        reason = f"{kit.where}: {META} is damaged ({type(error).__name__})"
        raise InputError(f"{reason}: download the kit from {SITE}") from error
    _checked([wnid for _, wnid in classes], f"{kit.where}: {META}")
    return dict(classes)
