"""Class attention (CaiT, arXiv 2103.17239): the patch tokens are gathered into the class token.

B batch, N patch tokens, D features, H heads, d = D / H features a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino_xcit.models.mlp import Mlp

LAYER_NORM_EPS = 1e-6


class ClassAttention(nn.Module):
    """Attention in which the class token alone asks.

    With a single query neither keys nor values need be made: q^T (W_k x) is (W_k^T q)^T x, and a weighted mean of
    W_v x is W_v times the weighted mean of x. So a token costs 2 H D multiplications instead of 2 D^2.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, cls_token: Tensor, patches: Tensor) -> Tensor:
        """[B, 1, D] and [B, N, D] -> [B, 1, D]; the class token attends to itself, too."""
        weight_q, weight_k, weight_v = self.qkv.weight.chunk(3)
        bias_q, _, bias_v = self.qkv.bias.chunk(3)  # the keys' adds the same to all scores, which softmax does not see
        q = self._by_head(F.linear(cls_token, weight_q, bias_q) * self.scale)
        asked = (q @ self._rows_by_head(weight_k)).transpose(0, 1)  # [B, H, D]
        scores = torch.cat((asked @ cls_token.transpose(1, 2), asked @ patches.transpose(1, 2)), dim=2)
        attention = scores.softmax(dim=-1)
        mean = attention[:, :, :1] @ cls_token + attention[:, :, 1:] @ patches  # [B, H, D]
        out = mean.transpose(0, 1) @ self._rows_by_head(weight_v).transpose(1, 2)  # [H, B, d]
        return self.proj(out.transpose(0, 1).flatten(1)[:, None] + bias_v)

    def _by_head(self, x: Tensor) -> Tensor:
        """[B, 1, D] -> [H, B, d]."""
        return x.squeeze(1).unflatten(1, (self.num_heads, -1)).transpose(0, 1)

    def _rows_by_head(self, weight: Tensor) -> Tensor:
        """[D, *] -> [H, d, *]."""
        return weight.unflatten(0, (self.num_heads, -1))


class ClassAttentionBlock(nn.Module):
    """Gathers the patch tokens into the class token; the patch tokens pass through a norm and a residual only.

    Two facts of the published models are kept because their weights depend on them: patch tokens receive
    gamma1 * norm1(x) as if they had been attended to, and with ``tokens_norm`` the second norm replaces x for every
    token, after which the last residual doubles the patch tokens.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int, layer_scale: float, tokens_norm: bool) -> None:
        super().__init__()
        self.tokens_norm = tokens_norm
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = ClassAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, dim * mlp_ratio)
        self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, cls_token: Tensor, patches: Tensor, last: bool) -> tuple[Tensor, Tensor]:
        """Class token [B, 1, D] and patch tokens [B, N, D] to the same; of the ``last`` block nobody wants the patch
        tokens, and they are returned as they came."""
        normed_cls, normed = self.norm1(cls_token), self.norm1(patches)
        cls_token = self.norm2(cls_token + self.gamma1 * self.attn(normed_cls, normed))
        cls_token = cls_token + self.gamma2 * self.mlp(cls_token)
        if not last:
            patches = patches + self.gamma1 * normed
            patches = 2 * (self.norm2(patches) if self.tokens_norm else patches)
        return cls_token, patches
