"""Cross-covariance attention: attention between feature channels, linear in the number of tokens.

XCiT (arXiv 2106.09681), section 3.2. B batch, N tokens, D features, H heads, d = D / H features a head.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino_xcit.models.cross_covariance import cross_covariance_attention
from dino_xcit.models.precision import folds_layer_scale, product_dtype
from dino_xcit.models.xca_gram import gram_attention

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
        tokens, dim = x.shape[1:]
        weight: Tensor = self.proj.weight
        bias: Tensor = self.proj.bias
        if layer_scale is not None:
            if not folds_layer_scale(x):
                return layer_scale * self(x)
            weight, bias = layer_scale[:, None] * weight, layer_scale * bias
        path = self.path
        if path == "auto":
            path = choose(tokens, dim, product_dtype(x), x.device.type, torch.is_grad_enabled())
        if path == "gram":
            return gram_attention(x, self.temperature, self.qkv.weight, self.qkv.bias, weight, bias)
        return F.linear(cross_covariance_attention(self.qkv(x), self.temperature), weight, bias)


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
        # Fitted to D = 64 to 512 on a core with bfloat16 instructions; benchmarks/resolution.py measures it again. The
        # constant is for the number of operators, the slope for products of D x D matrices, which stay in float32.
        return "gram" if tokens >= (2.5 if low else 1.0) * dim + 256 else "direct"
    if device_type == "cuda":
        # Not measured: multiplications, in units of D^2. The direct path has 4 N, with the backward pass 12 N; the
        # other 2 N or 5 N, and 3 D or 8 D in float32, whose rate on an A100 or H100 is a 16th of bfloat16's, or as
        # TF32 half of it. By this estimate half as much again must be gained.
        as_tf32 = torch.get_float32_matmul_precision() != "highest"
        slowness = (2 if as_tf32 else 16) if low else 1
        direct = 12 * tokens if training else 4 * tokens
        gram = 5 * tokens + 8 * slowness * dim if training else 2 * tokens + 3 * slowness * dim
        return "gram" if 1.5 * gram < direct else "direct"
    return "direct"
