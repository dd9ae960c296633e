"""Data sets in COCO's format: images, and objects with boxes, classes and masks. n: objects or detections of an image.

Annotations are read once and checked; after that, annotations and detections are dictionaries of this format.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from dino_xcit.data import UndecodableImage, storage
from dino_xcit.data.decode import image_size
from dino_xcit.data.index import Strings
from dino_xcit.data.masks import hint_for_scenes
from dino_xcit.data.source import evenly_spaced, hash_lines
from dino_xcit.errors import InputError, one_line
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import counted
from dino_xcit.transform import RGB, PixelFormat

JsonObject = dict[str, Any]
CHECKED = 100
"""Images whose sizes are compared with the annotations before training."""
SHOWN = 3
"""Annotations that a warning names."""


class CocoSource:
    """Images of a COCO annotation file (:class:`dino_xcit.data.Source`).

    The annotations are packed into one array of text, which workers share without copies.
    """

    labels: NDArray[np.int64] | None = None
    """None: an image has no single class."""

    def __init__(
        self, url: str, categories: dict[int, str], images: Sequence[JsonObject], annotations: list[list[JsonObject]]
    ) -> None:
        """``images`` have ``id``, ``path``, ``width`` and ``height``; ``annotations``: those of each image."""
        self.url = url
        self.categories = dict(sorted(categories.items()))
        """Names by category id. Label 1 is the first, and so on; 0 is the background."""
        self.classes: tuple[str, ...] | None = tuple(self.categories.values())
        self.image_ids = np.array([image["id"] for image in images], dtype=np.int64)
        self.sizes = np.array([[image["width"], image["height"]] for image in images], dtype=np.int64)
        """[images, 2]: width and height."""
        self.with_objects = np.flatnonzero([not all(one["iscrowd"] for one in rows) for rows in annotations])
        """Indices of the images with an object that is no crowd."""
        self._paths = Strings.pack(image["path"] for image in images)
        self._annotations = Strings.pack(map(json.dumps, annotations))

    def __len__(self) -> int:
        return len(self.image_ids)

    def name(self, index: int) -> str:
        return self._paths[index]

    def read(self, index: int) -> tuple[bytes, None]:
        return storage.read_file(self.name(index), storage.MAX_IMAGE_BYTES), None

    def check_size(self, index: int, width: int, height: int) -> None:
        """Raise UndecodableImage if image ``index``, after EXIF rotation, has another size than in the annotations."""
        expected = tuple(self.sizes[index].tolist())
        if (width, height) != expected:
            cause = f"it has {width} x {height} pixels, but the annotations say {expected[0]} x {expected[1]}"
            cause += "; annotate the upright image (EXIF rotation applied), or correct width and height"
            raise UndecodableImage(f"{self.name(index)} does not fit its annotations: {cause}", cause)

    def fingerprint(self) -> str:
        return hash_lines((str(self.categories), str(self.sizes.tolist()), *self._paths, *self._annotations))

    def annotation(self, index: int) -> bytes:
        return self._annotations[index].encode()

    def annotations(self, index: int, crowds: bool = True) -> list[JsonObject]:
        """Return the annotations of image ``index`` in COCO's format, with or without crowds.

        Training ignores crowds; the scorer counts no detection in them as wrong.
        """
        rows: list[JsonObject] = json.loads(self._annotations[index])
        return [one for one in rows if crowds or not one["iscrowd"]]

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


def corners(found: Sequence[JsonObject]) -> NDArray[np.float64]:
    """Return the boxes of annotations or results [n, 4]: left, top, right, bottom."""
    boxes = np.array([one["bbox"] for one in found], dtype=np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def decode_masks(found: Sequence[JsonObject], width: int, height: int) -> NDArray[np.uint8]:
    """Return the masks of annotations or results of an image, [n, height, width], 0 or 1."""
    if not found:
        return np.zeros((0, height, width), dtype=np.uint8)
    library = mask_library()
    runs = [library.segmToRle(one["segmentation"], width, height) for one in found]
    return np.ascontiguousarray(library.decode(runs).transpose(2, 0, 1))


# ---- opening


def find_split(root: str, part: str, annotations: str, images: str) -> tuple[Path, Path]:
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
    if root and not base.is_dir():
        raise InputError(f"there is no folder {root}: {hint_for_scenes(root) or 'check --data-path'}")
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


def open_coco(
    file: Path, folder: Path, masks: bool, like: CocoSource | None = None, format: PixelFormat = RGB
) -> CocoSource:
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
    annotations: list[list[JsonObject]] = [[] for _ in images]
    left_out: list[str] = []
    reaching_out: list[str] = []
    for row in _entries(content, "annotations", {"image_id": int, "category_id": int, "bbox": list}, refuse):
        for key, known in (("image_id", place_of), ("category_id", categories)):
            if row[key] not in known:
                refuse(f"has an annotation with the unknown {key} {row[key]}")
        image = images[place_of[row["image_id"]]]
        if problem := _problem_of(row, image, masks):
            left_out.append(f"{row.get('id', '?')} of {image['file_name']} ({problem})")
            continue
        if (
            row["bbox"][0] + row["bbox"][2] > image["width"] + 2
            or row["bbox"][1] + row["bbox"][3] > image["height"] + 2
        ):
            reaching_out.append(f"{row.get('id', '?')} of {image['file_name']}")
        kept = {key: row[key] for key in ("image_id", "category_id", "bbox")} | {
            "iscrowd": int(bool(row.get("iscrowd")))
        }
        area = row.get("area")
        kept["area"] = area if isinstance(area, (int, float)) else row["bbox"][2] * row["bbox"][3]
        annotations[place_of[row["image_id"]]].append(kept | ({"segmentation": row["segmentation"]} if masks else {}))
    if left_out:
        more = f" and {len(left_out) - SHOWN:,} more" if len(left_out) > SHOWN else ""
        log.warning(f"{file}: left out {counted(len(left_out), 'annotation')}: {', '.join(left_out[:SHOWN])}{more}")
    if reaching_out:
        log.warning(
            f"{file}: the boxes of {len(reaching_out):,} of {counted(len(content['annotations']), 'annotation')} reach "
            f"beyond their images, such as {reaching_out[0]}: a box is [left, top, width, height]"
        )
    source = CocoSource(str(file), categories, images, annotations)
    if not len(source.with_objects):
        without = masks and any("mask" in one for one in left_out)
        refuse("has no object with a mask (for boxes only, give --model faster-rcnn)" if without else "has no object")

    def check() -> None:
        _check_files([image["path"] for image in images], folder)
        _check_sizes(source, format)

    distributed.on_main(check)
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
        polygons = [one for one in segmentation if isinstance(one, list) and len(one) >= 6 and len(one) % 2 == 0]
        numbers = all(isinstance(value, (int, float)) for one in polygons for value in one)
        return numbers and len(polygons) == len(segmentation) > 0
    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        return False
    try:
        return bool(decode_masks([{"segmentation": segmentation}], width, height).any())
    except (LookupError, RuntimeError, TypeError, ValueError):
        return False


def _check_sizes(source: CocoSource, format: PixelFormat) -> None:
    """Raise UndecodableImage if most of :data:`CHECKED` images have another size than in their annotations; training
    replaces single ones."""
    checked, wrong = evenly_spaced(len(source), CHECKED), dict[int, tuple[int, int]]()
    for index in checked:
        with contextlib.suppress(UndecodableImage):  # training replaces it
            size = image_size(source, index, format)[::-1]
            if size != tuple(source.sizes[index].tolist()):
                wrong[index] = size
    if 2 * len(wrong) > len(checked):
        first = min(wrong)
        source.check_size(first, *wrong[first])


def _check_files(paths: Sequence[str], folder: Path) -> None:
    """Raise InputError if an image is missing; lists folders instead of asking for each file."""
    folders = {os.path.dirname(path) for path in paths}
    present = {os.path.join(one, name) for one in folders if os.path.isdir(one) for name in os.listdir(one)}
    if missing := [path for path in paths if path not in present]:
        raise InputError(
            f"{len(missing):,} of {counted(len(paths), 'image')} are missing, such as {missing[0]}: restore them, "
            f"remove their entries from the annotations, or give another folder than {folder}"
        )
