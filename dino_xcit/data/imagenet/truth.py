"""Which class each validation image of ImageNet-1k has, as its organisers and Kaggle tell it.

The organisers' development kit numbers the classes: ``ILSVRC2012_validation_ground_truth.txt`` has the number of each
image, in the images' order, and ``meta.mat`` says which WordNet id (wnid, ``n01440764``) that is. Kaggle's
``LOC_val_solution.csv`` has the wnids themselves, and ``LOC_synset_mapping.txt`` lists all of them.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dino_xcit.data.files import read_file
from dino_xcit.data.tar.members import members
from dino_xcit.errors import InputError, one_line

SITE = "https://image-net.org/download"
WNID = re.compile(r"n\d{8}")
KIT, GROUND_TRUTH, META = "ILSVRC2012_devkit_t12", "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
SOLUTION, MAPPING = "LOC_val_solution.csv", "LOC_synset_mapping.txt"

_MOST_BYTES = 64 << 20
"""Of each of these files, and of what one of them unpacks to: the largest is Kaggle's table of 2 MB."""
_WHOLE_NUMBERS, _MATRIX, _COMPRESSED = 5, 14, 15
"""Kinds of element: miINT32, miMATRIX and miCOMPRESSED of "MAT-File Format", MathWorks, level 5."""


@dataclass(frozen=True)
class Truth:
    """The classes, and each validation image's."""

    file: str
    """Where it stands, for errors."""
    classes: tuple[str, ...]
    """All wnids, sorted: a label is a place among them."""
    wnid_of: dict[str, str]
    """Name of the image file without its suffix, to its wnid."""


def read_truth(root: Path) -> Truth:
    """The truth in an ImageNet folder: the development kit, packed or not, or Kaggle's tables.

    Raises:
        InputError: there is none, or it is damaged, or contradicts itself.
    """
    if (root / SOLUTION).is_file():
        return _of_kaggle(root)
    found = _kit_files(root)
    if found is None:
        raise InputError(
            f"no ground truth of the validation images in {root}: expected {KIT}.tar.gz (from {SITE}), the folder "
            f"{KIT}, or Kaggle's {SOLUTION} there"
        )
    kit, truth, meta = found
    wnids = _wnids_by_number(meta, kit)
    lines = truth.split()
    if not lines or not all(re.fullmatch(rb"\d{1,6}", line) for line in lines):
        raise InputError(
            f"{kit}: {GROUND_TRUTH} is damaged: expected the number of a class a line; download the kit from {SITE}"
        )
    unknown = sorted({int(line) for line in lines} - wnids.keys())
    if unknown:
        raise InputError(
            f"{kit}: {GROUND_TRUTH} has the class {unknown[0]}, which {META} does not know: download the kit from "
            f"{SITE}"
        )
    names = {f"ILSVRC2012_val_{number:08d}": wnids[int(line)] for number, line in enumerate(lines, start=1)}
    return Truth(f"{kit} ({GROUND_TRUTH})", tuple(sorted(wnids.values())), names)


def known_classes(root: Path) -> tuple[str, tuple[str, ...]] | None:
    """(where it stands, all wnids sorted) where that can be told without another package; None where it cannot.

    Raises:
        InputError: what is there is damaged.
    """
    if (root / MAPPING).is_file():
        return str(root / MAPPING), _mapped(root)
    try:
        import scipy.io  # noqa: F401
    except ImportError:
        return None
    found = _kit_files(root)
    return None if found is None else (found[0], tuple(sorted(_wnids_by_number(found[2], found[0]).values())))


def _of_kaggle(root: Path) -> Truth:
    file, classes = root / SOLUTION, _mapped(root)
    text = read_file(str(file), _MOST_BYTES).decode("utf-8", "replace")
    wnid_of: dict[str, str] = {}
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""))
        for row in rows:
            wnids = set(row["PredictionString"].split()[0::5])  # a wnid and a box each
            if len(wnids) != 1 or row["ImageId"] in wnid_of:
                raise ValueError(f"line {rows.line_num} has no single class, or an image again")
            wnid_of[row["ImageId"]] = wnids.pop()
    except (KeyError, AttributeError, TypeError, ValueError, csv.Error) as error:
        raise InputError(
            f"{file} is damaged ({error}): expected ImageId,PredictionString and lines such as ILSVRC2012_val_00000001,"
            "n01440764 1 2 3 4 (from Kaggle's imagenet-object-localization-challenge)"
        ) from error
    unknown = sorted(set(wnid_of.values()) - set(classes))
    if unknown:
        raise InputError(
            f"{file} has the class {unknown[0][:40]!r}, which {root / MAPPING} does not list: both come from "
            "Kaggle's imagenet-object-localization-challenge"
        )
    return Truth(str(file), classes, wnid_of)


def _mapped(root: Path) -> tuple[str, ...]:
    lines = read_file(str(root / MAPPING), _MOST_BYTES).decode("utf-8", "replace").splitlines()
    wnids = [line.split()[0] for line in lines if line.strip()]
    if not wnids or not all(WNID.fullmatch(wnid) for wnid in wnids) or len(set(wnids)) < len(wnids):
        raise InputError(
            f"{root / MAPPING} is damaged: expected lines such as 'n01440764 tench, Tinca tinca', each class once "
            "(from Kaggle's imagenet-object-localization-challenge)"
        )
    return tuple(sorted(wnids))


