"""Cross-covariance attention: attention between feature channels, linear in the number of tokens.

XCiT (arXiv 2106.09681), section 3.2. B batch, N tokens, D features, H heads, d = D / H features a head.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino_xcit.models.xca_gram import gram_attention, product_dtype


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


Path = Literal["direct", "gram"]


class XCA(nn.Module):
    """Cross-covariance attention with its projections: [B, N, D] -> [B, N, D].

    Two paths compute the same: "direct" makes q, k and v of all tokens; "gram" makes one matrix of them (xca_gram.py).
    """

    path: Literal["auto", "direct", "gram"] = "auto"
    """"auto" takes the faster one (:func:`choose`); tests and benchmarks set the others."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layer_scale: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; ``layer_scale`` [D] multiplies the output, as a part of the last projection."""
        batch, tokens, dim = x.shape
        weight: Tensor = self.proj.weight
        bias: Tensor = self.proj.bias
        if layer_scale is not None:
            weight, bias = layer_scale[:, None] * weight, layer_scale * bias
        path = self.path
        if path == "auto":
            path = choose(tokens, dim, product_dtype(x), x.device.type, torch.is_grad_enabled())
        if path == "gram":
            return gram_attention(x, self.temperature, self.qkv.weight, self.qkv.bias, weight, bias)
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads).unbind(2)
        return F.linear(cross_covariance_attention(q, k, v, self.temperature).reshape(batch, tokens, dim), weight, bias)


def choose(tokens: int, dim: int, dtype: torch.dtype, device_type: str, training: bool) -> Path:
    """The faster path. The batch does not matter: the Gram matrix is one image's.

    Args:
        tokens, dim: N, D.
        dtype: of the products over all tokens (under autocast, autocast's).
        device_type: "cpu", "cuda" ...; others have the direct path.
        training: whether a backward pass will follow.
    """
    low = dtype in (torch.bfloat16, torch.float16)
    if device_type == "cpu":
        # Measured by benchmarks/resolution.py, the table of crossovers, on a core with bfloat16 instructions.
        tokens_per_channel = (3.0 if training else 4.5) if low else 1.75
        return "gram" if tokens >= tokens_per_channel * dim else "direct"
    if device_type == "cuda":
        # Not measured: multiplications, in units of D^2. The direct path has 4 N, with the backward pass 12 N; the
        # other 2 N or 5 N, and 3 D or 8 D in float32, whose rate on an A100 or H100 is a 16th of bfloat16's. By this
        # estimate half as much again must be gained.
        slowness = 16 if low else 1
        direct = 12 * tokens if training else 4 * tokens
        gram = 5 * tokens + 8 * slowness * dim if training else 2 * tokens + 3 * slowness * dim
        return "gram" if 1.5 * gram < direct else "direct"
    return "direct"
