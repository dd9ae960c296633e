"""Scenes of Fashion-MNIST objects on textures, with masks: a small, real data set for detection and segmentation.

    python -m dino_xcit.data scenes DST

writes it in COCO form (``images/``, ``annotations/``) and as index masks (``masks/``, ``classes.txt``).

Objects are cut out by their silhouettes, scaled, coloured at random and pasted on dark textures and, where scikit-learn
is installed, on one of its two photographs. Each scene is a function of (part, index). Test scenes have objects,
textures and a photograph that no training scene has.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from annotated_types import Ge, MinLen
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from dino_xcit.bounds import FilePath, Positional
from dino_xcit.cli import parse
from dino_xcit.data.sample import CLASSES, open_sample
from dino_xcit.data.source import Item
from dino_xcit.errors import InputError
from dino_xcit.runtime import atomic
from dino_xcit.runtime.logging import progress_bar

SIZE = 128
"""Side of a scene in pixels."""
COUNTS = {"train": 4000, "val": 500}
MAX_OBJECTS = 5
TEXTURES = 16
"""Number of textures of each part. With one for each scene, pretraining would tell scenes apart by their textures."""
_SIDES = (48, 72)
"""Minimum and maximum side of the square that holds an object, in pixels."""
_VISIBLE = 0.6
"""Minimum share of an object that later objects leave visible."""
_THRESHOLD = 16
"""Pixels of Fashion-MNIST above this value belong to the object."""
_PHOTOGRAPH_SHARE = 0.1
"""Share of the scenes with a photograph as background."""
_PHOTOGRAPHS = {"train": "china.jpg", "val": "flower.jpg"}

Pixels = NDArray[np.uint8]


class SceneObject(NamedTuple):
    """An object of a scene."""

    label: int
    mask: NDArray[np.bool_]
    """[SIZE, SIZE], the visible pixels."""


class Scenes:
    """Source of scenes: with one to five objects and no labels, or with one object and its class as label."""

    def __init__(self, part: str, single: bool) -> None:
        """``part``: ``train`` or ``val``."""
        self.url = f"sample:{'scene-objects' if single else 'scenes'}/{part}"
        self.part, self.single = part, single
        self._objects = open_sample("fashion-mnist", part)
        self.classes: tuple[str, ...] | None = CLASSES if single else None
        self.labels: NDArray[np.int64] | None = None
        if single:
            assert self._objects.labels is not None
            first = [int(self._generator(index).integers(len(self._objects))) for index in range(len(self))]
            self.labels = self._objects.labels[first]

    def __len__(self) -> int:
        return COUNTS[self.part]

    def read(self, index: int) -> tuple[Item, int | None]:
        pixels, _ = self.scene(index)
        return pixels, None if self.labels is None else int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.url}/{range(len(self))[index]:05d}"

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.url}\n{self._objects.fingerprint()}\n".encode())
        for index in range(16):  # drawn from all settings above
            digest.update(self.scene(index)[0].tobytes())
        return digest.hexdigest()

    def scene(self, index: int) -> tuple[Pixels, list[SceneObject]]:
        """Compose a scene: pixels [SIZE, SIZE, 3], and its objects in the order of pasting."""
        generator = self._generator(index)
        chosen = [int(generator.integers(len(self._objects)))]  # the first draw, which decides the label
        if not self.single:
            chosen += generator.integers(len(self._objects), size=generator.integers(MAX_OBJECTS)).tolist()
        pixels = _background(generator, self.part)
        objects: list[SceneObject] = []
        areas: list[int] = []
        for number in chosen:
            for _ in range(10):  # places at which no earlier object is covered too much
                colours, mask = _pasted(generator, self._objects.images[number])
                kept = [one.mask & ~mask for one in objects]
                if all(left.sum() >= _VISIBLE * area for left, area in zip(kept, areas, strict=True)):
                    assert self._objects.labels is not None
                    objects = [SceneObject(one.label, left) for one, left in zip(objects, kept, strict=True)]
                    objects.append(SceneObject(int(self._objects.labels[number]), mask))
                    areas.append(int(mask.sum()))
                    pixels[mask] = colours[mask]
                    break
        return pixels, objects

    def _generator(self, index: int) -> np.random.Generator:
        return np.random.default_rng([list(COUNTS).index(self.part), self.single, index])


def open_scenes(name: str, part: str) -> Scenes:
    """Open the scenes.

    Args:
        name: ``scenes`` or ``scene-objects`` (one object each, with labels).
        part: ``train`` or ``val``.

    Raises:
        InputError: the name is unknown.
    """
    if name not in ("scenes", "scene-objects"):
        raise InputError(f"unknown sample {name!r}: expected sample:scenes or sample:scene-objects")
    return Scenes(part, single=name == "scene-objects")


@cache
def _photograph(part: str) -> Pixels | None:
    """Return the photograph of a part, [height, width, 3], or None without scikit-learn."""
    if importlib.util.find_spec("sklearn") is None:
        return None
    from sklearn.datasets import load_sample_image

    return np.asarray(load_sample_image(_PHOTOGRAPHS[part]), dtype=np.uint8)


@cache
def _textures(part: str) -> list[Pixels]:
    """Return the textures of a part, [2 * SIZE, 2 * SIZE, 3] each: dark noise of several scales, in pale colours."""
    generator = np.random.default_rng([list(COUNTS).index(part), TEXTURES])
    textures = []
    for _ in range(TEXTURES):
        total = np.zeros((2 * SIZE, 2 * SIZE, 3))
        for weight in generator.dirichlet(np.ones(3)):
            shape = (*generator.integers(3, 40, size=2), 3)  # stretched along one axis: clouds, spots and stripes
            grid = generator.integers(0, 256, size=shape, dtype=np.uint8)
            total += weight * np.asarray(Image.fromarray(grid).resize(total.shape[:2], Image.Resampling.BICUBIC))
        textures.append((generator.uniform(10, 50) + 0.15 * total).clip(0, 255).astype(np.uint8))
    return textures


def _background(generator: np.random.Generator, part: str) -> Pixels:
    """Return a random part of a texture, or in some scenes of the photograph; [SIZE, SIZE, 3]."""
    photograph = _photograph(part)
    if photograph is not None and generator.random() < _PHOTOGRAPH_SHARE:
        whole = photograph
    else:
        whole = _textures(part)[int(generator.integers(TEXTURES))]
    side = int(generator.integers(SIZE, min(whole.shape[:2])))
    top, left = (int(generator.integers(length - side + 1)) for length in whole.shape[:2])
    crop = Image.fromarray(whole[top : top + side, left : left + side])
    return np.array(crop.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _pasted(generator: np.random.Generator, grey: Pixels) -> tuple[Pixels, NDArray[np.bool_]]:
    """Scale and colour an object, and place it: pixels [SIZE, SIZE, 3] and mask [SIZE, SIZE]."""
    side = int(generator.integers(_SIDES[0], _SIDES[1] + 1))
    top, left = generator.integers(SIZE - side + 1, size=2)
    size = (side, side)
    shade = np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BICUBIC), dtype=np.float64) / 255
    outline = Image.fromarray(255 * silhouette(grey).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    colour = generator.uniform(130, 255, size=3)
    pixels = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
    mask = np.zeros((SIZE, SIZE), dtype=np.bool_)
    place = slice(top, top + side), slice(left, left + side)
    pixels[place] = (colour * (0.35 + 0.65 * shade[..., None])).astype(np.uint8)
    mask[place] = np.asarray(outline) >= 128
    return pixels, mask


def silhouette(grey: Pixels) -> NDArray[np.bool_]:
    """Return the mask [28, 28] of the object in an image of Fashion-MNIST: the largest component, holes filled."""
    parts, count = ndimage.label(grey > _THRESHOLD)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    sizes[0] = 0
    filled: NDArray[np.bool_] = ndimage.binary_fill_holes(parts == sizes.argmax())
    return filled


# ---- files


@dataclass(frozen=True)
class ScenesConfig:
    """Write the scenes of sample:scenes as files, in COCO form and as index masks."""

    folder: Annotated[FilePath, MinLen(1), Positional] = ""
    """Folder to write (the flag --folder itself may be omitted)."""
    train: Annotated[int, Ge(1)] = COUNTS["train"]
    """Number of training scenes."""
    val: Annotated[int, Ge(1)] = COUNTS["val"]
    """Number of validation scenes."""


def main(argv: Sequence[str]) -> int:
    """Write the scenes and return the exit code.

    Raises:
        InputError: the command line is invalid, or the folder cannot be written.
    """
    config = parse(ScenesConfig, argv, "python -m dino_xcit.data scenes")
    for part in COUNTS:
        if getattr(config, part) > COUNTS[part]:
            raise InputError(f"{part} is {getattr(config, part)}, expected at most {COUNTS[part]}")
    folder = Path(config.folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty: give a new folder, or remove it")
    try:
        write_scenes(Path(config.folder), config.train, config.val)
    except OSError as error:
        raise InputError(f"cannot write {config.folder}: {error.strerror}; give another folder") from error
    print(f"written: {config.folder} (images, annotations, masks, classes.txt)")
    return 0


def write_scenes(folder: Path, train: int = COUNTS["train"], val: int = COUNTS["val"]) -> None:
    """Write ``images/PART/*.png``, ``masks/PART/*.png`` (0: background), ``annotations/instances_PART.json`` in COCO
    form, and ``classes.txt``."""
    for part, count in (("train", train), ("val", val)):
        scenes = open_scenes("scenes", part)
        for name in ("images", "masks"):
            (folder / name / part).mkdir(parents=True, exist_ok=True)
        images: list[dict[str, object]] = []
        annotations: list[dict[str, object]] = []
        with progress_bar(count, f"scenes, {part}", shown=True) as bar:
            for index in range(count):
                pixels, objects = scenes.scene(index)
                semantic = np.zeros((SIZE, SIZE), dtype=np.uint8)
                for one in objects:
                    semantic[one.mask] = 1 + one.label
                    annotations.append(_annotation(one, len(annotations) + 1, index + 1))
                name = f"{index:05d}.png"
                images.append({"id": index + 1, "file_name": name, "width": SIZE, "height": SIZE})
                for kind, array in (("images", pixels), ("masks", semantic)):
                    buffer = io.BytesIO()
                    Image.fromarray(array).save(buffer, format="PNG", compress_level=1)
                    (folder / kind / part / name).write_bytes(buffer.getvalue())
                bar.update(1)
        categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations").mkdir(exist_ok=True)
        atomic.write(
            folder / "annotations" / f"instances_{part}.json",
            lambda file, content=content: file.write(json.dumps(content).encode()),  # type: ignore[misc]
        )
    (folder / "classes.txt").write_text("\n".join(["background", *CLASSES]) + "\n", encoding="utf-8")


def _annotation(one: SceneObject, number: int, image: int) -> dict[str, object]:
    """Return an annotation in COCO form; the mask is an uncompressed run-length encoding, column by column."""
    rows, columns = (np.flatnonzero(one.mask.any(axis=axis)) for axis in (1, 0))
    box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
    flat = one.mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *ends, flat.size]).tolist()
    return {
        "id": number,
        "image_id": image,
        "category_id": 1 + one.label,
        "bbox": [int(value) for value in box],
        "area": int(one.mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": [SIZE, SIZE], "counts": [0, *counts] if flat[0] else counts},
    }
