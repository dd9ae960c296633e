"""Sheets of captioned images: rows of cells, and contact sheets of queries and their results."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unicodedata import normalize

from PIL import Image, ImageDraw, ImageFont, ImageOps

from dino_xcit.data import Source
from dino_xcit.data.decode import read_picture
from dino_xcit.errors import InputError, printable
from dino_xcit.runtime import atomic
from dino_xcit.transform import RGB, PixelFormat

TILE = 168
"""Side of an image's square in a contact sheet, in pixels."""
COLUMNS = 5
"""Results per row of a contact sheet."""
_MARGIN, _GAP, _CAPTION = 20, 10, 40


@dataclass
class Cell:
    """An image with a title and a note below it."""

    image: Image.Image
    title: str
    note: str


def draw_sheet(rows: Sequence[Sequence[Cell]]) -> Image.Image:
    """Draw rows of bottom-aligned cells; rows may have different lengths."""
    columns = max(map(len, rows))
    widths = [max(row[column].image.width for row in rows if column < len(row)) for column in range(columns)]
    heights = [max(cell.image.height for cell in row) for row in rows]
    whole_width = 2 * _MARGIN + sum(widths) + (columns - 1) * _GAP
    whole_height = 2 * _MARGIN + sum(heights) + len(rows) * _CAPTION + (len(rows) - 1) * _GAP
    sheet = Image.new("RGB", (whole_width, whole_height), "white")
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        left = _MARGIN
        for cell, width in zip(row, widths, strict=False):
            sheet.paste(cell.image, (left, top + height - cell.image.height))
            for text, size, ink, below in ((cell.title, 14, "#1b1f24", 4), (cell.note, 12, "#6b7280", 21)):
                shown, font = printable(normalize("NFC", text)), font_of(size)
                while draw.textlength(shown, font=font) > width and len(shown) > 3:
                    shown = f"...{shown.removeprefix('...')[1:]}"  # the end of a file name is the most distinctive
                draw.text((left, top + height + below), shown, ink, font)
            left += width + _GAP
        top += height + _CAPTION + _GAP
    return sheet


@cache
def font_of(size: int) -> ImageFont.FreeTypeFont:
    """Return Matplotlib's font: Pillow's own has ASCII only."""
    import matplotlib as mpl  # takes half a second to import

    return ImageFont.truetype(Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def tile(image: Image.Image, title: str, name: str) -> Cell:
    """Fit an image into a square; tiny images are enlarged without blurring."""
    method = Image.Resampling.NEAREST if 3 * max(image.size) <= TILE else Image.Resampling.LANCZOS
    return Cell(ImageOps.pad(image, (TILE, TILE), method, "#f1f3f5"), title, os.path.basename(name))


def tile_of(source: Source, row: int, title: str, format: PixelFormat = RGB) -> Cell:
    """Build the tile of an image in a source; an unreadable image is an empty square."""
    with contextlib.suppress(InputError, OSError):
        return tile(read_picture(source, row, format), title, source.name(row))
    return tile(Image.new("RGB", (TILE, TILE), "#f1f3f5"), f"{title}  not found", source.name(row))


def write_contact_sheet(path: Path, blocks: Sequence[tuple[Cell, Sequence[Cell]]]) -> None:
    """Write queries on the left and their results on the right to a PNG.

    Raises:
        OSError: the file cannot be written.
    """
    beside = Cell(Image.new("RGB", (TILE, TILE), "white"), "", "")  # left of the second row of results
    rows = [
        [beside if start else query, *results[start : start + COLUMNS]]
        for query, results in blocks
        for start in range(0, max(1, len(results)), COLUMNS)
    ]
    content = io.BytesIO()
    draw_sheet(rows).save(content, format="PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, lambda file: file.write(content.getvalue()))
