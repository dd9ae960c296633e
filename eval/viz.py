"""Visualise class attention and patch features on whole images of any size.

    python -m eval.viz attention --weights ckpt.pth photo.jpg another.jpg --size 480 --out attention.png
    python -m eval.viz pca --weights ckpt.pth *.jpg --foreground above --threshold 0.5

``attention`` draws one row per image: the image, the attention map of the class token for each head of a block, and the
mean over heads. Each map ranges from its minimum (grey) to its maximum (bright). The caption has both as multiples of
the mean weight, and the attention of the class token to itself. In an XCiT only the class-attention blocks have such
maps; timm's vision transformers have them in all blocks.

``pca`` draws the first three principal components over all patches of all images as red, green and blue (DINOv2, arXiv
2304.07193, figure 1). Patches with similar features have similar colours, within and across images.

B batch size, N patch tokens, D features, H heads, d = D / H features per head; (h, w) the grid of patches, h * w = N.
"""

from __future__ import annotations

# Import before torch: it sets how OpenMP threads wait.
import dino_xcit  # noqa: F401  # isort: skip

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Gt, Lt
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from dino_xcit.bounds import FilePath, Group, IsPath, Positional, Repeatable, Suffix, refuse_changed
from dino_xcit.cli import parse
from dino_xcit.data.decode import decode_image, picture_of
from dino_xcit.data.folder import open_folder
from dino_xcit.errors import InputError, one_line, printable, run_main
from dino_xcit.models.xcit import ClassAttention, XCiT
from dino_xcit.runtime import atomic
from dino_xcit.runtime.logging import counted, progress_bar
from dino_xcit.transform import EvalTransform, normalise, size_of
from dino_xcit.weights import LoadedBackbone
from eval.config import BackboneConfig
from eval.pooling import patch_size_of
from eval.setup import demand_writable, open_weights
from eval.sheet import Cell, draw_sheet

Rows = NDArray[np.float32]

MAX_IMAGES = 100
MAX_PIXELS = 64_000_000
"""Maximum number of pixels of an input image."""
CELL = 224
"""Longer side of a cell in pixels."""
MAX_COLUMNS = 5
"""Maximum number of columns of a PCA sheet."""
_GAP = 5
"""Pixels between an image and its patches."""


