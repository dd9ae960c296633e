"""Pictures of a run while it trains: its views, and what the network sees on fixed images over time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from dino_xcit.config import PretrainConfig
from dino_xcit.data import Source, Subset
from dino_xcit.data.decode import picture_of, read_image, read_picture
from dino_xcit.data.source import evenly_spaced
from dino_xcit.errors import InputError
from dino_xcit.preview import draw_preview
from dino_xcit.runtime import atomic
from dino_xcit.transform import normalise
from eval.features import Features, extract
from eval.pooling import patch_size_of
from eval.report.contents import PICTURE_FOLDER
from eval.viz import as_colours, attention_maps, overlay, principal_components

DRAWN = 6
"""Epochs with pictures: evenly spaced, the first and the last included."""
SHOWN, PREVIEWED = 8, 3
"""Fixed images, and images whose views are drawn."""
GALLERY, NEIGHBOURS = 1000, 5
"""Images among which neighbours are searched, and neighbours of an image."""
SIDE, TILE, GAP = 112, 56, 4
"""Sides of a fixed image and of a neighbour in a picture, and the space between images, in pixels."""
MIN_INPUT = 64
"""Minimum side of the input of the network for attention and patch features, in pixels."""


class Pictures:
    """Draws readable images of a source with the backbone as it is now."""

    def __init__(self, config: PretrainConfig, source: Source, device: torch.device) -> None:
        self._config, self._device, self._transform = config, device, config.eval_transform()
        self._folder = Path(config.output_dir, PICTURE_FOLDER)
        self._gallery = Subset(source, np.array(evenly_spaced(len(source), GALLERY)))
        self._epochs = set(np.linspace(0, config.epochs - 1, min(DRAWN, config.epochs)).round().astype(int).tolist())
        self._started = False

    def due(self, epoch: int) -> bool:
        """Whether the 0-based ``epoch`` has pictures."""
        return epoch in self._epochs

    def extract(self, backbone: nn.Module) -> Features:
        """Return the features of the readable images. Must be called on every rank, because the ranks share them."""
        return extract(
            backbone, self._gallery, self._transform, self._device, progress=False, unreadable="skip", finite=False
        )

    def write(self, backbone: nn.Module, found: Features, epoch: int) -> None:
        """Draw all pictures, and those of the views at the first call.

        Raises:
            InputError: an image is unreadable.
            OSError: a picture cannot be written.
        """
        readable = Subset(self._gallery, np.setdiff1d(np.arange(len(self._gallery)), found.unreadable))
        if not self._started:
            self._start(readable, epoch)
        shown = evenly_spaced(len(readable), SHOWN)
        training = backbone.training
        backbone.eval()
        try:
            pictures = self._maps(backbone, readable, shown)
        finally:
            backbone.train(training)
        pictures["neighbours"] = self._neighbours(found.features, readable, shown)
        for kind, picture in pictures.items():
            self._save(picture, f"{kind}-{epoch + 1:04d}")

    def _start(self, readable: Source, epoch: int) -> None:
        """Remove pictures of later epochs, which an overwritten or longer run left, and draw the views."""
        for path in self._folder.glob("*-*.jpg"):
            if int(path.stem.rpartition("-")[2]) > epoch:
                path.unlink()
        self._folder.mkdir(parents=True, exist_ok=True)
        config = self._config
        draw_preview(
            readable, config.augmentation(), self._folder / "views.jpg", PREVIEWED, config.seed,
            format=config.pixel_format,
        )  # fmt: skip
        self._started = True

    @torch.inference_mode()
    def _maps(self, backbone: nn.Module, source: Source, shown: list[int]) -> dict[str, Image.Image]:
        """Return strips of the attention of the class token, if there is any, and of the patch features."""
        attention: list[Image.Image] = []
        grids, tokens = [], []
        multiple = patch_size_of(backbone)
        side = max(MIN_INPUT, self._transform.crop) // multiple * multiple
        for index in shown:
            found = read_image(source, index, self._transform.pixel_format)
            image = picture_of(found, self._transform.pixel_format).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            tensor = self._transform.resized(found, [side, side])[None]
            pixels = normalise(tensor, self._transform.mean, self._transform.std).to(self._device)
            out = backbone(pixels)
            grids.append(out.grid)
            tokens.append(out.patch_tokens[0].float().cpu().numpy())
            try:
                weights = attention_maps(backbone, pixels)[0][0].mean(dim=0).float().cpu().numpy()
            except InputError:  # a network without class attention
                continue
            attention.append(overlay(image, weights))
        colours = as_colours(principal_components(np.concatenate(tokens))[0])
        parts = np.split(colours, np.cumsum([len(rows) for rows in tokens])[:-1])
        patches = [Image.fromarray(part.reshape(*size, 3)) for part, size in zip(parts, grids, strict=True)]
        strips = {"pca": grid([[one.resize((SIDE, SIDE), Image.Resampling.NEAREST) for one in patches]], SIDE)}
        return strips | ({"attention": grid([attention], SIDE)} if attention else {})

    def _neighbours(self, features: np.ndarray, source: Source, shown: list[int]) -> Image.Image:
        """Draw the nearest images of each fixed image, which is not its own neighbour."""
        unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        rows = []
        for own in shown:
            similarity = unit @ unit[own]
            similarity[own] = -np.inf
            nearest = np.argsort(-similarity)[:NEIGHBOURS].tolist()
            rows.append([read_picture(source, index, self._transform.pixel_format) for index in (own, *nearest)])
        return grid(rows, TILE, margin=TILE // 4)

    def _save(self, picture: Image.Image, name: str) -> None:
        rgb = picture.convert("RGB")
        atomic.write(self._folder / f"{name}.jpg", lambda file: rgb.save(file, format="JPEG", quality=82))


def grid(rows: list[list[Image.Image]], side: int, margin: int = 0) -> Image.Image:
    """Arrange images in rows, each cropped to a square; ``margin``: additional space after the first column."""
    step, columns = side + GAP, max(map(len, rows))
    whole = Image.new("RGB", (columns * step - GAP + margin, len(rows) * step - GAP), "white")
    for top, row in enumerate(rows):
        for left, image in enumerate(row):
            square = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
            whole.paste(square, (left * step + (margin if left else 0), top * step))
    return whole
