"""A small data set in COCO's format: coloured rectangles and ellipses on noise, with exact boxes and masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

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
    for seed, (part, count) in enumerate((("train", train), ("val", val))):
        folder = root / f"{part}2017"
        folder.mkdir(parents=True)
        write_annotations(root, part, drawn(folder, count, width, height, seed))
    return root


def drawn(folder: Path, count: int, width: int, height: int, seed: int) -> dict[str, Any]:
    """Draw images and return their annotations: polygons, run lengths for ellipses and crowds."""
    rng = np.random.default_rng(seed)
    images, annotations = [], list[dict[str, Any]]()
    for number in range(count):
        image = Image.fromarray(rng.integers(90, 140, (height, width, 3), dtype=np.uint8))
        name, image_id = f"{number:03d}.png", 100 + 7 * number
        for _ in range(0 if number == count - 1 else rng.integers(1, 4)):
            category = int(rng.choice([3, 7]))
            w, h = rng.integers(16, 32, 2).tolist()
            left, top = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
            mask = Image.new("1", image.size)
            box = (left, top, left + w - 1, top + h - 1)
            for canvas, ink in ((mask, 1), (image, COLOURS[category])):
                pen = ImageDraw.Draw(canvas)
                (pen.rectangle if category == 3 else pen.ellipse)(box, fill=ink)
            polygon = [left, top, left + w, top, left + w, top + h, left, top + h]
            annotations.append(
                {
                    "id": len(annotations), "image_id": image_id, "category_id": category, "iscrowd": 0,
                    "bbox": [left, top, w, h], "area": int(np.asarray(mask).sum()),
                    "segmentation": [polygon] if category == 3 else run_lengths(np.asarray(mask)),
                }
            )  # fmt: skip
        image.save(folder / name)
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
    crowd = np.zeros((height, width), dtype=bool)
    crowd[:20, :40] = True
    annotations.append(
        {
            "id": len(annotations), "image_id": 100, "category_id": 7, "iscrowd": 1, "bbox": [0, 0, 40, 20],
            "area": 800, "segmentation": run_lengths(crowd),
        }
    )  # fmt: skip
    categories = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def run_lengths(mask: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Return uncompressed run lengths of a mask: columns first, beginning with zeros."""
    flat = np.concatenate([[0], mask.T.reshape(-1).astype(int), [-1]])
    ends = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], ends])).tolist()
    return {"counts": counts, "size": list(mask.shape)}


def annotations_of(root: Path, part: str) -> dict[str, Any]:
    """Read the annotations of a part."""
    content: dict[str, Any] = json.loads((root / "annotations" / f"instances_{part}2017.json").read_text())
    return content


def write_annotations(root: Path, part: str, content: object) -> None:
    """Write the annotations of a part."""
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(content))
