"""Where the class token looks: its attention to the patches, head by head, drawn over photographs of any size.

    python -m eval.attention --weights ckpt.pth photo.jpg another.jpg --size 480 --out attention.png

A row an image: the image, each head of the last block with class attention, and the mean of the heads. Each map goes
from its own least weight (grey) to its own greatest (bright), so that below it stands what these are, as multiples of
the average patch's weight, and the share that the class token keeps for itself: a map of 0.9 to 1.1 x looks at nothing.

XCiT's patches never attend to each other (its cross-covariance attention is over features): the class-attention blocks
are the only place where there are maps of this kind. Of timm's models, those whose class token attends have them too.

B batch, N patch tokens, D features, H heads, d = D / H features a head; (h, w) the grid of patches, h * w = N.
"""

from __future__ import annotations

# Before torch: it decides how threads wait for each other.
import dino_xcit  # noqa: F401  # isort: skip

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from dino_xcit.cli import parse
from dino_xcit.errors import InputError, printable, run_main
from dino_xcit.models.xcit import ClassAttention, XCiT
from dino_xcit.runtime.logging import progress_bar
from eval.look_config import AttentionConfig
from eval.photographs import Cell, Photograph, draw_rows, enough_memory, fit, patch_of, photographs
from eval.setup import open_weights


@dataclass
class AttentionMaps:
    """How much of the class token's attention goes where; over patches and the class token itself it sums to 1.
    (In models with further tokens, such as registers, those have the rest.)"""

    patches: Tensor
    """[B, H, h, w]."""
    itself: Tensor
    """[B, H]."""


def main(argv: Sequence[str]) -> None:
    """The command.

    Raises:
        InputError: a mistake in the command, images that cannot be read, or a network without class attention.
    """
    config = parse(AttentionConfig, argv, "python -m eval.attention")
    loaded, device = open_weights(config)
    patch = patch_of(loaded.backbone)
    rows = []
    with progress_bar(len(config.images), "attention", shown=True) as bar:
        for photograph in photographs(config.images, config.size, loaded.transform, patch):
            with enough_memory(photograph):
                maps = attention_maps(loaded.backbone, photograph.pixels(loaded.transform).to(device), config.block)
            rows.append(draw_row(photograph, maps))
            bar.update()
    path = Path(config.out or "attention.png").expanduser()
    draw_rows(rows, path)
    print(printable(f"written: {path}"))


@torch.inference_mode()
def attention_maps(backbone: nn.Module, images: Tensor, block: int = -1) -> AttentionMaps:
    """The class token's attention in one block.

    Args:
        backbone: an XCiT, or a model of timm's whose class token attends in its blocks.
        images: [B, 3, height, width] of any size that the backbone takes, normalised.
        block: of the blocks with class attention, counted from 0, or from -1 backwards.

    Raises:
        InputError: the network has no such attention, or no such block.
    """
    if isinstance(backbone, XCiT):
        weights, grid = _of_xcit(backbone, images, block)
        prefix = 1
    else:
        weights, grid, prefix = _of_timm(backbone, images, block)
    return AttentionMaps(weights[:, :, prefix:].unflatten(2, grid), weights[:, :, 0])


