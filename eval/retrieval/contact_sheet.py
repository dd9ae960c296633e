"""A picture of what queries found: each query on the left, the nearest images with their scores beside it."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dino_xcit.data import Source, decode
from dino_xcit.errors import InputError
from dino_xcit.runtime import atomic
from dino_xcit.transform import WHITE

TILE = 168
"""Pixels a side of the square that an image is fitted into."""
COLUMNS = 5
"""Results in a row."""
_GAP, _CAPTION, _NAME_LETTERS = 14, 54, 25


@dataclass
class Tile:
    """An image with two lines below it."""

    image: Image.Image | None
    """None: it is not there any more; an empty square takes its place."""
    title: str
    name: str


def tile_of(source: Source, row: int, title: str, white_level: int = WHITE) -> Tile:
    """An image of a source; an empty tile where it cannot be read."""
    image = None
    with contextlib.suppress(InputError, OSError):
        image = decode(source.read(row)[0], source.name(row), white_level)
    return Tile(image, title, os.path.basename(source.name(row)))


def draw_sheet(blocks: Sequence[tuple[Tile, Sequence[Tile]]], path: Path) -> None:
    """Draw a PNG: for each query its tile, and beside it those of its results.

    Raises:
        OSError: it cannot be written there.
    """
    cells, row = [], 0
    for query, results in blocks:
        cells.append((row, 0, query))
        cells += [(row + place // COLUMNS, 1 + place % COLUMNS, tile) for place, tile in enumerate(results)]
        row = cells[-1][0] + 1
    size = (_GAP + (1 + COLUMNS) * (TILE + _GAP), _GAP + row * (TILE + _CAPTION))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, column, tile in cells:
        left, top = _GAP + column * (TILE + _GAP), _GAP + row * (TILE + _CAPTION)
        draw.rectangle((left, top, left + TILE - 1, top + TILE - 1), fill="#f1f3f5")
        if tile.image is None:
            draw.text((left + TILE / 2, top + TILE / 2), "not found", "gray", ImageFont.load_default(13), "mm")
        else:
            fitted = _fit(tile.image)
            sheet.paste(fitted, (left + (TILE - fitted.width) // 2, top + (TILE - fitted.height) // 2))
        name = "".join(letter if letter.isprintable() else "?" for letter in tile.name)
        short = name if len(name) <= _NAME_LETTERS else f"...{name[-_NAME_LETTERS:]}"
        draw.text((left, top + TILE + 5), tile.title, "black", ImageFont.load_default(15))
        draw.text((left, top + TILE + 23), short, "gray", ImageFont.load_default(12))
    content = io.BytesIO()
    sheet.save(content, format="PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, lambda file: file.write(content.getvalue()))


def _fit(image: Image.Image) -> Image.Image:
    """The whole image, as large as the tile allows; tiny pictures are enlarged by whole pixels, not blurred."""
    scale = min(TILE / image.width, TILE / image.height)
    if scale >= 3:
        return image.resize((image.width * int(scale), image.height * int(scale)), Image.Resampling.NEAREST)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)
