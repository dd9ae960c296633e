"""Images with segmentation masks: layouts of folders, pairing by name, reading and checking masks.

K: classes; h, w: size of an image.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dino_xcit.data import storage
from dino_xcit.data.decode import UndecodableImage, decode_mask, image_size
from dino_xcit.data.folder import ARRAY_SUFFIX, IMAGE_SUFFIXES
from dino_xcit.data.source import Source, hash_lines
from dino_xcit.data.workers import choose_workers, each_image
from dino_xcit.errors import InputError
from dino_xcit.runtime import distributed
from dino_xcit.runtime.logging import counted, progress_bar
from dino_xcit.transform import RGB, PixelFormat

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
    class_count: int = 0
    """0: unknown."""
    names: tuple[str, ...] = ()
    first: int = 0
    """Label of the first class; lower labels are ignored."""


LAYOUTS = (
    Layout("ade20k", "images/{}", "annotations/{}", parts=("training", "validation"), class_count=150, first=1),
    Layout("voc", "JPEGImages", "SegmentationClass", "ImageSets/Segmentation/{}.txt", class_count=21, names=_VOC),
    Layout("folder", "images/{}", "masks/{}"),
    Layout("folder", "{}/images", "{}/masks"),
)


class MaskSettings(Protocol):
    """Settings of a command that opens images with masks."""

    @property
    def data_path(self) -> str: ...
    @property
    def layout(self) -> str: ...
    @property
    def classes(self) -> int: ...
    @property
    def ignore_label(self) -> int: ...
    @property
    def num_workers(self) -> int: ...


@dataclass(eq=False)
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

    def read(self, index: int) -> tuple[bytes, None]:
        return storage.read_file(self.images[index], storage.MAX_IMAGE_BYTES), None

    def fingerprint(self) -> str:
        """Hash the names, and the files' sizes and times."""
        return hash_lines(f"{path} {storage.state(path)}" for path in (*self.images, *self.masks))

    def annotation(self, index: int) -> bytes:
        return storage.read_file(self.masks[index], storage.MAX_IMAGE_BYTES)

    def mask(self, index: int, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Read the classes [h, w] of an image, 0 to K - 1, or IGNORE.

        Args:
            size: (h, w) of the upright image.

        Raises:
            InputError: the mask cannot be read, has another size, or has labels that are no class.
        """
        path = self.masks[index]
        try:
            stored = decode_mask(self.annotation(index), path)
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
                "for ignored pixels: correct it, add its name to classes.txt (without that file, give --classes), or "
                "give --ignore-label"
            )
        return labels

    @cached_property
    def _table(self) -> NDArray[np.uint8]:
        """Class of each label in the files, [256]."""
        table, count = np.full(256, _UNKNOWN, dtype=np.uint8), len(self.classes or range(MAX_CLASSES))
        table[: self.first] = IGNORE
        table[self.first : self.first + count] = np.arange(count)[: 256 - self.first]
        table[self.ignore] = IGNORE
        return table


def open_masks(config: MaskSettings, format: PixelFormat = RGB) -> tuple[MaskSource, MaskSource]:
    """Open the training and the validation part of ``config.data_path``, and check all masks.

    Rank 0 reads every mask once; all ranks call this.

    Args:
        config: data path, layout and labels.
        format: pixel format of the images.

    Raises:
        InputError: the layout is unknown, a part is missing or empty, files have no partner, or a mask is invalid.
    """
    if not config.data_path:
        raise InputError("no data given: add --data-path DIR, with images/train, masks/train, images/val, masks/val")
    root = Path(config.data_path)
    if not root.is_dir():
        raise InputError(f"there is no folder {root}: {hint_for_scenes(config.data_path) or 'check --data-path'}")
    layout = _find_layout(root, config.layout)
    if config.ignore_label == layout.first == 0:  # the other classes follow
        layout = layout._replace(first=1)
    train, val = (_open_part(root, layout, part, config.ignore_label) for part in layout.parts)
    names = tuple(_lines(root / "classes.txt")) if (root / "classes.txt").exists() else layout.names
    names = names[1:] if config.ignore_label == 0 and layout.name != "ade20k" else names
    count = config.classes or len(names) or layout.class_count
    if len(names) not in (0, count):
        raise InputError(
            f"classes is {count}, but {root} names {len(names)} classes: leave out --classes, or correct classes.txt"
        )

    def check() -> int:
        workers = choose_workers(config.num_workers, 1)
        pixels = _count_pixels(_with_classes(train, names, count), workers, format)
        found = count or int(np.flatnonzero(pixels[:IGNORE]).max(initial=-1)) + 1
        if not 2 <= found <= MAX_CLASSES:
            raise InputError(
                f"{root} has {counted(found, 'class')} besides the ignored label {config.ignore_label}, expected 2 to "
                f"{MAX_CLASSES}: masks have a label per pixel, such as 0 and 1"
            )
        if layout.first <= config.ignore_label < layout.first + found:
            raise InputError(
                f"ignore_label is {config.ignore_label}, a class of {root}: expected 0, or a label that is no class"
            )
        if not _count_pixels(_with_classes(val, names, found), workers, format)[:found].any():
            raise InputError(f"all pixels of the masks of {val.url} are ignored: check the masks and --ignore-label")
        return found

    count = distributed.on_main(check)
    return _with_classes(train, names, count), _with_classes(val, names, count)


def hint_for_scenes(data_path: str) -> str:
    """Return how to write the scenes as files, if ``data_path`` names them."""
    if not data_path.startswith("sample:scene"):
        return ""
    return "run python -m dino_xcit.data scenes DIR, and give --data-path DIR"


def _find_layout(root: Path, wanted: str) -> Layout:
    expected = []
    for layout in LAYOUTS:
        needed = [one.format(layout.parts[0]) for one in (layout.images, layout.masks)]
        if wanted in ("auto", layout.name):
            if all((root / one).is_dir() for one in needed):
                return layout
            expected.append(f"{' and '.join(needed)} ({layout.name})")
    raise InputError(f"{root} has no training images with masks: expected the folders {'; '.join(expected)}")


def _open_part(root: Path, layout: Layout, part: str, ignore: int) -> MaskSource:
    images, masks, listing = (root / one.format(part) for one in (layout.images, layout.masks, layout.listing))
    for needed in (images, masks, listing):
        if not needed.exists():
            raise InputError(f"{root} has no {needed.relative_to(root)}: expected a training and a validation part")
    found = _files(images, IMAGE_SUFFIXES) or _files(images, (ARRAY_SUFFIX,))
    by_name = {"image": found, "mask": _files(masks, (".png",))}
    names = _lines(listing) if layout.listing else sorted(by_name["image"].keys() | by_name["mask"].keys())
    if not names:
        raise InputError(f"{root} ({part}) has no image: expected images, and PNG masks of the same name")
    for kind, other, place in (("image", "mask", images), ("mask", "image", masks)):
        if missing := [name for name in names if name not in by_name[kind]]:
            raise InputError(
                f"no {kind} for {counted(len(missing), other)} of {root} ({part}), such as {missing[0]}: add a "
                f"{'.png' if kind == 'mask' else 'file'} of this name to {place}, or remove the {other}"
            )
    paths = {kind: tuple(str(files[name]) for name in names) for kind, files in by_name.items()}
    url = str(listing if layout.listing else images)
    return MaskSource(url, tuple(names), paths["image"], paths["mask"], None, layout.first, ignore)


def _files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Return the files below a folder with one of these suffixes, by relative path without suffix."""
    found: dict[str, Path] = {}
    for where, _, files in os.walk(folder, followlinks=True):
        for file in sorted(files):
            path = Path(where, file)
            name = path.relative_to(folder).with_suffix("").as_posix()
            if file.lower().endswith(suffixes) and not file.startswith("."):
                if name in found:
                    raise InputError(f"{found[name]} and {path} have the same name: rename one of them, or remove it")
                found[name] = path
    return found


def _lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    return [line.strip() for line in lines if line.strip()]


def _with_classes(source: MaskSource, names: tuple[str, ...], count: int) -> MaskSource:
    """Set the class names, by default the labels in the files; 0 classes: unknown."""
    numbers = tuple(map(str, range(source.first, source.first + count)))
    return replace(source, classes=(names or numbers) if count else None)


def _count_pixels(source: MaskSource, workers: int, format: PixelFormat) -> NDArray[np.int64]:
    """Return the number of pixels of each class, [256], and check every mask."""
    total = np.zeros(256, dtype=np.int64)
    wrong: list[str] = []
    with progress_bar(len(source), f"checking the masks of {source.url}", shown=True) as bar:
        for one in each_image(source, range(len(source)), partial(_pixels_of, format=format), workers):
            if isinstance(one, str):
                wrong.append(one)
            else:
                total += one
            bar.update()
    if wrong:
        raise InputError(f"{wrong[0]} ({counted(len(wrong), 'invalid mask')} of {len(source):,})")
    return total


def _pixels_of(source: Source, index: int, format: PixelFormat) -> list[int] | str:
    """Return the pixels of each class in a mask, or what is wrong with it."""
    assert isinstance(source, MaskSource)
    try:
        return np.bincount(source.mask(index, image_size(source, index, format)).ravel(), minlength=256).tolist()
    except InputError as error:  # raised in a worker, it would arrive inside a traceback
        return str(error)