def _kit_files(root: Path) -> tuple[str, bytes, bytes] | None:
    """(where, ground truth, meta.mat) of the development kit; None where there is no kit."""
    folder, archive = root / KIT / "data", root / f"{KIT}.tar.gz"
    if folder.is_dir():
        truth, meta = (read_file(str(folder / name), _MOST_BYTES) for name in (GROUND_TRUTH, META))
        return str(folder), truth, meta
    if not archive.is_file():
        return None
    found: dict[str, bytes] = {}
    try:
        kit = io.BytesIO(_unpacked(read_file(str(archive), _MOST_BYTES)))
        for member in members(kit, str(archive), 0, None, Counter()):
            name = member.name.rpartition("/")[2]
            if name in (GROUND_TRUTH, META):
                kit.seek(member.offset)
                found[name] = kit.read(member.size)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{archive} is damaged ({one_line(error)}): download it again from {SITE}") from error
    for name in (GROUND_TRUTH, META):
        if name not in found:
            raise InputError(f"{archive} holds no {name}: expected the kit of ILSVRC2012 (from {SITE})")
    return str(archive), found[GROUND_TRUTH], found[META]


def _unpacked(data: bytes) -> bytes:
    """What gzip packed, or the data themselves (browsers unpack it); a small file could unpack to any size."""
    if not data.startswith(b"\x1f\x8b"):
        return data
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        unpacked = file.read(_MOST_BYTES + 1)
    if len(unpacked) > _MOST_BYTES:
        raise ValueError(f"it unpacks to more than {_MOST_BYTES:,} bytes")
    return unpacked


def _wnids_by_number(meta: bytes, kit: str) -> dict[int, str]:
    """ILSVRC2012_ID to wnid, of the synsets that have no others below them: the classes."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise InputError(f"reading {META} of {kit} needs SciPy: pip install scipy") from error
    try:
        _refuse_bomb(memoryview(meta))
        synsets: Any = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True, variable_names=["synsets"])["synsets"])
        below = synsets["num_children"] if "num_children" in synsets.dtype.names else np.zeros(len(synsets))
        rows = zip(synsets["ILSVRC2012_ID"], synsets["WNID"], below, strict=True)
        classes = [(int(number), str(wnid)) for number, wnid, children in rows if int(children) == 0]
        wnids = dict(classes)
        if len(wnids) < len(classes):
            raise ValueError("a number stands for two classes")
    except Exception as error:  # of any class: the parser of a damaged file stumbles over whatever it meets
        raise InputError(f"{kit}: {META} is damaged ({type(error).__name__}): download the kit from {SITE}") from error
    if not wnids or not _all_wnids(wnids.values()) or len(set(wnids.values())) < len(wnids):
        raise InputError(
            f"{kit}: {META} does not list wnids such as n01440764, each once: download the kit from {SITE}"
        )
    return wnids


def _all_wnids(words: Iterable[str]) -> bool:
    return all(WNID.fullmatch(word) for word in words)


def _refuse_bomb(meta: memoryview) -> None:
    """Refuse what SciPy would give more memory to than any kit needs: it believes all sizes.

    Raises:
        ValueError: it unpacks to too much, or claims arrays of more elements than it has bytes for.
    """
    order, total = (">" if bytes(meta[126:128]) == b"MI" else "<"), 0
    for kind, content in _elements(meta[128:], order):
        if kind == _COMPRESSED:
            unpacked = zlib.decompressobj().decompress(content, _MOST_BYTES)
            total += len(unpacked)
            if total >= _MOST_BYTES:
                raise ValueError("too large")
            _refuse_empty_promises(memoryview(unpacked), order)
    _refuse_empty_promises(meta[128:], order)


def _refuse_empty_promises(data: memoryview, order: str) -> None:
    for kind, content in _elements(data, order):
        if kind != _MATRIX:
            continue
        inside = _elements(content, order)
        next(inside, None)  # its flags; what comes next is its shape, of at least two numbers
        shape_kind, shape = next(inside, (0, memoryview(b"")))
        if shape_kind == _WHOLE_NUMBERS:
            sides = struct.unpack(f"{order}{len(shape) // 4}i", shape[: len(shape) // 4 * 4])
            if min(sides, default=0) < 0 or math.prod(sides) > len(content):
                raise ValueError("an array of more elements than bytes")
        _refuse_empty_promises(content, order)


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """(kind, content) of each element; of those so small that they lie within their own tag, no content."""
    place = 0
    while place + 8 <= len(data):
        kind, length = struct.unpack(f"{order}II", data[place : place + 8])
        if kind >> 16:
            kind, length = kind & 0xFFFF, 0
        yield kind, data[place + 8 : place + 8 + length]
        place += 8 + (length if kind == _COMPRESSED else -(-length // 8) * 8)
