"""The heart of XCA: channels attend to channels, softmax(q_hat^T k_hat * temperature) applied to v.

XCiT (arXiv 2106.09681), section 3.2, with a backward pass of its own: autograd's would keep q and k in float32 and
copy each of them for every product. B batch, N tokens, D features, H heads, d = D / H features a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

LEAST_LENGTH = 1e-12
"""The least length that q or k is divided by, as in ``torch.nn.functional.normalize``."""


def cross_covariance_attention(qkv: Tensor, temperature: Tensor) -> Tensor:
    """Attention between the channels of each head.

    Lengths, correlations and softmax are float32 at least, also where qkv is not, because a channel's length is a sum
    over all tokens.

    Args:
        qkv: [B, N, 3 * D]: q, then k, then v, heads in order in each of them.
        temperature: [H, 1, 1], learned.

    Returns:
        [B, N, D] in qkv's dtype.
    """
    out: Tensor = _CrossCovarianceAttention.apply(qkv, temperature)
    return out


class _CrossCovarianceAttention(torch.autograd.Function):
    """``correlation`` [B * H, d, d] is q_hat^T k_hat; with q, k, v by head it is all that backward needs."""

    @staticmethod
    def forward(ctx: FunctionCtx, qkv: Tensor, temperature: Tensor) -> Tensor:
        batch, tokens, heads = qkv.shape[0], qkv.shape[1], temperature.shape[0]
        wide = torch.promote_types(qkv.dtype, torch.float32)
        with torch.autocast(qkv.device.type, enabled=False):
            width = qkv.shape[2] // (3 * heads)
            by_head = qkv.view(batch, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)
            q, k, v = by_head.reshape(3, batch * heads, tokens, width).unbind(0)
            scale_q, scale_k = _inverse_lengths(q, wide), _inverse_lengths(k, wide)
            correlation = _correlation(q, k, scale_q, scale_k)
            attention = _attention(correlation, temperature, batch)
            out = v @ attention.to(v.dtype).transpose(1, 2)
        ctx.save_for_backward(q, k, v, scale_q, scale_k, correlation, temperature)
        return out.view(batch, heads, tokens, width).transpose(1, 2).reshape(batch, tokens, heads * width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, scale_q, scale_k, correlation, temperature = ctx.saved_tensors
        (tokens, width), heads = q.shape[1:], temperature.shape[0]
        batch, low, wide = q.shape[0] // heads, q.dtype, correlation.dtype
        grad_out = grad.to(low).view(batch, tokens, heads, width).transpose(1, 2).reshape(q.shape)
        attention = _attention(correlation, temperature, batch)

        # out = v A^T, A = softmax(temperature * C)
        grad_attention = (grad_out.transpose(1, 2) @ v).to(wide)
        grad_scores = attention * (grad_attention - (grad_attention * attention).sum(dim=-1, keepdim=True))
        grad_v = grad_out @ attention.to(low)
        along = grad_scores * correlation
        grad_temperature = along.unflatten(0, (batch, heads)).sum(dim=(0, 2, 3))[:, None, None]
        grad_correlation = _by_head(grad_scores, temperature, batch)
        along = _by_head(along, temperature, batch)

        # C = (q s_q)^T (k s_k) with s = 1 / length: what changes a channel's length only, does not change C.
        shrink_q, shrink_k = _unclamped(along.sum(dim=2), scale_q), _unclamped(along.sum(dim=1), scale_k)
        if low is torch.float16:  # its range bears unit vectors, not a gradient over two lengths
            unit_q, unit_k = _unit(q, scale_q), _unit(k, scale_k)
            grad_correlation = grad_correlation.to(low)
            grad_q = unit_k @ grad_correlation.transpose(1, 2) - unit_q * shrink_q[:, None]
            grad_k = unit_q @ grad_correlation - unit_k * shrink_k[:, None]
            grad_q, grad_k = (grad_q * scale_q[:, None]).to(low), (grad_k * scale_k[:, None]).to(low)
            return _joined(grad_q, grad_k, grad_v, heads), grad_temperature.to(temperature.dtype)
        grad_product = (grad_correlation * scale_q[:, :, None] * scale_k[:, None, :]).to(low)
        grad_q = k @ grad_product.transpose(1, 2)
        grad_q.addcmul_(q, (shrink_q * scale_q.square()).to(low)[:, None], value=-1)
        grad_k = q @ grad_product
        grad_k.addcmul_(k, (shrink_k * scale_k.square()).to(low)[:, None], value=-1)
        return _joined(grad_q, grad_k, grad_v, heads), grad_temperature.to(temperature.dtype)


def _inverse_lengths(x: Tensor, wide: torch.dtype) -> Tensor:
    """[B * H, N, d] to 1 / length over the tokens, [B * H, d]."""
    if x.is_cuda:
        return torch.linalg.vector_norm(x, dim=1, dtype=wide).clamp_min(LEAST_LENGTH).reciprocal()
    # On a CPU vector_norm takes ten times as long.
    return x.to(wide).square().sum(dim=1).clamp_min(LEAST_LENGTH**2).rsqrt()


def _unclamped(along: Tensor, scale: Tensor) -> Tensor:
    """What a channel's length takes away from its gradient; nothing where the length was clamped."""
    return torch.where(scale < 0.999 / LEAST_LENGTH, along, 0.0)


def _unit(x: Tensor, scale: Tensor) -> Tensor:
    """[B * H, N, d] with channels of length 1, in x's dtype; a short one's scale would leave float16's range."""
    return (x * scale[:, None]).to(x.dtype)


def _joined(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Three [B * H, N, d] to [B, N, 3 * D]."""
    rows, tokens, width = q.shape
    parts = torch.stack((q, k, v)).view(3, rows // heads, heads, tokens, width)
    return parts.permute(1, 3, 0, 2, 4).reshape(rows // heads, tokens, 3 * heads * width)


def _correlation(q: Tensor, k: Tensor, scale_q: Tensor, scale_k: Tensor) -> Tensor:
    """q_hat^T k_hat, [B * H, d, d]. The scales go to whichever is smaller, the N x d factors or the d x d product."""
    if q.dtype is torch.float16 or q.shape[1] <= q.shape[2]:  # in float16 a sum over many tokens could overflow
        return (_unit(q, scale_q).transpose(1, 2) @ _unit(k, scale_k)).to(scale_q.dtype)
    return (q.transpose(1, 2) @ k).to(scale_q.dtype) * scale_q[:, :, None] * scale_k[:, None, :]


def _by_head(x: Tensor, temperature: Tensor, batch: int) -> Tensor:
    """Multiply [B * H, d, d] by each head's temperature."""
    return (x.unflatten(0, (batch, len(temperature))) * temperature).flatten(0, 1)


def _attention(correlation: Tensor, temperature: Tensor, batch: int) -> Tensor:
    return _by_head(correlation, temperature, batch).softmax(dim=-1)
