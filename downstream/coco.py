"""Data sets in COCO's format: images, and objects with boxes, classes and masks. n: objects of an image."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from dino_xcit.data import UndecodableImage, storage
from dino_xcit.data.index import Strings
from dino_xcit.data.source import Item, hash_lines
from dino_xcit.errors import InputError, one_line
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import counted

JsonObject = dict[str, Any]
SHOWN = 3
"""Annotations that a warning names."""


@dataclass(frozen=True)
class Objects:
    """Objects of an image, as in the file."""

    boxes: NDArray[np.float64]
    """[n, 4]: left, top, width, height in pixels."""
    labels: NDArray[np.int64]
    """[n], from 1: see :attr:`CocoSource.categories`."""
    crowd: NDArray[np.bool_]
    """[n]: whether the box surrounds a crowd. Training ignores crowds; the scorer counts no detection in them as
    wrong."""
    areas: NDArray[np.float64]
    """[n] in pixels."""
    segmentations: list[Any]
    """Polygons or run lengths of each object; None without masks."""


class CocoSource:
    """Images of a COCO annotation file (:class:`dino_xcit.data.Source`). The objects are packed into few arrays, which
    workers share."""

    labels: NDArray[np.int64] | None = None
    """None: an image has no single class."""

    def __init__(self, url: str, categories: dict[int, str], images: Sequence[JsonObject], found: JsonObject) -> None:
        """``images``: with ``id``, ``path``, ``width`` and ``height``; ``found``: columns of all annotations, sorted by
        ``place``, the number of the image."""
        self.url = url
        self.categories = dict(sorted(categories.items()))
        """Names by category id. Label 1 is the first, and so on; 0 is the background."""
        self.category_ids = tuple(self.categories)
        self.classes: tuple[str, ...] | None = tuple(self.categories.values())
        self.image_ids = np.array([image["id"] for image in images], dtype=np.int64)
        self.sizes = np.array([[image["width"], image["height"]] for image in images], dtype=np.int64).reshape(-1, 2)
        """[images, 2]: width and height."""
        self._paths = Strings.pack(image["path"] for image in images)
        self._starts = np.searchsorted(found["place"], np.arange(len(images) + 1))
        self._boxes = np.array(found["bbox"], dtype=np.float64).reshape(-1, 4)
        self._labels = np.array(found["label"], dtype=np.int64)
        self._crowd = np.array(found["iscrowd"], dtype=np.bool_)
        self._areas = np.array(found["area"], dtype=np.float64)
        self._segmentations = Strings.pack(map(json.dumps, found["segmentation"]))

    def __len__(self) -> int:
        return len(self.image_ids)

    def name(self, index: int) -> str:
        return self._paths[index]

    def read(self, index: int) -> tuple[Item, None]:
        return storage.read_file(self.name(index), storage.MAX_IMAGE_BYTES), None

    def check_size(self, index: int, width: int, height: int) -> None:
        """Raise UndecodableImage if image ``index``, after EXIF rotation, has another size than in the annotations."""
        expected = tuple(self.sizes[index].tolist())
        if (width, height) != expected:
            cause = f"it has {width} x {height} pixels, but the annotations say {expected[0]} x {expected[1]}"
            raise UndecodableImage(f"{self.name(index)} does not fit its annotations: {cause}", cause)

    def fingerprint(self) -> str:
        columns = (self.image_ids, self.sizes, self._starts, self._boxes, self._labels, self._crowd, self._areas)
        texts = (str(column.tolist()) for column in columns)
        return hash_lines((*self._paths, *map(str, self.category_ids), *texts, *self._segmentations))

    def objects(self, index: int, crowds: bool = True) -> Objects:
        """Return the objects of image ``index``, with or without crowds."""
        rows = np.arange(self._starts[index], self._starts[index + 1])
        rows = rows if crowds else rows[~self._crowd[rows]]
        segmentations = [json.loads(self._segmentations[int(row)]) for row in rows]
        return Objects(self._boxes[rows], self._labels[rows], self._crowd[rows], self._areas[rows], segmentations)

    def runs(self, index: int) -> list[JsonObject]:
        """Return the masks of the objects of image ``index`` but crowds, in COCO's compressed run lengths."""
        masks, (width, height) = mask_library(), self.sizes[index].tolist()
        return [masks.segmToRle(one, width, height) for one in self.objects(index, crowds=False).segmentations]

    def with_objects(self) -> NDArray[np.int64]:
        """Return the indices of the images with an object that is no crowd."""
        objects = np.cumsum(np.concatenate([[0], ~self._crowd]))
        return np.flatnonzero(np.diff(objects[self._starts]))

    def annotations(self, index: int) -> list[JsonObject]:
        """Return the objects of image ``index`` in COCO's format, without ids of objects."""
        objects = self.objects(index)
        columns = (objects.labels, objects.boxes, objects.areas, objects.crowd, objects.segmentations)
        found: list[JsonObject] = []
        for label, box, area, crowd, segmentation in zip(*columns, strict=True):
            one = {
                "image_id": int(self.image_ids[index]), "category_id": self.category_ids[label - 1],
                "bbox": box.tolist(), "area": float(area), "iscrowd": int(crowd),
            }  # fmt: skip
            found.append(one if segmentation is None else one | {"segmentation": segmentation})
        return found

    def ground_truth(self) -> JsonObject:
        """Return all annotations in COCO's format, for the scorer."""
        annotations = [one for index in range(len(self)) for one in self.annotations(index)]
        sizes = zip(self.image_ids.tolist(), self.sizes.tolist(), strict=True)
        return {
            "images": [{"id": number, "width": width, "height": height} for number, (width, height) in sizes],
            "categories": [{"id": number, "name": name} for number, name in self.categories.items()],
            # The scorer takes id 0 for "no object".
            "annotations": [one | {"id": number} for number, one in enumerate(annotations, start=1)],
        }


