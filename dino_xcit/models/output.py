"""What every backbone returns. B batch, N tokens, D features."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class BackboneOutput:
    """Features of a batch of images.

    A dataclass rather than a tensor, so that nobody has to guess whether token 0 is the class token.
    """

    cls_token: Tensor
    """[B, D], after the final norm: the vector that k-NN, linear probe and retrieval use."""

    patch_tokens: Tensor
    """[B, N, D], of the last block that mixes patches (for XCiT: the last XCA block, before class attention)."""

    grid: tuple[int, int]
    """(h, w) with h * w = N: patch token i lies at row i // w, column i % w."""

    layers: tuple[Tensor, ...] = ()
    """The patch tokens [B, N, D] after each block that ``layers=`` asked for, in that order."""

    layer_cls: tuple[Tensor, ...] = ()
    """The class token [B, D] after each of those blocks, through the final norm, where blocks have one: a ViT's do, an
    XCiT's XCA blocks do not."""
