"""Output of a backbone. B batch, N tokens, D features."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class BackboneOutput:
    """Features of a batch of images."""

    cls_token: Tensor
    """[B, D], after the final norm; used by k-NN, linear probe and retrieval."""

    patch_tokens: Tensor
    """[B, N, D], after the last block that mixes patches (in XCiT the last XCA block, before class attention)."""

    grid: tuple[int, int]
    """(h, w) with h * w = N: patch token i is at row i // w, column i % w."""

    layers: tuple[Tensor, ...] = ()
    """Patch tokens [B, N, D] after each block in the ``layers`` argument, in its order."""

    layer_cls: tuple[Tensor, ...] = ()
    """Class token [B, D] after each of those blocks, through the final norm; empty for XCiT, whose XCA blocks have no
    class token."""
