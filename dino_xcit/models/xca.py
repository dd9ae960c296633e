"""Cross-covariance attention: attention between feature channels, linear in the number of tokens.

XCiT (arXiv 2106.09681), section 3.2. B batch, N tokens, D features, H heads, d = D / H features a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def cross_covariance_attention(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """softmax(q_hat k_hat^T * temperature) v, where q_hat and k_hat have unit length *over the tokens*.

    Args:
        q, k, v: [B, H, d, N].
        temperature: [H, 1, 1], learned.

    Returns:
        [B, H, d, N] in v's dtype. The norms, the product's scaling and the softmax are computed in float32 at least,
        also under autocast: a channel's norm is a sum over all tokens.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q = F.normalize(q.to(wide), dim=-1)
    k = F.normalize(k.to(wide), dim=-1)
    attention = (q @ k.transpose(-2, -1)).to(wide) * temperature
    return attention.softmax(dim=-1).to(v.dtype) @ v


class XCA(nn.Module):
    """Cross-covariance attention with its projections: [B, N, D] -> [B, N, D]."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 4, 1).unbind(0)
        out = cross_covariance_attention(q, k, v, self.temperature)
        return self.proj(out.permute(0, 3, 1, 2).reshape(batch, tokens, dim))
