"""Images with segmentation masks: layouts of folders, pairing by name, reading and checking masks.

K: classes; h, w: size of an image.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dino_xcit.data import storage
from dino_xcit.data.decode import UndecodableImage, decode_mask, read_header
from dino_xcit.data.folder import IMAGE_SUFFIXES
from dino_xcit.data.source import hash_lines
from dino_xcit.data.workers import choose_workers, each_image
from dino_xcit.errors import InputError, one_line
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import counted, progress_bar

IGNORE = 255
"""Label of pixels without a class."""
MAX_CLASSES = 254
_UNKNOWN = 254
"""Marks labels that are neither a class nor ignored."""
_VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


class Layout(NamedTuple):
    """Folders and labels of a kind of data set."""

    name: str
    images: str
    """Folder of images, with {} for the part."""
    masks: str
    """Folder of masks, with {} for the part."""
    listing: str = ""
    """File with the names of a part; empty: all files of the folders."""
    parts: tuple[str, str] = ("train", "val")
    count: int = 0
    """Number of classes; 0: unknown."""
    names: tuple[str, ...] = ()
    first: int = 0
    """Label of the first class; lower labels are ignored."""
    inside: tuple[str, ...] = ()
    """Folders in which archives of the data set unpack."""


LAYOUTS = (
    Layout(
        "ade20k", "images/{}", "annotations/{}", parts=("training", "validation"), count=150, first=1,
        inside=("ADEChallengeData2016",),
    ),
    Layout(
        "voc", "JPEGImages", "SegmentationClass", "ImageSets/Segmentation/{}.txt", count=len(_VOC), names=_VOC,
        inside=("VOC2012", "VOCdevkit/VOC2012"),
    ),
    Layout("folder", "images/{}", "masks/{}"),
    Layout("folder", "{}/images", "{}/masks"),
)  # fmt: skip


@dataclass
class MaskSource:
    """Images of one part, with masks; a :class:`dino_xcit.data.Source` without labels of whole images."""

    url: str
    names: tuple[str, ...]
    """Names without suffix, relative to the folder of the images."""
    images: tuple[str, ...]
    masks: tuple[str, ...]
    classes: tuple[str, ...] | None = None
    """Class names; None: not known yet."""
    first: int = 0
    """Label of the first class in the files."""
    ignore: int = IGNORE
    """Label of ignored pixels in the files."""
    labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return self.images[index]

    def read(self, index: int) -> tuple[bytes, int | None]:
        return storage.read_file(self.images[index], storage.MAX_IMAGE_BYTES), None

    def fingerprint(self) -> str:
        """Hash the names, and the files' sizes and times."""
        return hash_lines(f"{path} {storage.state(path)}" for path in (*self.images, *self.masks))

    def mask(self, index: int, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Read the classes [h, w] of an image, 0 to K - 1, or IGNORE.

        Args:
            size: (h, w) of the upright image.

        Raises:
            InputError: the mask cannot be read, has another size, or has labels that are no class.
        """
        path = self.masks[index]
        try:
            stored = decode_mask(storage.read_file(path, storage.MAX_IMAGE_BYTES), path)
        except UndecodableImage as error:
            raise InputError(f"the mask {path} cannot be read: {error.cause}") from None
        if stored.shape != size:
            raise InputError(
                f"the mask {path} has {stored.shape[1]} x {stored.shape[0]} pixels, but its image (upright) has "
                f"{size[1]} x {size[0]}: save masks in the size of their images"
            )
        labels = self._table[stored]
        if (wrong := labels == _UNKNOWN).any():
            last = self.first + len(self.classes or range(MAX_CLASSES)) - 1
            raise InputError(
                f"the mask {path} has the label {stored[wrong][0]}, expected {self.first} to {last}, or {self.ignore} "
                "for ignored pixels: correct it, or give --classes or --ignore-label"
            )
        return labels

    def as_stored(self, labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Convert classes to labels as in the files."""
        return labels + np.uint8(self.first)

    @cached_property
    def _table(self) -> NDArray[np.uint8]:
        """Class of each label in the files, [256]."""
        table, count = np.full(256, _UNKNOWN, dtype=np.uint8), len(self.classes or range(MAX_CLASSES))
        table[: self.first] = IGNORE
        table[self.first : self.first + count] = np.arange(count)[: 256 - self.first]
        table[self.ignore] = IGNORE
        return table


def open_masks(
    data_path: str, layout: str = "auto", classes: int = 0, ignore_label: int = IGNORE, num_workers: int = -1
) -> tuple[MaskSource, MaskSource]:
    """Open the training and the validation part of a folder, and check all masks.

    Rank 0 reads every mask once; all ranks call this.

    Args:
        layout: ``auto`` or the name of one of :data:`LAYOUTS`.
        classes: number of classes; 0: that of the layout or of classes.txt, else the largest label + 1.
        ignore_label: label of pixels without a class.

    Raises:
        InputError: the layout is unknown, a part is missing or empty, files have no partner, or a mask is invalid.
    """
    if not data_path:
        raise InputError("no data given: add --data-path DIR, with images/train, masks/train, images/val, masks/val")
    root, found_layout = _find_layout(Path(data_path), layout)
    train, val = (_open_part(root, found_layout, part, ignore_label) for part in found_layout.parts)
    names = _class_names(root) or found_layout.names
    count = classes or len(names) or found_layout.count
    if names and len(names) != count:
        raise InputError(f"classes is {classes}, but {root} names {len(names)} classes: leave it out")

    def check() -> tuple[int, NDArray[np.int64]]:
        workers = choose_workers(num_workers, 1)
        pixels = _count_pixels(_with_classes(train, names, count), workers)
        found = count or int(np.flatnonzero(pixels[:IGNORE]).max(initial=-1)) + 1
        if found < 2:
            raise InputError(
                f"the training masks of {root} have {counted(found, 'class')} besides the ignored label "
                f"{ignore_label}, expected at least 2: masks have a label per pixel, such as 0 and 1"
            )
        if not _count_pixels(_with_classes(val, names, found), workers)[:found].any():
            raise InputError(f"all pixels of the masks in {val.url} are ignored: check the masks and --ignore-label")
        return found, pixels

    count, pixels = distributed.on_main(check)
    train, val = _with_classes(train, names, count), _with_classes(val, names, count)
    assert train.classes is not None
    absent = [name for name, some in zip(train.classes, pixels[:count], strict=True) if not some]
    if absent:
        shown = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
        log.warning(f"{len(absent)} of {counted(count, 'class')} have no pixel in the training masks: {shown}")
    return train, val


def _find_layout(folder: Path, wanted: str) -> tuple[Path, Layout]:
    tried = [layout for layout in LAYOUTS if wanted in ("auto", layout.name)]
    for layout in tried:
        for root in (folder, *(folder / inside for inside in layout.inside)):
            if all((root / one.format(layout.parts[0])).is_dir() for one in (layout.images, layout.masks)):
                return root, layout
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}: check --data-path")
    expected = "; ".join(
        f"{layout.images.format(layout.parts[0])} and {layout.masks.format(layout.parts[0])} ({layout.name})"
        for layout in tried
    )
    raise InputError(f"{folder} has no training images with masks: expected the folders {expected}")


