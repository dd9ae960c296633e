"""A network for tracers: the same weights and names, computed by PyTorch's plain functions alone.

The network that trains has autograd functions of its own, and chooses a path by the number of tokens; a trace would
keep the choice that its example made. B batch, N tokens, D features, H heads, d = D / H features a head.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino_xcit.models.class_attention import ClassAttentionBlock
from dino_xcit.models.cross_covariance import LEAST_LENGTH
from dino_xcit.models.mlp import Mlp
from dino_xcit.models.xca import XCA
from dino_xcit.models.xcit import XCABlock, XCiT


class PlainXCA(nn.Module):
    """Cross-covariance attention as section 3.2 of the paper (arXiv 2106.09681) writes it: [B, N, D] -> [B, N, D]."""

    def __init__(self, trained: XCA) -> None:
        super().__init__()
        self.num_heads = trained.num_heads
        self.temperature, self.qkv, self.proj = trained.temperature, trained.qkv, trained.proj

    def forward(self, x: Tensor, layer_scale: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 4, 1).unbind(0)  # [B, H, d, N]
        q, k = F.normalize(q, dim=-1, eps=LEAST_LENGTH), F.normalize(k, dim=-1, eps=LEAST_LENGTH)
        attention = (q @ k.transpose(2, 3) * self.temperature).softmax(dim=-1)
        out: Tensor = self.proj((attention @ v).permute(0, 3, 1, 2).flatten(2))
        return out if layer_scale is None else layer_scale * out


class PlainMlp(nn.Module):
    """[B, N, D] -> [B, N, D]."""

    def __init__(self, trained: Mlp) -> None:
        super().__init__()
        self.fc1, self.fc2 = trained.fc1, trained.fc2

    def forward(self, x: Tensor, layer_scale: Tensor | None = None) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out if layer_scale is None else layer_scale * out


class Exported(nn.Module):
    """Images [B, 3, height, width], normalised, to the class token [B, D]; with ``patch_tokens``, also to those of the
    last block that mixes patches, [B, N, D], row by row."""

    def __init__(self, backbone: nn.Module, patch_tokens: bool) -> None:
        super().__init__()
        self.backbone = _plain(backbone) if isinstance(backbone, XCiT) else backbone
        self.patch_tokens = patch_tokens

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
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


def _plain(backbone: XCiT) -> XCiT:
    copied = copy.deepcopy(backbone)
    for block in (*copied.blocks, *copied.cls_attn_blocks):
        assert isinstance(block, (XCABlock, ClassAttentionBlock))
        block.mlp = PlainMlp(block.mlp)  # type: ignore[assignment]
        if isinstance(block, XCABlock):
            block.attn = PlainXCA(block.attn)  # type: ignore[assignment]
    return copied