def class_attention_weights(attention: ClassAttention, cls_token: Tensor, patches: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) of the class token's query (CaiT, arXiv 2103.17239, equations 5 to 7).

    The module itself computes without ever making keys, and keeps no weights: this is the plain formula.

    Args:
        cls_token: [B, 1, D], as the module gets it.
        patches: [B, N, D].

    Returns:
        [B, H, 1 + N], the class token first; each row sums to 1.
    """
    (weight_q, weight_k, _), (bias_q, bias_k, _) = attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3)
    heads = (attention.num_heads, -1)
    q = F.linear(cls_token, weight_q, bias_q).unflatten(2, heads).transpose(1, 2)
    k = F.linear(torch.cat((cls_token, patches), dim=1), weight_k, bias_k).unflatten(2, heads).transpose(1, 2)
    weights: Tensor = (q @ k.transpose(-2, -1) * attention.scale).softmax(dim=-1)[:, :, 0]
    return weights


def draw_row(photograph: Photograph, maps: AttentionMaps) -> list[Cell]:
    """The photograph, each head's map over it, and the heads' mean; of the first image in ``maps``."""
    patches, itself = maps.patches[0].float().cpu(), maps.itself[0].float().cpu()
    image = fit(photograph.image)
    shown = [(f"head {head + 1}", patches[head], float(itself[head])) for head in range(len(patches))]
    shown.append(("mean of the heads", patches.mean(dim=0), float(itself.mean())))
    cells = [Cell(image, photograph.name, f"{photograph.image.width} x {photograph.image.height}")]
    for title, weights, own in shown:
        relative = weights / weights.mean().clamp(min=1e-12)
        note = f"{relative.min():.1f} to {relative.max():.1f} x mean; itself {100 * own:.0f}%"
        cells.append(Cell(overlay(image, weights.numpy()), title, note))
    return cells


def overlay(image: Image.Image, weights: NDArray[np.float32]) -> Image.Image:
    """A map [h, w] over the darkened image, upsampled to its size: the least weight is grey, the greatest brightest."""
    from matplotlib import colormaps  # it takes a second to import

    low, high = float(weights.min()), float(weights.max())
    scaled = Image.fromarray((weights - low) / max(high - low, 1e-12))
    level = np.asarray(scaled.resize(image.size, Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
    colours = colormaps["inferno"](level[..., 0])[..., :3]
    grey = np.asarray(image.convert("L"), dtype=np.float64)[..., None] / 255
    mixed = 0.5 * grey * (1 - level) + (0.7 + 0.3 * grey) * colours * level
    return Image.fromarray((255 * mixed).round().astype(np.uint8))


def _of_xcit(backbone: XCiT, images: Tensor, block: int) -> tuple[Tensor, tuple[int, int]]:
    attention = _chosen(backbone.cls_attn_blocks, block).attn
    seen: list[tuple[Tensor, Tensor]] = []
    handle = attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    try:
        grid = backbone(images).grid
    finally:
        handle.remove()
    return class_attention_weights(attention, *seen[0]), grid


def _of_timm(backbone: nn.Module, images: Tensor, block: int) -> tuple[Tensor, tuple[int, int], int]:
    """The weights [B, H, prefix + N] that timm's own attention computes, its fused kernel switched off meanwhile."""
    model: Any = getattr(backbone, "model", None)
    blocks = getattr(model, "cls_attn_blocks", None) or getattr(model, "blocks", None)
    has_blocks = isinstance(blocks, (nn.ModuleList, nn.Sequential)) and len(blocks) > 0
    attention: Any = getattr(_chosen(blocks, block), "attn", None) if has_blocks else None
    known = isinstance(getattr(attention, "attn_drop", None), nn.Module) and hasattr(attention, "fused_attn")
    if getattr(model, "cls_token", None) is None or not known:
        raise InputError(
            f"{type(model or backbone).__name__} has no attention of a class token that could be drawn: expected an "
            "XCiT or a vision transformer; python -m eval.pca draws the patch features of any network"
        )
    seen: list[Tensor] = []
    handle = attention.attn_drop.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    fused, attention.fused_attn = attention.fused_attn, False
    try:
        grid = backbone(images).grid
    finally:
        attention.fused_attn = fused
        handle.remove()
    return seen[0][:, :, 0], grid, seen[0].shape[-1] - grid[0] * grid[1]


def _chosen(blocks: Any, block: int) -> Any:
    if not -len(blocks) <= block < len(blocks):
        raise InputError(f"block is {block}, but there are {len(blocks)} blocks with class attention: 0, 1 ... or -1")
    return blocks[block]


def command() -> None:
    """The console entry."""
    run_main(lambda: main(sys.argv[1:]))


if __name__ == "__main__":
    command()
