"""Contact sheets: each query on the left, its nearest images with scores on the right."""

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
"""Side of an image's square in pixels."""
COLUMNS = 5
"""Results per row."""
_GAP, _CAPTION, _MAX_NAME = 14, 54, 25


@dataclass
class Tile:
    """An image with two lines below it."""

    image: Image.Image | None
    """None: draw an empty square for a missing image."""
    title: str
    name: str


def tile_of(source: Source, row: int, title: str, white_level: int = WHITE) -> Tile:
    """Build the tile of an image in a source; the tile of an unreadable image is empty."""
    image = None
    with contextlib.suppress(InputError, OSError):
        image = decode(source.read(row)[0], source.name(row), white_level)
    return Tile(image, title, os.path.basename(source.name(row)))


def draw_sheet(blocks: Sequence[tuple[Tile, Sequence[Tile]]], path: Path) -> None:
    """Draw queries and their results to a PNG.

    Raises:
        OSError: the file cannot be written.
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
        short = name if len(name) <= _MAX_NAME else f"...{name[-_MAX_NAME:]}"
        draw.text((left, top + TILE + 5), tile.title, "black", ImageFont.load_default(15))
        draw.text((left, top + TILE + 23), short, "gray", ImageFont.load_default(12))
    content = io.BytesIO()
    sheet.save(content, format="PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, lambda file: file.write(content.getvalue()))


def _fit(image: Image.Image) -> Image.Image:
    """Resize an image to the tile; tiny images are enlarged by a whole factor without blurring."""
    scale = min(TILE / image.width, TILE / image.height)
    if scale >= 3:
        return image.resize((image.width * int(scale), image.height * int(scale)), Image.Resampling.NEAREST)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)
