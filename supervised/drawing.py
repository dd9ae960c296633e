"""Draw boxes, masks and captions on images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes

from dino_xcit.runtime import atomic
from dino_xcit.transform import to_tensor
from eval.palette import SIDE, colours
from eval.sheet import Cell, draw_sheet
from supervised.coco import JsonObject, corners, decode_masks

_FONT = str(Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


def draw(image: Image.Image, found: Sequence[JsonObject], names: Mapping[int, str], side: int) -> Image.Image:
    """Resize an image to a longer side of ``side`` pixels and draw objects on it, one colour per class.

    Args:
        found: annotations or results of the image in COCO's format; the first is on top.
        names: name of each category id.
    """
    scale = side / max(image.size)
    size = [max(1, round(image.height * scale)), max(1, round(image.width * scale))]
    pixels = v2.functional.resize(to_tensor(image), size, antialias=True)
    found = list(reversed(found))
    if not found:
        return v2.functional.to_pil_image(pixels)
    order = list(names)
    ink = colours(len(order))
    inks = [tuple(ink[order.index(one["category_id"])].tolist()) for one in found]
    captions = [names[one["category_id"]] + (f" {100 * one['score']:.0f}" if "score" in one else "") for one in found]
    if all("segmentation" in one for one in found):
        masks = torch.from_numpy(decode_masks(found, image.width, image.height))
        masks = v2.functional.resize(masks, size, v2.InterpolationMode.NEAREST)
        for mask, colour in zip(masks.bool(), inks, strict=True):  # torchvision's function blackens overlaps
            pixels[:, mask] = (0.6 * pixels[:, mask] + 0.4 * torch.tensor(colour)[:, None]).to(torch.uint8)
    boxes = scale * torch.from_numpy(corners(found))
    pixels = draw_bounding_boxes(
        pixels, boxes, captions, inks, width=2, font=_FONT, font_size=max(10, side // 50),
        label_colors=["black" if sum(one) > 1.5 * 255 else "white" for one in inks],
        label_background_colors=inks, fill_labels=True,
    )  # fmt: skip
    return v2.functional.to_pil_image(pixels)


def above(found: Sequence[JsonObject], least: float) -> list[JsonObject]:
    """Return the results with a score of at least ``least``."""
    return [one for one in found if one["score"] >= least]


def cell_of(
    image: Image.Image, found: Sequence[JsonObject], names: Mapping[int, str], least: float, title: str = ""
) -> Cell:
    """Draw the results with a score of at least ``least`` as a cell of a sheet."""
    shown = above(found, least)
    return Cell(draw(image, shown, names, SIDE), title, f"{len(shown)} detected, score {least:g} or more")


def write_sheet(path: Path, cells: Sequence[Cell], columns: int = 4) -> None:
    """Write a PNG of cells, ``columns`` in a row."""
    write_image(path, draw_sheet([cells[start : start + columns] for start in range(0, len(cells), columns)]))


def write_image(path: Path, image: Image.Image) -> None:
    """Write a PNG."""
    atomic.write(path, lambda file: image.save(file, format="PNG"))
