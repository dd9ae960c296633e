"""Photographs for a network to look at, whole and at any size; and rows of pictures with captions, as one PNG."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from dino_xcit.data import decode
from dino_xcit.errors import InputError, is_out_of_memory, one_line, printable
from dino_xcit.models.xcit import XCiT
from dino_xcit.transform import EvalTransform, normalise, to_tensor

MOST_IMAGES = 100
"""More do not make one picture that anybody can look at."""

MOST_PIXELS = 64_000_000
"""Of one image as the network sees it."""

LEAST_SIZE = 16
"""Of --size."""

CELL = 224
"""Pixels of a cell's longer side."""

_MARGIN, _GAP, _TITLE, _NOTE = 20, 10, 14, 12
_CAPTION = 40
_INK, _GREY, _PAPER = "#1b1f24", "#6b7280", "#ffffff"


@dataclass
class Photograph:
    """An image as the network sees it, but for the normalisation."""

    name: str
    image: Image.Image

    def pixels(self, transform: EvalTransform) -> Tensor:
        """[1, 3, height, width] float32, normalised."""
        return normalise(to_tensor(self.image)[None], transform.mean, transform.std)


def patch_of(backbone: nn.Module) -> int:
    """Pixels by which an image's sides must divide: of a patch's side; 1 where any size will do, as for an XCiT."""
    if isinstance(backbone, XCiT):
        return 1
    size: Any = getattr(getattr(getattr(backbone, "model", None), "patch_embed", None), "patch_size", 1)
    return max(map(int, size)) if isinstance(size, (tuple, list)) else int(size)


def photographs(paths: Sequence[str], size: int, transform: EvalTransform, multiple: int = 1) -> Iterator[Photograph]:
    """The files one after another, whole, their shorter side resized to ``size`` pixels; 0: as they are.

    Args:
        multiple: both sides are rounded to multiples of so many pixels (:func:`patch_of`), for networks that take no
            others.

    Raises:
        InputError: too many, or one that is no image, or cannot be read, or would be too large.
    """
    if len(paths) > MOST_IMAGES:
        raise InputError(f"{len(paths)} images given, expected at most {MOST_IMAGES} for one picture: name fewer")
    for path in paths:
        image = decode(_read(path), path)
        shorter = size or min(image.size)
        # The longer side as torchvision has it.
        width, height = (
            max(1, round(max(shorter, int(shorter * side / min(image.size))) / multiple)) * multiple
            for side in image.size
        )
        if width * height > MOST_PIXELS:
            raise InputError(
                f"{path} would have {min(width, height)} x {max(width, height)} pixels, expected at most "
                f"{MOST_PIXELS:,} in all: {_remedy(image, multiple)}"
            )
        if (width, height) != image.size:
            image = TF.resize(image, [height, width], InterpolationMode(transform.interpolation))
        yield Photograph(os.path.basename(path), image)


@contextmanager
def enough_memory(photograph: Photograph) -> Iterator[None]:
    """A context for what a network does with a photograph.

    Raises:
        InputError: the memory does not suffice.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        width, height = photograph.image.size
        smaller = max(LEAST_SIZE, min(width, height) // 2)
        raise InputError(
            f"out of memory for {printable(photograph.name)} of {width} x {height} pixels: give a smaller --size, such "
            f"as --size {smaller}, or cut the image"
        ) from error


def _remedy(image: Image.Image, multiple: int) -> str:
    """What makes an image small enough: the --size that does, where there is one."""
    long, short = max(image.size), min(image.size)
    fits = int(math.sqrt(MOST_PIXELS * short / long)) - multiple
    if fits < LEAST_SIZE:
        return f"cut the image, which is {long / short:,.0f} times as long as wide"
    return f"give a smaller --size, such as --size {min(fits, 480)}, or cut the image"


@dataclass
class Cell:
    """A picture with a title and a note below it."""

    image: Image.Image
    title: str
    note: str


def fit(image: Image.Image) -> Image.Image:
    """The image with :data:`CELL` pixels on its longer side."""
    scale = CELL / max(image.size)
    return image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
    )


def stack(above: Image.Image, below: Image.Image) -> Image.Image:
    """One picture of two that are equally wide."""
    both = Image.new("RGB", (above.width, above.height + _GAP // 2 + below.height), _PAPER)
    both.paste(above, (0, 0))
    both.paste(below, (0, above.height + _GAP // 2))
    return both


def draw_rows(rows: Sequence[Sequence[Cell]], path: Path) -> None:
    """Rows of cells below each other as a PNG, written aside and renamed. The pictures of a row stand on one line.

    Raises:
        InputError: the file cannot be written.
    """
    columns = max(len(row) for row in rows)
    widths = [max(row[column].image.width for row in rows if column < len(row)) for column in range(columns)]
    heights = [max(cell.image.height for cell in row) for row in rows]
    sheet = Image.new(
        "RGB",
        (
            2 * _MARGIN + sum(widths) + (columns - 1) * _GAP,
            2 * _MARGIN + sum(heights) + len(rows) * _CAPTION + (len(rows) - 1) * _GAP,
        ),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        left = _MARGIN
        for cell, width in zip(row, widths[: len(row)], strict=True):
            sheet.paste(cell.image, (left, top + height - cell.image.height))
            for text, size, ink, below in ((cell.title, _TITLE, _INK, 4), (cell.note, _NOTE, _GREY, 21)):
                font = ImageFont.load_default(size)
                draw.text((left, top + height + below), _shorten(draw, text, font, width), ink, font)
            left += width + _GAP
        top += height + _CAPTION + _GAP
    aside = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            sheet.save(file, format="PNG")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another --out") from error
    finally:
        if aside.is_file():
            aside.unlink()


def _read(path: str) -> bytes:
    file = Path(path).expanduser()
    if file.is_dir():
        raise InputError(f"{path} is a folder, expected image files: {path.rstrip('/')}/*.jpg names those in it")
    try:
        return file.read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the image {path}: {one_line(error)}") from error


def _shorten(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> str:
    """A text that fits a cell: its end is kept, which tells more of a file's name than its start."""
    text = printable(text)
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(f"...{text}", font=font) > width:
        text = text[1:]
    return f"...{text}"
