"""Tokens of several crop sizes in one tensor.

Layers that treat each token by itself (linear, norm, MLP) run once on the tokens of all crop sizes. On a GPU this takes
fewer kernel launches, and each weight gets its gradient from one product.

Tokens are [B, N, D] for one crop size, and [T, D] for several: those of the first size, image by image, then the next.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Sizes = tuple[tuple[int, tuple[int, int]], ...]
"""Number of images and grid (h, w) of each crop size; empty: one crop size."""


def split_sizes(x: Tensor, sizes: Sizes) -> list[Tensor]:
    """Return views [B, N, D] of the tokens of each crop size."""
    if len(sizes) < 2:
        return [x]
    counts = [images * h * w for images, (h, w) in sizes]
    return [part.unflatten(0, (images, -1)) for part, (images, _) in zip(x.split(counts), sizes, strict=True)]


def join_sizes(parts: Sequence[Tensor]) -> Tensor:
    """Join tokens [B, N, D] of each crop size: the inverse of :func:`split_sizes`."""
    return parts[0] if len(parts) == 1 else torch.cat([part.flatten(0, 1) for part in parts])
