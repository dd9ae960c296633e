"""Cross-covariance attention: attention between feature channels, linear in the number of tokens.

XCiT (arXiv 2106.09681), section 3.2. B batch, N tokens, D features, H heads, d = D / H features a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def cross_covariance_attention(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """softmax(q_hat^T k_hat * temperature) applied to v, where q_hat and k_hat have unit length *over the tokens*.

    The lengths scale whichever is smaller: the N x d factors, or else the d x d product; the value is the same. They,
    the scaled product and the softmax are float32 at least, also under autocast, because a channel's length is a sum
    over all tokens.

    Args:
        q, k, v: [B, N, H, d].
        temperature: [H, 1, 1], learned.

    Returns:
        [B, N, H, d] in v's dtype.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q_scale = _inverse_length_over_tokens(q.to(wide)) * temperature.squeeze(-1)
    k_scale = _inverse_length_over_tokens(k.to(wide))
    tokens, channels = q.shape[1], q.shape[-1]
    # A sum over thousands of tokens can leave float16's range, so there the factors are scaled whatever their size.
    scale_factors = tokens <= channels or q.dtype is torch.float16
    if scale_factors:
        q, k = q * q_scale[:, None], k * k_scale[:, None]
    attention = (q.permute(0, 2, 3, 1) @ k.permute(0, 2, 1, 3)).to(wide)
    if not scale_factors:
        attention = attention * (q_scale[..., :, None] * k_scale[..., None, :])
    attention = attention.softmax(dim=-1).to(v.dtype)
    return (v.transpose(1, 2) @ attention.transpose(-2, -1)).transpose(1, 2)


def _inverse_length_over_tokens(x: Tensor) -> Tensor:
    """[B, N, H, d] to 1 / length [B, H, d]; the length is at least 1e-12, as in ``torch.nn.functional.normalize``.

    The clamp stands inside the root: the root's gradient at zero would be infinite.
    """
    return x.square().sum(dim=1).clamp_min(1e-24).rsqrt()


class XCA(nn.Module):
    """Cross-covariance attention with its projections: [B, N, D] -> [B, N, D]."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layer_scale: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; ``layer_scale`` [D] multiplies the output, as a part of the last projection."""
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads).unbind(2)
        mixed = cross_covariance_attention(q, k, v, self.temperature).reshape(batch, tokens, dim)
        if layer_scale is None:
            return self.proj(mixed)
        return F.linear(mixed, layer_scale[:, None] * self.proj.weight, layer_scale * self.proj.bias)