@dataclass(frozen=True)
class VizConfig(BackboneConfig):
    """Draw attention maps or patch features."""

    what: Annotated[Literal["attention", "pca"], Positional, Group("picture")] = "attention"
    """Visualisation to draw. The flag --what itself may be omitted."""
    images: Annotated[tuple[str, ...], IsPath, Positional, Repeatable] = ()
    """Image files and folders of images. The flag --images itself may be omitted."""
    size: int = 480
    """Length of the shorter side after resizing, which may exceed that of training; 0: no resizing."""
    out: Annotated[FilePath, Suffix(".png")] = ""
    """Output file. Default: attention.png or pca.png in the current folder."""
    block: int = -1
    """For attention: index of the block with class attention; negative values count from the end."""
    foreground: Literal["all", "above", "below"] = "all"
    """For pca: colour all patches, or only those with a first component above or below the threshold. Which side is the
    foreground depends on the images."""
    threshold: Annotated[float, Gt(0), Lt(1)] = 0.5
    """For pca: threshold of the first component, scaled to the range from 0 to 1."""

    def check(self) -> None:
        """See :meth:`BackboneConfig.check`."""
        super().check()
        unused = ("data_path", "eval_resize", "eval_crop", "cache_dir", "json", "precision")
        refuse_changed(self, unused, "for eval.viz")
        refuse_changed(self, ("block",) if self.what == "pca" else ("foreground",), f"for {self.what}")
        if self.foreground == "all":
            refuse_changed(self, ("threshold",), "without a --foreground")
        if self.size and not 16 <= self.size <= 8192:
            raise InputError(f"size is {self.size}, expected 16 to 8192 pixels, or 0 for no resizing")
        if not self.images:
            raise InputError("no images given: add files or folders, such as photo.jpg or photos/")


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        InputError: the command, an image or the weights are invalid, or the network has no class attention.
    """
    config = parse(VizConfig, argv, "python -m eval.viz")
    config = replace(config, images=image_files(config.images))
    path = Path(config.out or f"{config.what}.png")
    demand_writable({"out": str(path)})
    loaded, device = open_weights(config, rgb=False)
    draw = attention_rows if config.what == "attention" else pca_rows
    sheet = draw_sheet(draw(config, loaded, device))
    atomic.write(path, lambda file: sheet.save(file, format="PNG"))
    print(printable(f"written: {path}"))


# ---- images


def image_files(paths: Sequence[str]) -> tuple[str, ...]:
    """Replace folders by their image files.

    Raises:
        InputError: a folder has no images, or there are too many images.
    """
    found: list[str] = []
    for path in paths:
        folder = open_folder(path, path) if os.path.isdir(path) else None
        found += [path] if folder is None else map(folder.name, range(len(folder)))
    if len(found) > MAX_IMAGES:
        raise InputError(f"{len(found)} images given, expected at most {MAX_IMAGES}: give fewer")
    return tuple(found)


def measure_images(
    config: VizConfig, loaded: LoadedBackbone, device: torch.device, measure: Callable[[Tensor], Any]
) -> Iterator[tuple[Cell, Any]]:
    """Yield each image as a cell with the result of ``measure`` for its normalised pixels [1, channels, height, width].

    Raises:
        InputError: a file is no image or is too large.
    """
    multiple = 1 if isinstance(loaded.backbone, XCiT) else patch_size_of(loaded.backbone)
    with progress_bar(len(config.images), config.what, shown=True) as bar, torch.inference_mode():
        for path in config.images:
            transform = loaded.transform
            image, pixels = load_image(path, config.size, multiple, transform)
            measured = measure(normalise(pixels[None], transform.mean, transform.std).to(device))
            height, width = pixels.shape[1:]
            scale = CELL / max(height, width)
            picture = image.resize(
                (max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.LANCZOS
            )
            yield Cell(picture, Path(path).name, f"{width} x {height}"), measured
            bar.update()


def load_image(path: str, size: int, multiple: int, transform: EvalTransform) -> tuple[Image.Image, Tensor]:
    """Load a whole image, and resize its shorter side to ``size`` pixels; 0: no resizing.

    Args:
        multiple: round both sides to multiples of this number of pixels.

    Returns:
        The image in its original size, for drawing, and the resized pixels [channels, height, width].

    Raises:
        InputError: the file is unreadable, is no image, or would be too large.
    """
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the image {path}: {one_line(error)}") from error
    image = decode_image(data, path, transform.pixel_format)
    original = size_of(image)
    short = min(original)
    sides = [max(size, int(size * side / short)) if size else side for side in original]  # as in torchvision
    height, width = (max(1, round(side / multiple)) * multiple for side in sides)
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{path} would have {width} x {height} pixels, expected at most {MAX_PIXELS:,} in total: give a smaller "
            "--size or crop the image"
        )
    return picture_of(image, transform.pixel_format), transform.resized(image, [height, width])


# ---- class attention


def attention_rows(config: VizConfig, loaded: LoadedBackbone, device: torch.device) -> list[list[Cell]]:
    """Return one row per image: the image, the map of each head over it, and the mean over heads."""
    rows = []
    for cell, (patches, itself) in measure_images(
        config, loaded, device, lambda pixels: attention_maps(loaded.backbone, pixels, config.block)
    ):
        maps, own = patches[0].float().cpu(), itself[0].float().cpu()
        titles = [f"head {head + 1}" for head in range(len(maps))] + ["mean of the heads"]
        row = [cell]
        for title, weights, share in zip(titles, [*maps, maps.mean(dim=0)], [*own, own.mean()], strict=True):
            relative = weights / weights.mean().clamp(min=1e-12)
            note = f"{relative.min():.3g} to {relative.max():.3g} x mean; itself {100 * share:.0f}%"
            row.append(Cell(overlay(cell.image, weights.numpy()), title, note))
        rows.append(row)
    return rows


@torch.inference_mode()
def attention_maps(backbone: nn.Module, images: Tensor, block: int = -1) -> tuple[Tensor, Tensor]:
    """Compute the attention of the class token in one block; it sums to 1 over patches, class token and registers.

    Args:
        backbone: an XCiT, or a timm model with a class token in its attention blocks.
        images: [B, channels, height, width], normalised.
        block: index of the block with class attention; negative values count from the end.

    Returns:
        Attention to the patches [B, H, h, w] and to the class token itself [B, H].

    Raises:
        InputError: the network has no class attention, or no such block.
    """
    model: Any = getattr(backbone, "model", backbone)  # timm models are wrapped
    blocks: Any = getattr(model, "cls_attn_blocks", None) or getattr(model, "blocks", None)
    attention: Any = getattr(blocks[-1], "attn", None) if isinstance(blocks, (nn.ModuleList, nn.Sequential)) else None
    ours = isinstance(attention, ClassAttention)
    if not ours and (getattr(model, "cls_token", None) is None or not hasattr(attention, "fused_attn")):
        raise InputError(
            f"{type(model).__name__} has no class attention, expected an XCiT or a vision transformer: python -m "
            "eval.viz pca draws the patch features of any network"
        )
    if not -len(blocks) <= block < len(blocks):
        raise InputError(f"block is {block}, expected {-len(blocks)} to {len(blocks) - 1} for class attention")
    attention = blocks[block].attn
    seen: list[Any] = []
    hooked: nn.Module = attention if ours else attention.attn_drop
    fused = getattr(attention, "fused_attn", False)
    with hooked.register_forward_pre_hook(lambda _, inputs: seen.append(inputs)):
        try:
            attention.fused_attn = False  # timm's fused kernel does not expose weights
            h, w = backbone(images).grid
        finally:
            attention.fused_attn = fused
    weights = class_attention_weights(attention, *seen[0][:2]) if ours else seen[0][0][:, :, 0]
    return weights[:, :, -h * w :].unflatten(2, (h, w)), weights[:, :, 0]


def class_attention_weights(attention: ClassAttention, cls_token: Tensor, patches: Tensor) -> Tensor:
    """Compute softmax(q k^T / sqrt(d)) for the query of the class token (CaiT, arXiv 2103.17239, equations 5 to 7).

    The module itself computes attention without explicit keys and weights.

    Args:
        cls_token: [B, 1, D], input of the module.
        patches: [B, N, D], input of the module.

    Returns:
        [B, H, 1 + N], class token first; each row sums to 1.
    """
    (weight_q, weight_k, _), (bias_q, bias_k, _) = attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3)
    heads = (attention.num_heads, -1)
    q = F.linear(cls_token, weight_q, bias_q).unflatten(2, heads).transpose(1, 2)
    k = F.linear(torch.cat((cls_token, patches), dim=1), weight_k, bias_k).unflatten(2, heads).transpose(1, 2)
    return (q @ k.transpose(-2, -1) * attention.scale).softmax(dim=-1)[:, :, 0]


def overlay(image: Image.Image, weights: Rows) -> Image.Image:
    """Overlay a map [h, w], upsampled to the image's size, on the darkened image: minimum grey, maximum brightest."""
    from matplotlib import colormaps  # takes a second to import

    low, high = float(weights.min()), float(weights.max())
    scaled = Image.fromarray((weights - low) / max(high - low, 1e-12))
    level = np.asarray(scaled.resize(image.size, Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
    colours = colormaps["inferno"](level[..., 0])[..., :3]
    grey = np.asarray(image.convert("L"), dtype=np.float64)[..., None] / 255
    mixed = 0.5 * grey * (1 - level) + (0.7 + 0.3 * grey) * colours * level
    return Image.fromarray((255 * mixed).round().astype(np.uint8))


# ---- principal components of patch features


def pca_rows(config: VizConfig, loaded: LoadedBackbone, device: torch.device) -> list[list[Cell]]:
    """Arrange the images in rows, each above its patches coloured by three components over all patches."""
    cells, maps = [], []
    for cell, out in measure_images(config, loaded, device, loaded.backbone):
        cell.note = f"{out.grid[1]} x {out.grid[0]} patches"
        cells.append(cell)
        maps.append(out.patch_tokens[0].float().cpu().numpy().reshape(*out.grid, -1))
    features = np.concatenate([tokens.reshape(-1, tokens.shape[2]) for tokens in maps])
    kept = foreground(features, config.threshold, config.foreground)
    colours = np.full((len(features), 3), (24, 24, 28), dtype=np.uint8)  # patches outside --foreground are dark
    projected, shares = principal_components(features[kept])
    colours[kept] = as_colours(projected)
    percent = ", ".join(f"{100 * share:.0f}%" for share in shares)
    print(f"{kept.sum():,} of {counted(len(kept), 'patch')}; the components explain {percent} of the variance")
    ends = np.cumsum([tokens[..., 0].size for tokens in maps])
    for cell, tokens, part in zip(cells, maps, np.split(colours, ends[:-1]), strict=True):
        patches = Image.fromarray(part.reshape(*tokens.shape[:2], 3)).resize(cell.image.size, Image.Resampling.NEAREST)
        both = Image.new("RGB", (patches.width, 2 * patches.height + _GAP), "white")
        both.paste(cell.image)
        both.paste(patches, (0, patches.height + _GAP))
        cell.image = both
    columns = math.ceil(len(cells) / math.ceil(len(cells) / MAX_COLUMNS))
    return [list(cells[first : first + columns]) for first in range(0, len(cells), columns)]


def principal_components(features: Rows) -> tuple[Rows, list[float]]:
    """Project features onto their first three principal components.

    The largest entry of each component is made positive, so that colours are the same on all machines.

    Args:
        features: [N, D].

    Returns:
        Centred projections [N, 3], and the share of the variance of each component.

    Raises:
        InputError: N or D is at most 3, or features are not finite.
    """
    if min(features.shape) <= 3:
        raise InputError(
            f"{features.shape[0]} patches of {features.shape[1]} features are too few for 3 components: give more or "
            "larger images, or another --threshold"
        )
    if not np.isfinite(features).all():
        raise InputError("the patch features are not finite: the weights are damaged or their training diverged")
    centred = features - features.mean(axis=0, dtype=np.float64).astype(np.float32)
    covariance = np.zeros((features.shape[1], features.shape[1]))
    for start in range(0, len(centred), 8192):  # no float64 copy of all patches
        part = centred[start : start + 8192].astype(np.float64)
        covariance += part.T @ part
    variances, directions = np.linalg.eigh(covariance)
    chosen = directions[:, ::-1][:, :3]
    chosen = chosen * np.sign(chosen[np.abs(chosen).argmax(axis=0), np.arange(3)])
    whole = max(float(variances.sum()), 1e-12)
    return centred @ chosen.astype(np.float32), [float(value) / whole for value in variances[::-1][:3]]


def foreground(features: Rows, threshold: float, side: str) -> NDArray[np.bool_]:
    """Return a mask [N] of the patches with a first component, scaled to [0, 1], ``above`` or ``below`` the threshold;
    ``all``: every patch."""
    if side == "all":
        return np.ones(len(features), dtype=np.bool_)
    first = principal_components(features)[0][:, 0]
    scaled = (first - first.min()) / max(float(np.ptp(first)), 1e-12)
    return scaled > threshold if side == "above" else scaled < threshold


def as_colours(projected: Rows) -> NDArray[np.uint8]:
    """Map components [N, 3] to bytes: the range from the 1st to the 99th percentile becomes 0 to 255."""
    low, high = np.percentile(projected, [1, 99], axis=0)
    scaled = (projected - low) / np.maximum(high - low, 1e-12)
    return (255 * scaled.clip(0, 1)).round().astype(np.uint8)


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]), less_memory="give a smaller --size or crop the image")
