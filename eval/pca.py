"""Patch features as colours: the first three principal components over all patches of all given images.

    python -m eval.pca --weights ckpt.pth photo.jpg another.jpg --size 480 --out pca.png
    python -m eval.pca --weights ckpt.pth *.jpg --foreground above --threshold 0.5

What has similar features has similar colours, within an image and across images (as in DINOv2, arXiv 2304.07193,
figure 1). Red, green and blue are the first, second and third component, each scaled from its 1st to its 99th
percentile. With ``--foreground`` the first component parts the patches, and the colours are computed anew from those
that are kept.

N patches of all images, D features; (h, w) the grid of one image's patches.
"""

from __future__ import annotations

# Before torch: it decides how threads wait for each other.
import dino_xcit  # noqa: F401  # isort: skip

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dino_xcit.cli import parse
from dino_xcit.errors import InputError, printable, run_main
from dino_xcit.runtime.logging import counted, progress_bar
from eval.look_config import PcaConfig
from eval.photographs import Cell, draw_rows, enough_memory, fit, patch_of, photographs, stack
from eval.setup import open_weights

Rows = NDArray[np.float32]

COMPONENTS = 3
MOST_IN_A_ROW = 5

_BACKGROUND = (24, 24, 28)


def main(argv: Sequence[str]) -> None:
    """The command.

    Raises:
        InputError: a mistake in the command, images that cannot be read, or a threshold that leaves no patches.
    """
    config = parse(PcaConfig, argv, "python -m eval.pca")
    loaded, device = open_weights(config)
    patch = patch_of(loaded.backbone)

    # ---- the patch features of all images
    cells: list[Cell] = []
    found: list[Rows] = []
    grids: list[tuple[int, int]] = []
    with progress_bar(len(config.images), "patch features", shown=True) as bar, torch.inference_mode():
        for photograph in photographs(config.images, config.size, loaded.transform, patch):
            with enough_memory(photograph):
                out = loaded.backbone(photograph.pixels(loaded.transform).to(device))
            found.append(out.patch_tokens[0].float().cpu().numpy())
            grids.append(out.grid)
            cells.append(Cell(fit(photograph.image), photograph.name, f"{out.grid[1]} x {out.grid[0]} patches"))
            bar.update()
    features = np.concatenate(found)

    # ---- colours
    kept: NDArray[np.bool_] = np.ones(len(features), dtype=np.bool_)
    if config.foreground != "all":
        kept = foreground(features, config.threshold, above=config.foreground == "above")
    colours = np.full((len(features), COMPONENTS), _BACKGROUND, dtype=np.uint8)
    projected, shares = principal_components(features[kept])
    colours[kept] = as_colours(projected)
    said = ", ".join(f"{100 * share:.0f}%" for share in shares)
    print(f"{kept.sum():,} of {counted(len(kept), 'patch')}; the components have {said} of their variance")

    # ---- the picture: below each photograph its patches
    ends = np.cumsum([height * width for height, width in grids])
    for cell, grid, part in zip(cells, grids, np.split(colours, ends[:-1]), strict=True):
        patches = Image.fromarray(part.reshape(*grid, COMPONENTS)).resize(cell.image.size, Image.Resampling.NEAREST)
        cell.image = stack(cell.image, patches)
    columns = math.ceil(len(cells) / math.ceil(len(cells) / MOST_IN_A_ROW))
    path = Path(config.out or "pca.png").expanduser()
    draw_rows([cells[start : start + columns] for start in range(0, len(cells), columns)], path)
    print(printable(f"written: {path}"))


def principal_components(features: Rows, count: int = COMPONENTS) -> tuple[Rows, list[float]]:
    """Projections on the directions of greatest variance, greatest first.

    A direction has no sign of its own: each is turned so that its largest entry is positive, which makes the colours
    the same on every machine.

    Args:
        features: [N, D].

    Returns:
        [N, count] around 0, and each component's share of the variance.

    Raises:
        InputError: fewer patches, or features, than components; or features that are not finite.
    """
    if min(features.shape) <= count:
        raise InputError(
            f"{features.shape[0]} patches of {features.shape[1]} features are too few for {count} components: take "
            "larger or more images, or another --threshold"
        )
    if not np.isfinite(features).all():
        raise InputError("the patch features are not finite: the weights are damaged, or their training diverged")
    mean = features.mean(axis=0, dtype=np.float64)
    centred = features - mean.astype(np.float32)
    # A matrix of D x D, however many patches there are.
    covariance = np.zeros((features.shape[1], features.shape[1]))
    for start in range(0, len(centred), 8192):
        part = centred[start : start + 8192].astype(np.float64)
        covariance += part.T @ part
    variances, directions = np.linalg.eigh(covariance)
    chosen = directions[:, ::-1][:, :count]
    chosen = chosen * np.sign(chosen[np.abs(chosen).argmax(axis=0), np.arange(count)])
    whole = max(float(variances.sum()), 1e-12)
    return centred @ chosen.astype(np.float32), [float(value) / whole for value in variances[::-1][:count]]


def foreground(features: Rows, threshold: float, above: bool) -> NDArray[np.bool_]:
    """[N]: which patches' first component lies above (or below) ``threshold`` on a scale from its least to its
    greatest value."""
    first = principal_components(features)[0][:, 0]
    scaled = (first - first.min()) / max(float(np.ptp(first)), 1e-12)
    kept: NDArray[np.bool_] = scaled > threshold if above else scaled < threshold
    return kept


def as_colours(projected: Rows) -> NDArray[np.uint8]:
    """[N, 3] to bytes: each component's 1st to 99th percentile is 0 to 255."""
    low, high = np.percentile(projected, [1, 99], axis=0)
    scaled = (projected - low) / np.maximum(high - low, 1e-12)
    return (255 * scaled.clip(0, 1)).round().astype(np.uint8)


def command() -> None:
    """The console entry."""
    run_main(lambda: main(sys.argv[1:]))


if __name__ == "__main__":
    command()
