"""Pictures of a run while it trains: its views once, and what the network sees on fixed images over time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from dino_xcit.augment import MultiCropAugmentation
from dino_xcit.data import Source, Subset, decode
from dino_xcit.data.source import evenly_spaced
from dino_xcit.errors import InputError
from dino_xcit.preview import draw_preview
from dino_xcit.runtime import atomic
from dino_xcit.transform import EvalTransform, normalise, to_tensor
from eval.features import extract
from eval.pooling import patch_size_of
from eval.viz import as_colours, attention_maps, overlay, principal_components

SHOWN = 8
"""Fixed images."""
GALLERY = 1000
"""Images among which neighbours are searched."""
NEIGHBOURS = 5
PREVIEWED = 3
SIDE, TILE, GAP = 112, 56, 4
"""Sides of a fixed image and of a neighbour in a picture, and the space between images, in pixels."""
MIN_INPUT = 64
"""Minimum side of the input of the network for attention and patch features, in pixels."""


def draw_views(source: Source, augmentation: MultiCropAugmentation, path: Path, seed: int, white_level: int) -> None:
    """Write the views of some images as a JPEG."""
    draw_preview(source, augmentation, path, PREVIEWED, seed, white_level=white_level)


class Pictures:
    """Draws fixed images of a source with the backbone as it is now."""

    def __init__(self, source: Source, transform: EvalTransform, device: torch.device) -> None:
        self._source, self._transform, self._device = source, transform, device
        self._gallery = Subset(source, np.array(evenly_spaced(len(source), GALLERY)))
        self._shown = evenly_spaced(len(self._gallery), SHOWN)

    def draw(self, backbone: nn.Module, main: bool) -> dict[str, Image.Image]:
        """Return the pictures by kind. Must be called on every rank, because the ranks share the images.

        Args:
            main: whether this rank draws; the others return no pictures.

        Raises:
            InputError: an image is unreadable, or a feature is not finite.
        """
        found = extract(backbone, self._gallery, self._transform, self._device, progress=False, unreadable="skip")
        if not main:
            return {}
        training = backbone.training
        backbone.eval()
        try:
            return self._maps(backbone) | {"neighbours": self._neighbours(found.features, found.unreadable)}
        finally:
            backbone.train(training)

    def _image(self, place: int) -> Image.Image:
        source, transform = self._gallery, self._transform
        return decode(source.read(place)[0], source.name(place), transform.white_level)

    @torch.inference_mode()
    def _maps(self, backbone: nn.Module) -> dict[str, Image.Image]:
        """Return strips of the attention of the class token, if there is any, and of the patch features."""
        attention: list[Image.Image] = []
        grids, tokens = [], []
        multiple = patch_size_of(backbone)
        side = max(MIN_INPUT, self._transform.crop) // multiple * multiple
        for place in self._shown:
            image = self._image(place).resize((side, side), Image.Resampling.BICUBIC)
            pixels = normalise(to_tensor(image)[None], self._transform.mean, self._transform.std).to(self._device)
            small = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            out = backbone(pixels)
            grids.append(out.grid)
            tokens.append(out.patch_tokens[0].float().cpu().numpy())
            try:
                weights = attention_maps(backbone, pixels)[0][0].mean(dim=0).float().cpu().numpy()
                attention.append(overlay(small, weights))
            except InputError:  # a network without class attention
                continue
        colours = as_colours(principal_components(np.concatenate(tokens))[0])
        parts = np.split(colours, np.cumsum([len(rows) for rows in tokens])[:-1])
        patches = [Image.fromarray(part.reshape(*grid, 3)) for part, grid in zip(parts, grids, strict=True)]
        strips = {"pca": grid([[one.resize((SIDE, SIDE), Image.Resampling.NEAREST) for one in patches]], SIDE)}
        return strips | ({"attention": grid([attention], SIDE)} if attention else {})

    def _neighbours(self, features: np.ndarray, unreadable: np.ndarray) -> Image.Image:
        """Draw the nearest images of each fixed image, which is not its own neighbour."""
        readable = np.setdiff1d(np.arange(len(self._gallery)), unreadable)
        unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        rows = []
        for place in self._shown:
            (own,) = np.flatnonzero(readable == place)
            similarity = unit @ unit[own]
            similarity[own] = -np.inf
            nearest = np.argsort(-similarity)[:NEIGHBOURS]
            rows.append([self._image(one) for one in (place, *readable[nearest].tolist())])
        return grid(rows, TILE, margin=TILE // 4)


def grid(rows: list[list[Image.Image]], side: int, margin: int = 0) -> Image.Image:
    """Arrange images in rows, each cropped to a square; ``margin``: additional space after the first column."""
    step, columns = side + GAP, max(map(len, rows))
    whole = Image.new("RGB", (columns * step - GAP + margin, len(rows) * step - GAP), "white")
    for top, row in enumerate(rows):
        for left, image in enumerate(row):
            square = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
            whole.paste(square, (left * step + (margin if left else 0), top * step))
    return whole


def save(image: Image.Image, path: Path) -> None:
    """Write a JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, lambda file: image.convert("RGB").save(file, format="JPEG", quality=82))
