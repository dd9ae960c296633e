"""A network for tracers: the same weights and names, computed by PyTorch's plain functions alone.

The network that trains has autograd functions of its own, and chooses a path by the number of tokens; a trace would
keep the choice that its example made. B batch, N tokens, D features, H heads, d = D / H features a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dino_xcit.models import fused
from dino_xcit.models.xcit import XCiT


class Exported(nn.Module):
    """Images [B, 3, height, width], normalised, to the class token [B, D]; with ``patch_tokens``, also to those of the
    last block that mixes patches, [B, N, D], row by row."""

    def __init__(self, backbone: nn.Module, patch_tokens: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.patch_tokens = patch_tokens

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        with fused.plain():
            out = self.backbone(images)
        return (out.cls_token, out.patch_tokens) if self.patch_tokens else (out.cls_token,)


def traced(backbone: nn.Module, patch_tokens: bool, size: int) -> torch.export.ExportedProgram:
    """The network as a graph, for any batch, and where it is an XCiT, for images of any height and width.

    Args:
        size: pixels a side of the images of a network that is no XCiT, whose size is fixed.

    Raises:
        Exception: PyTorch cannot trace the network; of many kinds.
    """
    shapes = {0: torch.export.Dim("batch")}
    height, width = size, size
    if isinstance(backbone, XCiT):
        patch = backbone.patch_size
        # Two tokens a side at least: PyTorch asks whether a tensor's rows lie apart, which one row alone leaves open.
        shapes |= {2: torch.export.Dim("height", min=patch + 1), 3: torch.export.Dim("width", min=patch + 1)}
        height, width = 4 * patch, 5 * patch
    example = torch.zeros(2, 3, height, width)
    network = Exported(backbone, patch_tokens).eval().requires_grad_(False)
    return torch.export.export(network, (example,), dynamic_shapes={"images": shapes})
