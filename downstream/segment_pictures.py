"""Pictures of segmentations: validation images beside their ground truth, and the user's own pictures."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dino_xcit import safe_load
from dino_xcit.bounds import marked
from dino_xcit.config import StateField
from dino_xcit.data.decode import decode
from dino_xcit.data.folder import open_folder
from dino_xcit.errors import InputError
from dino_xcit.runtime import atomic, distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import counted
from downstream.config import SCRATCH
from downstream.masks import MaskSource
from downstream.segment_config import SegmentConfig
from downstream.segmentation import Score, Segmenter, Tester, write_mask
from downstream.supervised import Start
from eval.miou import IGNORE
from eval.palette import colours, legend, overlay
from eval.sheet import Cell, draw_sheet

SIDE = 320
"""Longer side of an image in a sheet, in pixels."""


class Picture(NamedTuple):
    """An image and its segmentations."""

    name: str
    image: Image.Image
    labels: Mapping[str, NDArray[np.uint8]]
    """Classes [h, w] by title."""


def draw(pictures: Sequence[Picture], classes: Sequence[str]) -> Image.Image:
    """Draw a row for each picture (the image, then each segmentation over it), and a legend of the classes in them."""
    ink, rows, present = colours(len(classes)), [], set[int]()
    for name, image, segmentations in pictures:
        scale = SIDE / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        small = image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)
        rows.append([Cell(small, os.path.basename(name), f"{image.width} x {image.height}")])
        for title, labels in segmentations.items():
            present |= set(np.unique(labels).tolist()) - {IGNORE}
            shown = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
            rows[-1].append(Cell(overlay(small, shown, ink), title, ""))
    names = {number: classes[number] for number in sorted(present)}
    key = legend(names, ink, SIDE * max(map(len, rows)))
    sheet = draw_sheet(rows)
    whole = Image.new("RGB", (sheet.width, sheet.height + key.height), "white")
    whole.paste(sheet)
    whole.paste(key, (20, sheet.height - 10))
    return whole


def write_overlays(path: Path, source: MaskSource, score: Score) -> None:
    """Write the images that ``score`` has kept, with their predictions and ground truth, to a PNG."""
    pictures = []
    for index, predicted in sorted(score.shown.items()):
        image = decode(source.read(index)[0], source.name(index), score.tester.transform.white_level)
        truth = source.mask(index, predicted.shape)
        pictures.append(Picture(source.name(index), image, {"prediction": predicted, "ground truth": truth}))
    content = io.BytesIO()
    draw(pictures, source.classes or ()).save(content, "PNG")
    atomic.write(path, lambda file: file.write(content.getvalue()))
    log.info(f"written: {path}")


def read_run(weights: str) -> Mapping[str, Any]:
    """Read the checkpoint if it is one of run_segment.py; empty for other weights."""
    if weights == SCRATCH or not Path(weights).is_file() or weights.endswith(".safetensors"):
        return {}
    content = safe_load.read(Path(weights))
    return content if "class_names" in content else {}


def predict(config: SegmentConfig, start: Start, stored: Mapping[str, Any], device: torch.device) -> None:
    """Segment the pictures of ``config.predict`` with the network in the checkpoint ``stored``.

    Raises:
        InputError: there is no such network, or a picture cannot be read.
    """
    if not stored:
        raise InputError(f"{config.weights} has no head: --predict needs a checkpoint.pth written by run_segment.py")
    names = (*marked(SegmentConfig, StateField), "short_side", "long_side", "crop_size")
    changed = {name: stored["args"][name] for name in names if getattr(config, name) == getattr(SegmentConfig, name)}
    config = dataclasses.replace(config, **changed)
    network = Segmenter(start.backbone, config)
    network.load(stored, config)
    network.to(device).eval()
    tester, classes = Tester(config, start.transform, device), stored["class_names"]
    out = Path(config.out or Path(config.weights).parent / "predicted")
    folder = open_folder(config.predict, config.predict) if Path(config.predict).is_dir() else None
    paths = [config.predict] if folder is None else [folder.name(index) for index in range(len(folder))]
    for path in paths[distributed.rank() :: distributed.world_size()]:
        if not Path(path).is_file():
            raise InputError(f"there is no picture {path}: check --predict")
        image = decode(Path(path).read_bytes(), path, start.transform.white_level)
        labels = tester.labels(network, tester.prepare(image), (image.height, image.width))
        name = Path(path).relative_to(config.predict if folder else Path(path).parent).with_suffix(".png")
        write_mask(out / "masks" / name, labels)
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        draw([Picture(path, image, {"prediction": labels})], classes).save(out / name)
    log.info(f"{counted(len(paths), 'picture')} segmented, written: {out}, {out / 'masks'} (numbers of the classes)")
