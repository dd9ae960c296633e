"""A small data set in COCO's format: coloured rectangles and ellipses on noise, with exact boxes and masks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

Content = dict[str, Any]

CATEGORIES = {3: "rectangle", 7: "ellipse"}
"""Ids with gaps."""
COLOURS = {3: (230, 40, 40), 7: (40, 70, 230)}

TINY = (
    "--weights", "none", "--arch", "xcit_pico_4_p8", "--device", "cpu", "--num-workers", "0", "--fpn-width", "16",
    "--box-head-width", "32", "--rois", "32", "--proposals", "50", "--short-sides", "64", "--test-side", "64",
    "--long-side", "96", "--crop-short-sides", "64", "--crop-sides", "48", "64", "--batch-size-per-gpu", "2",
    "--epochs", "2", "--warmup-steps", "1", "--lr-reference-batch", "0", "--log-every", "1",
)  # fmt: skip
"""Flags of run_detect.py for seconds on a CPU."""


def make_coco(root: Path, train: int = 6, val: int = 3, width: int = 80, height: int = 64) -> Path:
    """Write COCO's layout of 2017 to ``root``. The first image of each part has a crowd, the last has no object."""
    (root / "annotations").mkdir(parents=True)
    for seed, (part, count) in enumerate((("train", train), ("val", val))):
        (root / f"{part}2017").mkdir()
        content = _draw(root / f"{part}2017", count, width, height, np.random.default_rng(seed))
        annotation_file(root, part).write_text(json.dumps(content))
    return root


def annotation_file(root: Path, part: str = "train") -> Path:
    """Return the annotation file of a part."""
    return root / "annotations" / f"instances_{part}2017.json"


def change(root: Path, part: str = "train", **changes: Callable[[list[Content]], object]) -> Content:
    """Replace values of the annotation file by functions of them; return its content."""
    content: Content = json.loads(annotation_file(root, part).read_text())
    content |= {key: make(content[key]) for key, make in changes.items()}
    annotation_file(root, part).write_text(json.dumps(content))
    return content


def _draw(folder: Path, count: int, width: int, height: int, rng: np.random.Generator) -> Content:
    """Draw images and return their annotations: polygons of rectangles, run lengths of ellipses and a crowd."""
    images, rows = [], list[Content]()

    def add(image_id: int, category: int, box: list[int], crowd: int, mask: np.ndarray[Any, Any]) -> None:
        left, top, w, h = box
        polygon = [left, top, left + w, top, left + w, top + h, left, top + h]
        rows.append(
            {
                "id": 10 + len(rows), "image_id": image_id, "category_id": category, "iscrowd": crowd, "bbox": box,
                "area": int(mask.sum()), "segmentation": [polygon] if category == 3 else run_lengths(mask),
            }
        )  # fmt: skip

    for number in range(count):
        image = Image.fromarray(rng.integers(90, 140, (height, width, 3), dtype=np.uint8))
        name, image_id = f"{number:03d}.png", 100 + 7 * number
        for _ in range(0 if number == count - 1 else rng.integers(1, 4)):
            category, mask = int(rng.choice([3, 7])), Image.new("1", image.size)
            w, h = rng.integers(16, 42, 2).tolist()
            left, top = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
            for canvas, ink in ((mask, 1), (image, COLOURS[category])):
                pen = ImageDraw.Draw(canvas)
                (pen.rectangle if category == 3 else pen.ellipse)((left, top, left + w - 1, top + h - 1), fill=ink)
            add(image_id, category, [left, top, w, h], 0, np.asarray(mask))
        image.save(folder / name)
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
    crowd = np.zeros((height, width), dtype=bool)
    crowd[:20, :40] = True
    add(100, 7, [0, 0, 40, 20], 1, crowd)
    return {
        "images": images, "annotations": rows,
        "categories": [{"id": number, "name": name} for number, name in CATEGORIES.items()],
    }  # fmt: skip


def run_lengths(mask: np.ndarray[Any, Any]) -> Content:
    """Return uncompressed run lengths of a mask: columns first, beginning with zeros."""
    flat = np.concatenate([[0], mask.T.reshape(-1).astype(int), [-1]])
    ends = np.concatenate([[0], np.flatnonzero(np.diff(flat))])
    return {"counts": np.diff(ends).tolist(), "size": list(mask.shape)}
