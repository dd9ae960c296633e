"""A picture of what a query found: the query on the left, the nearest images with their scores beside it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dino_xcit.errors import InputError

TILE = 168
"""Pixels a side of the square that an image is fitted into."""
COLUMNS = 5
"""Results in a row."""

_GAP = 14
_CAPTION = 40
_MARGIN = 24
_INK, _GREY, _LINE, _PAPER, _EMPTY, _ACCENT = "#1b1f24", "#6b7280", "#d9dde3", "#ffffff", "#f1f3f5", "#2563eb"


@dataclass
class Tile:
    """An image with two lines below it."""

    image: Image.Image | None
    """None: it is not there any more; an empty square stands for it."""
    title: str
    name: str


def draw_sheet(rows: Sequence[tuple[Tile, Sequence[Tile]]], path: Path) -> None:
    """One block a query, below each other, as a PNG; written aside, then renamed.

    Raises:
        InputError: it cannot be written there.
    """
    columns = min(COLUMNS, max(len(results) for _, results in rows))
    heights = [-(-len(results) // columns) * (TILE + _CAPTION + _GAP) - _GAP for _, results in rows]
    left = _MARGIN + TILE + 2 * _GAP
    width = left + columns * (TILE + _GAP) - _GAP + _MARGIN
    sheet = Image.new("RGB", (width, sum(heights) + (len(rows) - 1) * 2 * _MARGIN + 2 * _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for number, ((query, results), height) in enumerate(zip(rows, heights, strict=True)):
        if number:
            draw.line((_MARGIN, top - _MARGIN, width - _MARGIN, top - _MARGIN), fill=_LINE)
        _draw_tile(sheet, draw, query, _MARGIN, top, _ACCENT)
        draw.line((_MARGIN + TILE + _GAP, top, _MARGIN + TILE + _GAP, top + height), fill=_LINE)
        for place, tile in enumerate(results):
            row, column = divmod(place, columns)
            _draw_tile(sheet, draw, tile, left + column * (TILE + _GAP), top + row * (TILE + _CAPTION + _GAP), None)
        top += height + 2 * _MARGIN
    aside = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(aside, format="PNG")
        os.replace(aside, path)
    except OSError as error:  # a full or read-only disk and a name that is too long, too
        raise InputError(
            f"cannot write the contact sheet {path}: {error.strerror or error}; choose another file"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def _draw_tile(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, left: int, top: int, frame: str | None
) -> None:
    if tile.image is None:
        draw.rectangle((left, top, left + TILE - 1, top + TILE - 1), fill=_EMPTY, outline=_LINE)
        draw.text((left + TILE / 2, top + TILE / 2), "not found", font=_font(13), fill=_GREY, anchor="mm")
    else:
        fitted = _fit(tile.image)
        x, y = left + (TILE - fitted.width) // 2, top + (TILE - fitted.height) // 2
        draw.rectangle((left, top, left + TILE - 1, top + TILE - 1), fill=_EMPTY)
        sheet.paste(fitted, (x, y))
    if frame:
        draw.rectangle((left - 3, top - 3, left + TILE + 2, top + TILE + 2), outline=frame, width=3)
    draw.text((left, top + TILE + 5), tile.title, font=_font(15), fill=frame or _INK)
    draw.text((left, top + TILE + 23), _shorten(draw, tile.name), font=_font(12), fill=_GREY)


def _fit(image: Image.Image) -> Image.Image:
    """The whole image, as large as the tile allows; tiny pictures are enlarged by whole pixels, not blurred."""
    scale = min(TILE / image.width, TILE / image.height)
    if scale >= 3:
        return image.resize((image.width * int(scale), image.height * int(scale)), Image.Resampling.NEAREST)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _shorten(draw: ImageDraw.ImageDraw, name: str) -> str:
    """A name that fits under a tile: its end is kept, which tells more than its start."""
    printable = "".join(letter if letter.isprintable() else "?" for letter in name)
    if draw.textlength(printable, font=_font(12)) <= TILE:
        return printable
    while printable and draw.textlength(f"...{printable}", font=_font(12)) > TILE:
        printable = printable[1:]
    return f"...{printable}"
