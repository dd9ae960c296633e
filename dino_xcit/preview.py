"""Draw the augmented views of some images.

    python -m dino_xcit.augment preview SRC --out grid.png [--images 4] [flags of run_pretrain.py: --recipe sample ...]

Each row has one image with its crop boxes, followed by its views with their parameters.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from annotated_types import Ge, Le, MinLen

from dino_xcit import auto
from dino_xcit.bounds import FilePath, Positional, annotations_of
from dino_xcit.cli import parse_known
from dino_xcit.config import PretrainConfig
from dino_xcit.data import Source, open_source
from dino_xcit.data.decode import picture_of, read_image
from dino_xcit.data.measure import choose_white_level
from dino_xcit.data.source import evenly_spaced
from dino_xcit.errors import InputError, printable, run_main
from dino_xcit.recipes import AUTO, parse_pretrain
from dino_xcit.transform import RGB, PixelFormat

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image

    from dino_xcit.augment import MultiCropAugmentation, ViewKind, ViewParameters

USAGE = "python -m dino_xcit.augment preview SRC --out grid.png [--images N] [flags of run_pretrain.py]"


@dataclass(frozen=True)
class PreviewConfig:
    """Draw the crops that pretraining sees. The flags of run_pretrain.py are accepted as well."""

    source: Annotated[str, MinLen(1), Positional] = ""
    """Data set, in any form that --data-path accepts (the flag --source may be omitted)."""
    out: FilePath = "grid.png"
    """Figure to write."""
    images: Annotated[int, Ge(1), Le(100)] = 4
    """Number of images, one per row."""


def draw_preview(
    source: Source, augmentation: MultiCropAugmentation, picture: Path, images: int = 4, seed: int = 0, epoch: int = 0,
    format: PixelFormat = RGB,
) -> list[int]:  # fmt: skip
    """Draw the views of ``images`` evenly spaced images into a PNG, and return the indices of the images.

    The views are the same as in this epoch of a run with this seed.

    Raises:
        InputError: An image is unreadable, or the PNG cannot be written.
    """
    from matplotlib.figure import Figure  # takes a second to import; pyplot would change a notebook's backend

    chosen = evenly_spaced(len(source), images)
    columns = 1 + len(augmentation.views)
    figure = Figure(figsize=(1.7 * columns, 2.35 * len(chosen)), layout="constrained")
    axes = figure.subplots(len(chosen), columns, squeeze=False)
    for row, index in zip(axes, chosen, strict=True):
        pixels = read_image(source, index, format)
        image = picture_of(pixels, format)
        drawn = augmentation.draw(image.width, image.height, seed, epoch, index)
        views = augmentation(pixels, seed, epoch, index)
        _draw_original(row[0], image, drawn, Path(source.name(index)).name)
        for number, (axis, kind, view) in enumerate(zip(row[1:], augmentation.views, drawn, strict=True)):
            array = views[number].permute(1, 2, 0).numpy()
            axis.imshow(array if format.channels == 3 else picture_of(array, format))
            axis.set_title(_caption(number, kind, view, image), fontsize=5, color=_colour(number), loc="left")
            axis.axis("off")
    try:
        figure.savefig(picture, dpi=130)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot write {picture}: {getattr(error, 'strerror', None) or error}; try --out grid.png"
        ) from error
    return chosen


def _draw_original(axis: Axes, image: Image.Image, drawn: Sequence[ViewParameters], name: str) -> None:
    from matplotlib.patches import Rectangle

    axis.imshow(np.asarray(image))
    for number, view in enumerate(drawn):
        corner = (view.left - 0.5, view.top - 0.5)
        style = {"fill": False, "linewidth": 1.6 if number < 2 else 0.9, "edgecolor": _colour(number)}
        axis.add_patch(Rectangle(corner, view.width, view.height, **style))  # type: ignore[arg-type]
    name = printable(name)
    shown = name if len(name) <= 24 else f"...{name[-21:]}"
    axis.set_title(f"{shown}\n{image.width} x {image.height}", fontsize=6, loc="left")
    axis.axis("off")


def _colour(view: int) -> str:
    return f"C{view % 10}"


def _caption(number: int, kind: ViewKind, view: ViewParameters, image: Image.Image) -> str:
    """Describe a view: size, share of the image area, and each operation with its strength."""
    share = view.width * view.height / (image.width * image.height)
    words = [f"{'global' if number < 2 else 'local'} {number} · {kind.size} px · {100 * share:.0f}%"]
    words.append(", ".join(f"{name[:3]} {factor:.2f}" for name, factor in view.jitter) or "no jitter")
    rest = ["flip"] * view.flip + ["gray"] * view.gray + ["solarise"] * view.solarize
    if view.blur_radius is not None:
        rest.append(f"blur {view.blur_radius:.2f} px")
    words.append(", ".join(rest))
    return "\n".join(words)


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        InputError: The command line or the data are invalid.
    """
    command, *words = argv or ["no command"]
    if command not in ("preview", "-h", "--help"):
        raise InputError(f"found {command!r}, expected: {USAGE}")
    words = words if command == "preview" else ["--help"]
    config, flags = parse_known(PreviewConfig, words, USAGE.partition(" [")[0], annotations_of(PretrainConfig))
    run, _, given = parse_pretrain(["--data-path", config.source, *flags])
    source = open_source(run.data_path, "train")
    if run.recipe == AUTO.name:
        run, _ = auto.adapt(run, source, given, {})
    run = dataclasses.replace(run, white_level=choose_white_level(source, run.white_level, run.channels))
    chosen = draw_preview(source, run.augmentation(), Path(config.out), config.images, run.seed, 0, run.pixel_format)
    names = ", ".join(Path(source.name(index)).name for index in chosen[:4])
    print(f"{config.out}: views of {len(chosen)} of {len(source):,} images ({names}{' ...' * (len(chosen) > 4)})")


def command() -> None:
    """Console entry point."""
    run_main(lambda: main(sys.argv[1:]))
