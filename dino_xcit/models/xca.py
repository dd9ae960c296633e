"""Cross-covariance attention: attention between feature channels, linear in the number of tokens.

XCiT (arXiv 2106.09681), section 3.2. :func:`plain_attention` is the paper's formula. Two paths with custom backward
passes compute the same: the direct path computes q, k and v of all tokens, the Gram path one Gram matrix per image.

B batch, N tokens, D features, H heads, d = D / H features per head.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dino_xcit.models import fused
from dino_xcit.models.fused import product_dtype
from dino_xcit.models.sizes import Sizes, join_sizes, split_sizes

Path = Literal["direct", "gram"]
aten = torch.ops.aten

MIN_LENGTH = 1e-12
"""Lower bound of the norms of q and k, as in ``torch.nn.functional.normalize``."""


class XCA(nn.Module):
    """Cross-covariance attention with its projections: [B, N, D] -> [B, N, D]."""

    path: Literal["auto", "direct", "gram"] = "auto"
    """"auto" selects the faster path (:func:`choose`); tests and benchmarks set the others."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, sizes: Sizes = (), layer_scale: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D], or [T, D] -> [T, D] for several crop ``sizes``.

        ``layer_scale`` [D] is folded into the output projection.
        """
        parts = split_sizes(x, sizes)
        if fused.is_plain():  # first, because a tracer would record the choice of the path
            proj = fused.fold_layer_scale(layer_scale, self.proj.weight, self.proj.bias)
            return join_sizes([F.linear(plain_attention(self.qkv(part), self.temperature), *proj) for part in parts])
        paths = [self.path if self.path != "auto" else self._choose(part) for part in parts]
        gram = "gram" in paths  # its products of weights are float32
        proj = fused.fold_layer_scale(layer_scale, self.proj.weight, self.proj.bias, None if gram else product_dtype(x))
        if not gram:
            return F.linear(direct_attention(self.qkv(x), self.temperature, sizes), *proj)
        return join_sizes([
            gram_attention(part, self.temperature, self.qkv.weight, self.qkv.bias, *proj)
            if path == "gram" else F.linear(direct_attention(self.qkv(part), self.temperature), *proj)
            for part, path in zip(parts, paths, strict=True)
        ])  # fmt: skip

    @staticmethod
    def _choose(x: Tensor) -> Path:
        return choose(x.shape[1], x.shape[2], product_dtype(x), x.device.type, torch.is_grad_enabled())


def choose(tokens: int, dim: int, dtype: torch.dtype, device_type: str, training: bool) -> Path:
    """Return the faster path. It does not depend on the batch, because Gram matrices are per image.

    Args:
        tokens, dim: N, D.
        dtype: dtype of the products over all tokens (under autocast, autocast's).
        device_type: "cpu" or "cuda"; other devices use the direct path.
        training: whether a backward pass follows.
    """
    low = dtype in (torch.bfloat16, torch.float16)
    if device_type == "cpu":
        # Fitted by benchmarks/resolution.py for D = 64 to 512 on a core with bfloat16 instructions. The constant models
        # the number of operators, the slope the products of D x D matrices, which stay in float32.
        return "gram" if tokens >= (2.5 if low else 1.0) * dim + 256 else "direct"
    if device_type == "cuda":
        # Estimated, not measured: multiplications in units of D^2. The direct path has 4 N (12 N with the backward
        # pass), the Gram path 2 N (5 N), plus 3 D (8 D) in float32, which on an A100 or H100 runs at 1/16 of the rate
        # of bfloat16, or at 1/2 as TF32. Require an estimated speed-up of 1.5.
        as_tf32 = torch.get_float32_matmul_precision() != "highest"
        slowness = (2 if as_tf32 else 16) if low else 1
        direct = 12 * tokens if training else 4 * tokens
        gram = 5 * tokens + 8 * slowness * dim if training else 2 * tokens + 3 * slowness * dim
        return "gram" if 1.5 * gram < direct else "direct"
    return "direct"


def plain_attention(qkv: Tensor, temperature: Tensor) -> Tensor:
    """Compute :func:`direct_attention` by the formula of section 3.2 in ordinary PyTorch."""
    q, k, v = qkv.unflatten(2, (3, len(temperature), -1)).permute(2, 0, 3, 4, 1).unbind(0)  # [B, H, d, N]
    q, k = F.normalize(q, dim=-1, eps=MIN_LENGTH), F.normalize(k, dim=-1, eps=MIN_LENGTH)
    attention = (q @ k.transpose(2, 3) * temperature).softmax(dim=-1)  # [B, H, d, d]
    return (attention @ v).permute(0, 3, 1, 2).flatten(2)


# ---- Direct path: unlike autograd, keeps q and k in low precision and does not copy them for every product


def direct_attention(qkv: Tensor, temperature: Tensor, sizes: Sizes = ()) -> Tensor:
    """Attention between the channels of each head: softmax(q_hat^T k_hat * temperature) applied to v.

    Norms, correlations and softmax are at least float32, because the norm of a channel is a sum over all tokens.

    Args:
        qkv: [B, N, 3 * D] or [T, 3 * D]: q, k and v, each with its heads in order.
        temperature: [H, 1, 1], learned.
        sizes: crop sizes, if there are several.

    Returns:
        [B, N, D] or [T, D] in qkv's dtype.
    """
    return _DirectAttention.apply(qkv, temperature, sizes)


class _DirectAttention(torch.autograd.Function):
    """Keeps for each crop size q, k, v [B, H, N, d], the inverse norms [B, H, d] and ``correlation`` [B, H, d, d] =
    q_hat^T k_hat for backward.

    On a GPU the temperature is folded into ``correlation``, which saves passes over [B, H, d, d].
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, temperature: Tensor, sizes: Sizes) -> Tensor:
        heads, saved = len(temperature), [temperature]
        out = qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)
        with torch.autocast(qkv.device.type, enabled=False):
            for part, target in zip(split_sizes(qkv, sizes), split_sizes(out, sizes), strict=True):
                packed = _packed(part.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4))
                q, k, v = packed.unbind(0)
                scale_q, scale_k = _inverse_lengths(packed[:2]).unbind(0)
                correlation = _correlation(q, k, scale_q * temperature[:, :, 0] if q.is_cuda else scale_q, scale_k)
                attention = (correlation if q.is_cuda else correlation * temperature).softmax(dim=-1)
                target.unflatten(2, (heads, -1)).copy_((v @ attention.to(v.dtype).mT).transpose(1, 2))
                saved += [q, k, v, scale_q, scale_k, correlation]
        ctx.save_for_backward(*saved)
        ctx.sizes = sizes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        temperature, *saved = ctx.saved_tensors
        heads, low, of_temperature = len(temperature), saved[0].dtype, []
        of_qkv = grad.new_empty(*grad.shape[:-1], 3 * grad.shape[-1], dtype=low)
        parts = split_sizes(grad.to(low), ctx.sizes), split_sizes(of_qkv, ctx.sizes)
        for number, (part, target) in enumerate(zip(*parts, strict=True)):
            q, k, v, scale_q, scale_k, correlation = saved[6 * number : 6 * number + 6]
            grad_out = _packed(part.unflatten(2, (heads, -1)).transpose(1, 2))
            attention = (correlation if q.is_cuda else correlation * temperature).softmax(dim=-1)

            # out = v A^T, A = softmax(temperature * C)
            grad_attention = _product_of_heads(grad_out, v)
            if q.is_cuda:
                grad_scores = aten._softmax_backward_data(grad_attention, attention, -1, attention.dtype)
            else:
                grad_scores = attention * (grad_attention - (grad_attention * attention).sum(dim=-1, keepdim=True))
            grad_v = grad_out @ attention.to(low)

            # C = (q s_q)^T (k s_k) with s = 1 / norm does not depend on the norm of a channel: subtract that component.
            along = grad_scores * correlation
            if q.is_cuda:
                along_q, along_k = along.sum(dim=-1), along.sum(dim=-2)  # [B, H, d]
                of_temperature.append(along_q.sum(dim=(0, 2)) / (temperature[:, 0, 0] + 1e-30))  # 0 for 0
            else:
                of_temperature.append(along.sum(dim=(0, 2, 3)))
                along = along * temperature
                along_q, along_k = along.sum(dim=-1), along.sum(dim=-2)
            shrink_q, shrink_k = _unclamped(along_q, scale_q), _unclamped(along_k, scale_k)
            if low is torch.float16:  # a gradient divided by two norms would overflow; unit vectors do not
                unit_q, unit_k = _unit(q, scale_q), _unit(k, scale_k)
                grad_product = (grad_scores * temperature).to(low)
                grad_q = unit_k @ grad_product.mT - unit_q * shrink_q[:, :, None]
                grad_k = unit_q @ grad_product - unit_k * shrink_k[:, :, None]
                grad_q, grad_k = (grad_q * scale_q[:, :, None]).to(low), (grad_k * scale_k[:, :, None]).to(low)
            else:
                if q.is_cuda:
                    scaled = grad_scores * (scale_q * temperature[:, :, 0])[..., :, None]
                else:
                    scaled = grad_scores * temperature * scale_q[..., :, None]
                grad_product = torch.mul(scaled, scale_k[..., None, :], out=torch.empty_like(scaled, dtype=low))
                grad_q = k @ grad_product.mT
                grad_q.addcmul_(q, (shrink_q * scale_q.square()).to(low)[:, :, None], value=-1)
                grad_k = q @ grad_product
                grad_k.addcmul_(k, (shrink_k * scale_k.square()).to(low)[:, :, None], value=-1)
            by_token = [gradient.transpose(1, 2)[:, :, None] for gradient in (grad_q, grad_k, grad_v)]
            torch.cat(by_token, dim=2, out=target.unflatten(2, (3, heads, -1)))
        return of_qkv, sum(of_temperature[1:], of_temperature[0])[:, None, None].to(temperature.dtype), None