def _open_part(root: Path, layout: Layout, part: str, ignore: int) -> MaskSource:
    images, masks = root / layout.images.format(part), root / layout.masks.format(part)
    listing = root / layout.listing.format(part) if layout.listing else None
    for needed in (images, masks, *filter(None, [listing])):
        if not needed.exists():
            raise InputError(f"{root} has no {needed.relative_to(root)}: expected a training and a validation part")
    by_name = {"image": _files(images, IMAGE_SUFFIXES), "mask": _files(masks, (".png",))}
    names = sorted(by_name["image"].keys() | by_name["mask"].keys()) if listing is None else _lines(listing)
    if not names:
        raise InputError(f"{listing or images} names no image: expected images, and PNG masks of the same name")
    for kind, other, place in (("image", "mask", images), ("mask", "image", masks)):
        if missing := [name for name in names if name not in by_name[kind]]:
            raise InputError(
                f"{counted(len(missing), other)} of {root} ({part}) without {kind}, the first is {missing[0]}: add a "
                f"file of this name to {place}, or remove the {other}"
            )
    paths = [tuple(str(files[name]) for name in names) for files in by_name.values()]
    return MaskSource(str(images if listing is None else listing), tuple(names), *paths, None, layout.first, ignore)


def _files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Return the files below a folder with one of these suffixes, by relative path without suffix."""
    found: dict[str, Path] = {}
    for where, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [one for one in folders if not one.startswith(".")]
        for file in sorted(files):
            if file.lower().endswith(suffixes) and not file.startswith("."):
                path = Path(where, file)
                name = path.relative_to(folder).with_suffix("").as_posix()
                if name in found:
                    raise InputError(f"{found[name]} and {path} have the same name: rename one of them, or remove it")
                found[name] = path
    return found


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {one_line(error)}; expected one name per line") from error
    return [line.strip() for line in text.split("\n") if line.strip()]


def _class_names(root: Path) -> tuple[str, ...]:
    path = root / "classes.txt"
    names = tuple(_lines(path)) if path.exists() else ()
    if len(set(names)) < len(names) or len(names) > MAX_CLASSES:
        raise InputError(f"{path} has {len(names)} names, expected at most {MAX_CLASSES} different ones")
    return names


def _with_classes(source: MaskSource, names: tuple[str, ...], count: int) -> MaskSource:
    """Set the class names, by default the labels in the files; 0 classes: unknown."""
    numbers = tuple(map(str, range(source.first, source.first + count)))
    return replace(source, classes=(names or numbers) if count else None)


def _count_pixels(source: MaskSource, workers: int) -> NDArray[np.int64]:
    """Return the number of pixels of each class, [256], and check every mask."""
    total = np.zeros(256, dtype=np.int64)
    found: Iterable[str | list[int]] = each_image(source, range(len(source)), _pixels_of, workers)
    with progress_bar(len(source), f"checking the masks of {source.url}", shown=True) as bar:
        for one in found:
            if isinstance(one, str):
                raise InputError(one)
            total += one
            bar.update()
    return total


def _pixels_of(source: MaskSource, index: int) -> list[int] | str:
    """Return the pixels of each class in a mask, or what is wrong with it."""
    try:
        width, height = read_header(source.read(index)[0]).size
        return np.bincount(source.mask(index, (height, width)).ravel(), minlength=256).tolist()
    except InputError as error:  # raised in a worker, it would arrive inside a traceback
        return str(error)
    except Exception as error:
        return f"{source.name(index)} cannot be read: {one_line(error)}; remove it, or save it again"