def mask_library() -> Any:
    """Return faster-coco-eval's functions for masks.

    Raises:
        InputError: it is not installed.
    """
    try:
        from faster_coco_eval import mask
    except ImportError as error:
        raise InputError(
            f"detection needs faster-coco-eval ({one_line(error)}): pip install 'dino-xcit[downstream]'"
        ) from error
    return mask


def corners(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convert boxes [n, 4] from left, top, width, height to left, top, right, bottom."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


# ---- opening


def find_part(root: str, part: str, annotations: str, images: str) -> tuple[Path, Path]:
    """Return the annotation file and the folder of images of a part.

    Args:
        root: folder in COCO's layout; may be empty if the other two are given.
        part: ``train`` or ``val``.
        annotations, images: override the files of ``root``; may be empty.

    Raises:
        InputError: there is no such file or folder.
    """
    if not root and not (annotations and images):
        raise InputError(
            f"no {part} data given: add --data-path DIR in COCO's layout, or --{part}-images and --{part}-annotations"
        )
    base = Path(root)
    if annotations:
        file = Path(annotations)
    else:
        usual = base / "annotations" / f"instances_{part}2017.json"
        files = [usual] if usual.exists() else sorted(usual.parent.glob(f"instances_{part}*.json"))
        if len(files) != 1:
            found = f"{', '.join(one.name for one in files)} in {usual.parent}" if files else f"there is no {usual}"
            raise InputError(f"{found}: give --{part}-annotations FILE, annotations in COCO's format")
        file = files[0]
    names = (f"{part}2017", part, f"images/{part}2017", f"images/{part}")
    folders = [Path(images)] if images else [base / name for name in names]
    folder = next((one for one in folders if one.is_dir()), None)
    if folder is None:
        raise InputError(f"there is no folder {' or '.join(map(str, folders))}: give --{part}-images DIR")
    return file, folder


def open_coco(file: Path, folder: Path, masks: bool, like: CocoSource | None = None) -> CocoSource:
    """Open images and their annotations; checks all of them. Must be called on every rank.

    Objects without a usable box (or mask, if there are masks) are left out with a warning.

    Args:
        masks: whether each object needs a mask.
        like: the training images, whose classes these images must have.

    Raises:
        InputError: the file is not in COCO's format, has no objects, or images are missing.
    """

    def refuse(why: str) -> NoReturn:
        raise InputError(f"{file} {why}; expected annotations in COCO's format, with images, annotations, categories")

    content = _read_json(file, refuse)
    categories: dict[int, str] = {}
    for category in _entries(content, "categories", {"id": int, "name": str}, refuse):
        if category["id"] in categories:
            refuse(f"has two categories with id {category['id']}")
        categories[category["id"]] = category["name"]
    if like is not None:
        if others := [f"{one} ({name})" for one, name in categories.items() if like.categories.get(one) != name]:
            raise InputError(f"{file} has the category {others[0]}, which {like.url} lacks: give parts of one data set")
        categories = like.categories
    images: list[JsonObject] = []
    place_of: dict[int, int] = {}
    for image in _entries(content, "images", {"id": int, "file_name": str, "width": int, "height": int}, refuse):
        if image["id"] in place_of:
            refuse(f"has two images with id {image['id']}")
        place_of[image["id"]] = len(images)
        images.append({**image, "path": str(folder / image["file_name"])})
    label_of = {number: label for label, number in enumerate(sorted(categories), start=1)}
    rows: list[tuple[Any, ...]] = []
    left_out: list[str] = []
    for row in _entries(content, "annotations", {"image_id": int, "category_id": int, "bbox": list}, refuse):
        for key, known_ids in (("image_id", place_of), ("category_id", label_of)):
            if row[key] not in known_ids:
                refuse(f"has an annotation with the unknown {key} {row[key]}")
        image = images[place_of[row["image_id"]]]
        if problem := _problem_of(row, image, masks):
            left_out.append(f"{row.get('id', '?')} of {image['file_name']} ({problem})")
            continue
        area = row.get("area")
        area = area if isinstance(area, (int, float)) else row["bbox"][2] * row["bbox"][3]
        segmentation = row["segmentation"] if masks else None
        label, place = label_of[row["category_id"]], place_of[row["image_id"]]
        rows.append((place, row["bbox"], label, bool(row.get("iscrowd")), area, segmentation))
    if left_out:
        more = f" and {len(left_out) - SHOWN:,} more" if len(left_out) > SHOWN else ""
        log.warning(f"{file}: left out {counted(len(left_out), 'annotation')}: {', '.join(left_out[:SHOWN])}{more}")
    if all(row[3] for row in rows):
        without = masks and any("mask" in one for one in left_out)
        refuse("has no object with a mask (for boxes only, give --model faster-rcnn)" if without else "has no object")
    rows.sort(key=lambda row: row[0])
    names = ("place", "bbox", "label", "iscrowd", "area", "segmentation")
    source = CocoSource(str(file), categories, images, dict(zip(names, zip(*rows, strict=True), strict=True)))
    distributed.on_main(lambda: _check_files([image["path"] for image in images], folder))
    return source


def _read_json(file: Path, refuse: Callable[[str], NoReturn]) -> JsonObject:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read the annotations {file}: {one_line(error)}; check the path") from error
    except (ValueError, RecursionError) as error:
        refuse(f"is not JSON ({one_line(error)})")
    if not isinstance(content, dict):
        refuse(f"is a {type(content).__name__}")
    return content


def _entries(
    content: JsonObject, name: str, kinds: dict[str, type], refuse: Callable[[str], NoReturn]
) -> list[JsonObject]:
    """Return a list of the file; each element has the keys of ``kinds`` with values of these types."""
    entries = content.get(name)
    if not isinstance(entries, list) or not entries:
        refuse(f"has no {name}")
    for number, entry in enumerate(entries):
        for key, kind in kinds.items():
            value = entry.get(key) if isinstance(entry, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool):
                refuse(f"has {value!r:.40} as {key} of {name}[{number}]")
    return entries


def _problem_of(row: JsonObject, image: JsonObject, masks: bool) -> str:
    """Return why an annotation is unusable; empty if it is not."""
    box, (width, height) = row["bbox"], (image["width"], image["height"])
    if len(box) != 4 or not all(isinstance(value, (int, float)) for value in box):
        return "its box is not 4 numbers"
    if not (box[2] > 0 and box[3] > 0):  # also false for NaN
        return "its box has no area"
    if not (box[0] < width and box[1] < height and box[0] + box[2] > 0 and box[1] + box[3] > 0):
        return "its box is outside the image"
    return "" if not masks or _is_mask(row.get("segmentation"), width, height) else "it has no valid mask"


def _is_mask(segmentation: object, width: int, height: int) -> bool:
    """Whether a segmentation is a list of polygons, or run lengths of this size."""
    if isinstance(segmentation, list):
        return any(isinstance(polygon, list) and len(polygon) >= 6 for polygon in segmentation)
    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        return False
    counts = segmentation.get("counts")
    if isinstance(counts, list):
        return all(isinstance(count, int) for count in counts) and sum(counts) == width * height
    try:
        return isinstance(counts, str) and bool(mask_library().decode(segmentation).any())
    except (RuntimeError, ValueError):
        return False


def _check_files(paths: Sequence[str], folder: Path) -> None:
    """Raise InputError if an image is missing; lists folders instead of asking for each file."""
    present = {
        parent: set(os.listdir(parent)) if os.path.isdir(parent) else set() for parent in map(os.path.dirname, paths)
    }
    if missing := [path for path in paths if os.path.basename(path) not in present[os.path.dirname(path)]]:
        raise InputError(
            f"{len(missing):,} of {counted(len(paths), 'image')} are missing, such as {missing[0]}: the annotations do "
            f"not belong to {folder}; give another folder of images"
        )