def _packed(x: Tensor) -> Tensor:
    """Make [..., B, H, N, d] contiguous, otherwise each product copies it; a single image needs no copy."""
    return x if x.shape[-4] == 1 else x.contiguous()


def _inverse_lengths(x: Tensor) -> Tensor:
    """Return 1 / norm over the tokens of [..., N, d]: [..., d], at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.is_cuda:
        return torch.linalg.vector_norm(x, dim=-2, dtype=wide).clamp_min(MIN_LENGTH).reciprocal()
    # vector_norm takes ten times as long on a CPU.
    return x.to(wide).square().sum(dim=-2).clamp_min(MIN_LENGTH**2).rsqrt()


def _unclamped(along: Tensor, scale: Tensor) -> Tensor:
    """Zero the norm component of the gradient where the norm was clamped."""
    return along.masked_fill(scale >= 0.999 / MIN_LENGTH, 0.0)


def _unit(x: Tensor, scale: Tensor) -> Tensor:
    """Normalise the channels of [B, H, N, d] in float32 (the scale can exceed float16), and cast to x's dtype."""
    return torch.mul(x, scale[:, :, None], out=torch.empty_like(x))


def _correlation(q: Tensor, k: Tensor, scale_q: Tensor, scale_k: Tensor) -> Tensor:
    """Compute q_hat^T k_hat, [B, H, d, d]; scales the smaller of the N x d factors and the d x d product."""
    if q.dtype is torch.float16 or q.shape[2] <= q.shape[3]:  # a float16 sum over many tokens could overflow
        return _product_of_heads(_unit(q, scale_q), _unit(k, scale_k))
    return _product_of_heads(q, k) * scale_q[..., :, None] * scale_k[..., None, :]


