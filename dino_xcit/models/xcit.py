"""XCiT (arXiv 2106.09681) with the state-dict names of every published checkpoint.

B batch, N tokens, D features, H heads. Images are [B, 3, height, width] of any size; the grid of tokens is
ceil(height / patch) x ceil(width / patch).

Tokens are kept as [B, N, D]. Seen as an image [B, D, h, w] that memory is already channels-last, so the convolutions
of the local patch interaction read and write it without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dino_xcit.models.class_attention import LAYER_NORM_EPS, ClassAttentionBlock
from dino_xcit.models.droppath import Coins, add_residual, coins_of, residual_scales
from dino_xcit.models.lpi import LPI
from dino_xcit.models.mlp import Mlp
from dino_xcit.models.output import BackboneOutput
from dino_xcit.models.patch_embed import ConvPatchEmbed
from dino_xcit.models.recompute import recomputed
from dino_xcit.models.xca import XCA


@dataclass(frozen=True)
class XCiTSize:
    """What distinguishes one XCiT from another (paper, table 1, and the official model definitions)."""

    dim: int
    depth: int
    heads: int
    layer_scale: float
    """Start value of LayerScale (eta in the paper)."""
    tokens_norm: bool = True
    """Whether class attention's second norm covers all tokens (all published models but nano) or CLS alone."""
    class_blocks: int = 2
    mlp_ratio: int = 4


class PositionalEncodingFourier(nn.Module):
    """Sines and cosines of the relative position in the grid, projected to D features; works for any grid."""

    hidden_dim = 32
    temperature = 10000.0

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token_projection = nn.Conv2d(2 * self.hidden_dim, dim, kernel_size=1)

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """[1, N, D] for a grid of (h, w) tokens."""
        height, width = grid
        weight = self.token_projection.weight
        rows, columns = self._waves(height, weight.device), self._waves(width, weight.device)
        code = torch.cat(
            (
                rows[:, None, :].expand(height, width, self.hidden_dim),
                columns[None, :, :].expand(height, width, self.hidden_dim),
            ),
            dim=-1,
        )
        code = code.to(weight.dtype).permute(2, 0, 1)[None]
        return self.token_projection(code).flatten(2).transpose(1, 2)

    def _waves(self, length: int, device: torch.device) -> Tensor:
        """[length, 32]: interleaved sin, cos of 16 frequencies of the 1-based position scaled to (0, 2 pi]."""
        position = torch.arange(1, length + 1, dtype=torch.float32, device=device)
        position = position / (length + 1e-6) * (2 * math.pi)
        pair = torch.arange(0, self.hidden_dim, 2, dtype=torch.float32, device=device)
        angle = position[:, None] / self.temperature ** (pair / self.hidden_dim)
        return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


class XCABlock(nn.Module):
    """x + XCA, then x + LPI, then x + MLP, each behind a LayerNorm and scaled by a LayerScale vector."""

    residual_branches = 3

    def __init__(self, size: XCiTSize) -> None:
        super().__init__()
        dim = size.dim
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = XCA(dim, size.heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, dim * size.mlp_ratio)
        self.norm3 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.local_mp = LPI(dim)
        self.gamma1 = nn.Parameter(torch.full((dim,), size.layer_scale))
        self.gamma2 = nn.Parameter(torch.full((dim,), size.layer_scale))
        self.gamma3 = nn.Parameter(torch.full((dim,), size.layer_scale))

    def forward(self, x: Tensor, grid: tuple[int, int], coins: Sequence[Coins | None] = (None, None, None)) -> Tensor:
        """``coins``: which samples drop which of the three branches; None: none."""
        x = add_residual(x, lambda rows: self.attn(self.norm1(rows), self.gamma1), coins[0])
        # BatchNorm is over all samples, whether they keep the branch or not.
        x = add_residual(x, lambda rows: self.local_mp(self.norm3(rows), grid, self.gamma3), coins[1], False)
        return add_residual(x, lambda rows: self.mlp(self.norm2(rows), self.gamma2), coins[2])


