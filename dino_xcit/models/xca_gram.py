"""Cross-covariance attention as one linear map per image, found from the Gram matrix of its tokens.

q, k and v are linear in the tokens, and attention between channels is linear in v. So for one image with normalised
tokens X [N, D], their mean m and G = (X - m)^T (X - m) [D, D], and with b = bias + W m for each of q, k and v,

    q_h^T k_h = Wq_h G Wk_h^T + N bq_h bk_h^T        (the lengths of q and k: the same with q = k, its diagonal)
    A_h       = softmax(temperature_h * q_h^T k_h / lengths)
    output    = (X - m) P^T + p,  P = Wproj blockdiag(A_h) Wv,  p = Wproj blockdiag(A_h) bv + bproj

is exact, and q, k and v never exist. Two products of the size of all tokens remain of more than four, five of more than
twelve with the backward pass, and of the activations only the centred tokens. The price is products of D x D matrices
for each image: it pays where tokens are many (``XCA`` in xca.py chooses).

The mean is taken out first because a common part of all tokens would drown the rest of G in rounding. What is D x D is
float32 at least, whatever autocast says (on a GPU TF32, where float32 products may be that, as run_pretrain.py has it);
only products of all tokens are in the lower precision.

B batch, N tokens, D features, H heads, d = D / H features a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dino_xcit.models.cross_covariance import LEAST_LENGTH
from dino_xcit.models.precision import product_dtype


def gram_attention(
    x: Tensor, temperature: Tensor, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor
) -> Tensor:
    """XCA with its projections, by the Gram matrix; differentiable once.

    Args:
        x: [B, N, D].
        temperature: [H, 1, 1].
        qkv_weight, qkv_bias: [3 D, D], [3 D].
        proj_weight, proj_bias: [D, D], [D].

    Returns:
        [B, N, D] in :func:`product_dtype`'s dtype, as from any linear layer.
    """
    return GramAttention.apply(x, temperature, qkv_weight, qkv_bias, proj_weight, proj_bias, product_dtype(x))


class GramAttention(torch.autograd.Function):
    """See :func:`gram_attention`. ``low`` is the dtype of the products over all tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        temperature: Tensor,
        qkv_weight: Tensor,
        qkv_bias: Tensor,
        proj_weight: Tensor,
        proj_bias: Tensor,
        low: torch.dtype,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            batch, tokens, _ = x.shape
            heads = temperature.shape[0]
            wide = torch.promote_types(low, torch.float32)
            w_qk, w_v = _by_head(qkv_weight.to(wide), heads)  # [H, 2d, D], [H, d, D]
            w_proj = proj_weight.to(wide).expand(batch, -1, -1)

            mean = x.mean(dim=1, dtype=wide)  # [B, D]
            centred = x - mean[:, None]
            biases = torch.addmm(qkv_bias.to(wide), mean, qkv_weight.to(wide).T)  # [B, 3D]
            b_qk, b_v = (part.movedim(-1, 0) for part in _by_head(biases.T, heads))  # [B, H, 2d], [B, H, d]

            gram = gram_matrix(centred, low)  # [B, D, D]
            centred = centred.to(low)
            wg = torch.bmm(w_qk.flatten(0, 1).expand(batch, -1, -1), gram).unflatten(1, (heads, -1))  # [B, H, 2d, D]
            squares = (wg * w_qk).sum(dim=-1) + tokens * b_qk.square()  # [B, H, 2d]
            b_q, b_k = b_qk.chunk(2, dim=-1)
            covariance = wg.chunk(2, dim=2)[0] @ w_qk.chunk(2, dim=1)[1].mT
            covariance = covariance + tokens * b_q[..., :, None] * b_k[..., None, :]  # [B, H, d, d]
            inverse_q, inverse_k = squares.clamp_min(LEAST_LENGTH**2).rsqrt().chunk(2, dim=-1)
            cosine = covariance * inverse_q[..., :, None] * inverse_k[..., None, :]
            attention = (temperature.to(wide) * cosine).softmax(dim=-1)

            mixed = (attention @ w_v).flatten(1, 2)  # [B, D, D]: blockdiag(A) Wv
            mixed_bias = (attention @ b_v[..., None]).flatten(1)  # [B, D]
            linear = torch.bmm(w_proj, mixed).to(low)
            offset = torch.addmm(proj_bias.to(wide), mixed_bias, proj_weight.to(wide).T).to(low)
            ctx.save_for_backward(
                centred, mean, b_qk, b_v, wg, squares, cosine, attention, linear, temperature, qkv_weight, proj_weight
            )
            ctx.dtypes = (x.dtype, qkv_bias.dtype, proj_bias.dtype)
            return torch.baddbmm(offset[:, None], centred, linear.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """``d_y`` is the loss's gradient with respect to y, with y's name and shape as in the forward pass."""
        centred, mean, b_qk, b_v, wg, squares, cosine, attention, linear, temperature, qkv_weight, proj_weight = (
            ctx.saved_tensors
        )
        x_dtype, qkv_bias_dtype, proj_bias_dtype = ctx.dtypes
        with torch.autocast(grad.device.type, enabled=False):
            batch, tokens, _ = centred.shape
            heads = temperature.shape[0]
            wide = wg.dtype
            w_qk, w_v = _by_head(qkv_weight.to(wide), heads)
            w_proj = proj_weight.to(wide)

            # ---- output = (X - m) P^T + p; P = Wproj mixed; mixed = blockdiag(A) Wv; the same for the biases
            d_linear = product_over_tokens(grad, centred)  # [B, D, D]
            d_offset = grad.sum(dim=1, dtype=wide)  # [B, D]
            mixed = (attention @ w_v).flatten(1, 2)
            mixed_bias = (attention @ b_v[..., None]).flatten(1)
            d_proj_weight = torch.einsum("bij,bkj->ik", d_linear, mixed) + d_offset.T @ mixed_bias
            d_mixed = torch.bmm(w_proj.T.expand(batch, -1, -1), d_linear).unflatten(1, (heads, -1))  # [B, H, d, D]
            d_mixed_bias = (d_offset @ w_proj).unflatten(1, (heads, -1))  # [B, H, d]
            d_attention = d_mixed @ w_v.mT + d_mixed_bias[..., :, None] * b_v[..., None, :]
            d_w_v = (attention.mT @ d_mixed).sum(dim=0)
            d_b_v = (attention.mT @ d_mixed_bias[..., None]).squeeze(-1)

            # ---- A = softmax(temperature * cosine)
            d_logits = attention * (d_attention - (d_attention * attention).sum(dim=-1, keepdim=True))
            d_temperature = (d_logits * cosine).sum(dim=(0, 2, 3))[:, None, None]

            # ---- cosine = covariance / lengths. Both are y G y'^T + N b_y b_y' for two rows y, y' of [Wq_h; Wk_h]. So
            # one symmetric matrix [2d, 2d] a head, times those rows, gives the gradients of rows, biases and G.
            d_cosine = d_logits * temperature.to(wide)
            inverse = squares.clamp_min(LEAST_LENGTH**2).rsqrt()
            inverse_q, inverse_k = inverse.chunk(2, dim=-1)
            d_covariance = d_cosine * inverse_q[..., :, None] * inverse_k[..., None, :]
            shortening = d_cosine * cosine
            d_squares = torch.cat((shortening.sum(dim=-1), shortening.sum(dim=-2)), dim=-1) * inverse.square() / -2
            d_squares = d_squares * (squares >= LEAST_LENGTH**2)  # a clamped length has no gradient
            pairs = torch.diag_embed(2 * d_squares)  # [B, H, 2d, 2d]
            size = d_covariance.shape[-1]
            pairs[..., :size, size:] = d_covariance
            pairs[..., size:, :size] = d_covariance.mT

            d_b_qk = tokens * (pairs @ b_qk[..., None]).squeeze(-1)
            d_w_qk = (pairs @ wg).sum(dim=0)
            rows = w_qk.flatten(0, 1).expand(batch, -1, -1)
            d_gram = symmetric_product(rows, (pairs @ w_qk).flatten(1, 2))  # [B, D, D]: dG + dG^T

            # ---- b = bias + W m, and X - m
            d_biases = _from_heads(d_b_qk.movedim(0, -1), d_b_v.movedim(0, -1))  # [3D, B]
            d_qkv_weight = torch.addmm(_from_heads(d_w_qk, d_w_v), d_biases, mean)
            # Every token is in the mean. Centred tokens sum to zero, so G has no part in this.
            d_mean = (d_biases.T @ qkv_weight.to(wide) - torch.einsum("bi,bij->bj", d_offset, linear.to(wide))) / tokens
            d_x = torch.baddbmm(d_mean.to(grad.dtype)[:, None], centred, d_gram.to(grad.dtype))
            d_x.baddbmm_(grad, linear)
            return (
                d_x.to(x_dtype),
                d_temperature.to(temperature.dtype),
                d_qkv_weight.to(qkv_weight.dtype),
                d_biases.sum(dim=1).to(qkv_bias_dtype),
                d_proj_weight.to(proj_weight.dtype),
                d_offset.sum(dim=0).to(proj_bias_dtype),
                None,
            )


def gram_matrix(x: Tensor, low: torch.dtype) -> Tensor:
    """x^T x, [B, N, D] -> [B, D, D], float32 at least; ``low`` is the dtype that a GPU may round x to.

    On a CPU the float32 product that computes each pair of channels once takes 1.2 times as long as a bfloat16 product,
    whose result would be rounded (PyTorch 2.15 has no bfloat16 product with float32 result there).
    """
    if x.device.type == "cuda":
        return product_over_tokens(x.to(low), x.to(low))
    return symmetric_product(x, x)


def symmetric_product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b, two [B, N, D] -> [B, D, D], where it is known to be symmetric.

    On a CPU, four panels from the diagonal to the right: 5/8 of the multiplications. A GPU has its product done before
    so many small ones were started.
    """
    if a.device.type == "cuda":
        return torch.bmm(a.mT, b)
    batch, _, dim = a.shape
    product = a.new_empty(batch, dim, dim)
    width = -(-dim // 4)
    for start in range(0, dim, width):
        stop = start + width
        product[:, start:stop, start:] = torch.bmm(a[:, :, start:stop].mT, b[:, :, start:])
        product[:, stop:, start:stop] = product[:, start:stop, stop:].mT
    return product


def product_over_tokens(a: Tensor, b: Tensor) -> Tensor:
    """a^T b, two [B, N, D] -> [B, D, D], float32 at least."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return torch.bmm(a.mT, b)
    if a.device.type == "cuda":
        return torch.bmm(a.mT, b, out_dtype=torch.float32)
    if a.dtype is torch.float16:  # its range ends at 65504
        return torch.bmm(a.mT.to(torch.float32), b.to(torch.float32))
    return torch.bmm(a.mT, b).to(torch.float32)


def _by_head(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """[3 D, *] to what makes q and k, [H, 2d, *], q's rows first, and what makes v, [H, d, *]."""
    q, k, v = qkv.unflatten(0, (3, heads, -1)).unbind(0)
    return torch.cat((q, k), dim=1), v


def _from_heads(qk: Tensor, v: Tensor) -> Tensor:
    """The way back: [H, 2d, *] and [H, d, *] to [3 D, *]."""
    return torch.stack((*qk.chunk(2, dim=1), v)).flatten(0, 2)