def _product_of_heads(a: Tensor, b: Tensor) -> Tensor:
    """Compute a^T b of two [B, H, N, d]: [B, H, d, d], at least float32."""
    return _product_over_tokens(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


# ---- Gram path: one linear map per image
#
# q, k and v are linear in the tokens, and attention between channels is linear in v. So for one image with normalised
# tokens X [N, D], their mean m and G = (X - m)^T (X - m) [D, D], and with b = bias + W m for each of q, k and v,
#
#     q_h^T k_h = Wq_h G Wk_h^T + N bq_h bk_h^T        (the squared norms are the diagonals for q = k)
#     A_h       = softmax(temperature_h * q_h^T k_h / norms)
#     output    = (X - m) P^T + p,  P = Wproj blockdiag(A_h) Wv,  p = Wproj blockdiag(A_h) bv + bproj
#
# is exact and does not materialise q, k and v. It needs 2 products over all tokens instead of 4 (5 instead of 12 with
# the backward pass), and keeps only the centred tokens. In return it needs products of D x D matrices for each image,
# so it is faster for many tokens (``choose``).
#
# The mean is subtracted because a large common component of the tokens would cause rounding errors in G. D x D products
# are at least float32 regardless of autocast (TF32 on a GPU if enabled, as in run_pretrain.py); only products over all
# tokens use the lower precision.


def gram_attention(
    x: Tensor, temperature: Tensor, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor
) -> Tensor:
    """XCA with its projections by the Gram path; once differentiable.

    Args:
        x: [B, N, D].
        temperature: [H, 1, 1].
        qkv_weight, qkv_bias: [3 D, D], [3 D].
        proj_weight, proj_bias: [D, D], [D].

    Returns:
        [B, N, D] in the dtype of :func:`product_dtype`, like a linear layer.
    """
    return _GramAttention.apply(x, temperature, qkv_weight, qkv_bias, proj_weight, proj_bias)


class _GramAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        temperature: Tensor,
        qkv_weight: Tensor,
        qkv_bias: Tensor,
        proj_weight: Tensor,
        proj_bias: Tensor,
    ) -> Tensor:
        low = product_dtype(x)  # dtype of the products over all tokens
        with torch.autocast(x.device.type, enabled=False):
            (batch, tokens, _), heads = x.shape, len(temperature)
            wide = torch.promote_types(low, torch.float32)
            w_qk, w_v = _split_heads(qkv_weight.to(wide), heads)  # [H, 2d, D], [H, d, D]
            w_proj = proj_weight.to(wide).expand(batch, -1, -1)

            mean = x.mean(dim=1, dtype=wide)  # [B, D]
            biases = torch.addmm(qkv_bias.to(wide), mean, qkv_weight.to(wide).T)  # [B, 3D]
            b_qk, b_v = (part.movedim(-1, 0) for part in _split_heads(biases.T, heads))  # [B, H, 2d], [B, H, d]

            if x.is_cuda:
                centred = torch.sub(x, mean[:, None], out=torch.empty_like(x, dtype=low))
                gram = _product_over_tokens(centred, centred)  # [B, D, D]
            else:
                # A bfloat16 product rounds its result (PyTorch 2.15), so use float32; exploiting the symmetry, that
                # takes only 1.2 times as long.
                wide_centred = x - mean[:, None]
                centred, gram = wide_centred.to(low), _symmetric_product(wide_centred, wide_centred)
                del wide_centred
            wg = torch.bmm(w_qk.flatten(0, 1).expand(batch, -1, -1), gram).unflatten(1, (heads, -1))  # [B, H, 2d, D]
            squares = (wg * w_qk).sum(dim=-1) + tokens * b_qk.square()  # [B, H, 2d]
            b_q, b_k = b_qk.chunk(2, dim=-1)
            covariance = wg.chunk(2, dim=2)[0] @ w_qk.chunk(2, dim=1)[1].mT
            covariance = covariance + tokens * b_q[..., :, None] * b_k[..., None, :]  # [B, H, d, d]
            inverse_q, inverse_k = squares.clamp_min(MIN_LENGTH**2).rsqrt().chunk(2, dim=-1)
            cosine = covariance * inverse_q[..., :, None] * inverse_k[..., None, :]
            attention = (temperature.to(wide) * cosine).softmax(dim=-1)

            mixed = (attention @ w_v).flatten(1, 2)  # [B, D, D]: blockdiag(A) Wv
            mixed_bias = (attention @ b_v[..., None]).flatten(1)  # [B, D]
            linear = torch.bmm(w_proj, mixed).to(low)
            offset = torch.addmm(proj_bias.to(wide), mixed_bias, proj_weight.to(wide).T).to(low)
            ctx.save_for_backward(
                centred, mean, b_qk, b_v, wg, squares, cosine, attention, linear, temperature, qkv_weight, proj_weight
            )
            return torch.baddbmm(offset[:, None], centred, linear.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """``d_y`` is the gradient of the loss with respect to y of the forward pass."""
        centred, mean, b_qk, b_v, wg, squares, cosine, attention, linear, temperature, qkv_weight, proj_weight = (
            ctx.saved_tensors
        )
        with torch.autocast(grad.device.type, enabled=False):
            (batch, tokens, _), heads = centred.shape, len(temperature)
            wide = wg.dtype
            w_qk, w_v = _split_heads(qkv_weight.to(wide), heads)
            w_proj = proj_weight.to(wide)

            # ---- output = (X - m) P^T + p; P = Wproj mixed; mixed = blockdiag(A) Wv; the same for the biases
            d_linear = _product_over_tokens(grad, centred)  # [B, D, D]
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

            # ---- cosine = covariance / norms. Both are y G y'^T + N b_y b_y' for two rows y, y' of [Wq_h; Wk_h], so a
            # symmetric matrix [2d, 2d] per head, times those rows, gives the gradients of rows, biases and G.
            d_cosine = d_logits * temperature.to(wide)
            inverse = squares.clamp_min(MIN_LENGTH**2).rsqrt()
            inverse_q, inverse_k = inverse.chunk(2, dim=-1)
            d_covariance = d_cosine * inverse_q[..., :, None] * inverse_k[..., None, :]
            shortening = d_cosine * cosine
            d_squares = torch.cat((shortening.sum(dim=-1), shortening.sum(dim=-2)), dim=-1) * inverse.square() / -2
            d_squares = d_squares * (squares >= MIN_LENGTH**2)  # a clamped length has no gradient
            pairs = torch.diag_embed(2 * d_squares)  # [B, H, 2d, 2d]
            size = d_covariance.shape[-1]
            pairs[..., :size, size:] = d_covariance
            pairs[..., size:, :size] = d_covariance.mT

            d_b_qk = tokens * (pairs @ b_qk[..., None]).squeeze(-1)
            d_w_qk = (pairs @ wg).sum(dim=0)
            rows = w_qk.flatten(0, 1).expand(batch, -1, -1)
            d_gram = _symmetric_product(rows, (pairs @ w_qk).flatten(1, 2))  # [B, D, D]: dG + dG^T

            # ---- b = bias + W m, and X - m
            d_biases = _join_heads(d_b_qk.movedim(0, -1), d_b_v.movedim(0, -1))  # [3D, B]
            d_qkv_weight = torch.addmm(_join_heads(d_w_qk, d_w_v), d_biases, mean)
            # The gradient of the mean has no term from G, because centred tokens sum to zero.
            d_mean = (d_biases.T @ qkv_weight.to(wide) - torch.einsum("bi,bij->bj", d_offset, linear.to(wide))) / tokens
            d_x = torch.baddbmm(d_mean.to(grad.dtype)[:, None], centred, d_gram.to(grad.dtype))
            d_x.baddbmm_(grad, linear)
            return d_x, d_temperature, d_qkv_weight, d_biases.sum(dim=1), d_proj_weight, d_offset.sum(dim=0)


def _symmetric_product(a: Tensor, b: Tensor) -> Tensor:
    """Compute a symmetric a^T b of two [B, N, D]: [B, D, D].

    On a CPU, compute four panels from the diagonal to the right, with 5/8 of the multiplications. On a GPU the launches
    of several small products take longer than one product.
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


def _product_over_tokens(a: Tensor, b: Tensor) -> Tensor:
    """Compute a^T b of two [B, N, D]: [B, D, D], at least float32."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return torch.bmm(a.mT, b)
    if a.device.type == "cuda":
        return torch.bmm(a.mT, b, out_dtype=torch.float32)
    if a.dtype is torch.float16:  # the sums can exceed 65504
        return torch.bmm(a.mT.to(torch.float32), b.to(torch.float32))
    return torch.bmm(a.mT, b).to(torch.float32)


def _split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Split [3 D, *] into the rows of q and k, [H, 2d, *], and of v, [H, d, *]."""
    q, k, v = qkv.unflatten(0, (3, heads, -1)).unbind(0)
    return torch.cat((q, k), dim=1), v


def _join_heads(qk: Tensor, v: Tensor) -> Tensor:
    """Inverse of :func:`_split_heads`: [H, 2d, *] and [H, d, *] to [3 D, *]."""
    return torch.stack((*qk.chunk(2, dim=1), v)).flatten(0, 2)