class XCiT(nn.Module):
    """The backbone: images [B, 3, height, width] -> :class:`BackboneOutput`, alike in train and eval mode.

    Args:
        size: widths and depths.
        patch_size: 4, 8 or 16 (published models: 8 and 16).
        drop_path_rate: probability that a residual branch of an XCA block is dropped for a sample while training;
            one constant for all blocks, none in class attention, as in the official code.
    """

    def __init__(self, size: XCiTSize, patch_size: int, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        if patch_size not in (4, 8, 16):
            raise ValueError(f"patch_size is {patch_size}, but the convolutional stem exists for 4, 8 and 16")
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate is {drop_path_rate}, expected 0 <= drop_path_rate < 1")
        self.embed_dim = size.dim
        self.patch_size = patch_size
        self.drop_path_rate = drop_path_rate
        self.activation_checkpointing = False
        """Whether stem and XCA blocks are computed again in the backward pass instead of kept."""
        self.compiled = False
        self.patch_embed = ConvPatchEmbed(patch_size, size.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.dim))
        self.blocks = nn.ModuleList(XCABlock(size) for _ in range(size.depth))
        self.cls_attn_blocks = nn.ModuleList(
            ClassAttentionBlock(size.dim, size.heads, size.mlp_ratio, size.layer_scale, size.tokens_norm)
            for _ in range(size.class_blocks)
        )
        self.norm = nn.LayerNorm(size.dim, eps=LAYER_NORM_EPS)
        self.pos_embeder = PositionalEncodingFourier(size.dim)  # the official spelling: it is a state-dict key
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(_init_linear)

    def forward(
        self, images: Tensor, layers: Sequence[int] = (), drop_path_keys: Tensor | None = None
    ) -> BackboneOutput:
        """Features of ``images``.

        Args:
            images: [B, 3, height, width], normalised.
            layers: indices of XCA blocks (negative ones count from the end) whose patch tokens are wanted.
            drop_path_keys: [B] int64; while training with drop-path, the coins of sample i follow from key i alone.
                Without keys they come from torch's default generator.
        """
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        x, grid = recomputed(self.patch_embed, self.patch_embed, images) if recompute else self.patch_embed(images)
        # The residual stream has the parameters' dtype, also under autocast.
        x = x.to(self.cls_token.dtype) + self.pos_embeder(grid)
        coins = self._coins(x, drop_path_keys)
        wanted = [range(len(self.blocks))[layer] for layer in layers]
        kept: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks):
            # Compiled code is for the sizes of training; evaluation has others.
            call = block.forward if self.compiled and not self.training else block
            inputs = (x, grid, coins[index])
            x = recomputed(block, call, *inputs) if recompute else call(*inputs)
            if index in wanted:
                kept[index] = x
        cls_token, patches = self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x
        for index, block in enumerate(self.cls_attn_blocks):
            cls_token, patches = block(cls_token, patches, last=index + 1 == len(self.cls_attn_blocks))
        return BackboneOutput(self.norm(cls_token[:, 0]), x, grid, tuple(kept[index] for index in wanted))

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Let torch.compile make the XCA blocks' kernels for each shape that training has; in evaluation they run as
        they are. Stochastic depth then multiplies dropped branches by 0: shapes must not change from step to step."""
        self.compiled = True
        # Each block is a graph of its own. Dynamo would cut it where DistributedDataParallel's messages end.
        torch._dynamo.config.optimize_ddp = False  # type: ignore[assignment]
        for block in self.blocks:
            block.compile(backend=backend, dynamic=False)

    def _coins(self, x: Tensor, keys: Tensor | None) -> Sequence[Sequence[Coins | None]]:
        """For each branch of each block."""
        if not self.training or self.drop_path_rate == 0.0:
            return [(None, None, None)] * len(self.blocks)
        if keys is None:
            keys = torch.randint(1 << 62, (x.shape[0],), device=x.device)
        branches = XCABlock.residual_branches
        coins = coins_of(
            residual_scales(keys, branches * len(self.blocks), self.drop_path_rate), subset=not self.compiled
        )
        return [coins[start : start + branches] for start in range(0, len(coins), branches)]


def _init_linear(module: nn.Module) -> None:
    """Truncated normal of deviation 0.02 for linear layers; convolutions keep PyTorch's default (official code)."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


_FAMILIES: dict[str, tuple[int, int, bool]] = {  # dim, heads, tokens_norm
    "nano": (128, 4, False),
    "tiny": (192, 4, True),
    "small": (384, 8, True),
    "medium": (512, 8, True),
    "large": (768, 16, True),
}
_DEPTHS = {"nano": (12,), "tiny": (12, 24), "small": (12, 24), "medium": (24,), "large": (24,)}

XCIT_SIZES: dict[str, XCiTSize] = {
    f"xcit_{family}_{depth}": XCiTSize(dim, depth, heads, 1e-5 if depth == 24 else 1.0, tokens_norm)
    for family, (dim, heads, tokens_norm) in _FAMILIES.items()
    for depth in _DEPTHS[family]
}
"""The published sizes by their official names; each exists with patches of 8 and 16, and here of 4 too."""

XCIT_SIZES |= {
    "xcit_pico_4": XCiTSize(64, 4, 4, 1.0),
    "xcit_micro_4": XCiTSize(128, 4, 4, 1.0),
}
"""Two sizes of this project's own, for images of a few dozen pixels and for CPUs."""

PATCH_SIZES = (4, 8, 16)
