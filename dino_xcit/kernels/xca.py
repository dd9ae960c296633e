"""Cross-covariance attention from q, k and v in one kernel, and its backward pass in another.

The twin is :func:`dino_xcit.models.xca.direct_attention`. One program computes one head of one image: it reads q and k
in tiles of tokens, keeps the d x d attention in registers, and reads v. The backward pass reads everything again and
recomputes the attention, so only the inputs are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from dino_xcit.kernels import dot_precision, launchable

FORWARD, BACKWARD = 128, 64
"""Bytes of a channel's tile of tokens, as many as fit into the registers."""


@triton.jit
def _inverse_length(squares):
    """1 / max(norm, 1e-12)."""
    return 1.0 / tl.sqrt(tl.maximum(squares, 1e-24))


@triton.jit
def _softmax(scores, own):
    scores = tl.where(own[None, :], scores, -float("inf"))
    scores = tl.exp(scores - tl.max(scores, 1)[:, None])
    return scores / tl.sum(scores, 1)[:, None]


@triton.jit
def xca_forward(
    qkv, temperature, out, tokens, heads,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """qkv [B, N, 3 D] -> out [B, N, D]. WIDTH: d; PADDED: the next power of two."""
    image, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    dim = heads * WIDTH
    channel = tl.arange(0, PADDED)
    own = channel < WIDTH
    low = qkv.dtype.element_ty
    source = qkv + image.to(tl.int64) * tokens * 3 * dim + head * WIDTH + channel[None, :]
    target = out + image.to(tl.int64) * tokens * dim + head * WIDTH + channel[None, :]

    product = tl.zeros((PADDED, PADDED), tl.float32)
    squares_q = tl.zeros((PADDED,), tl.float32)
    squares_k = tl.zeros((PADDED,), tl.float32)
    for start in range(0, tokens, TILE):
        token = (start + tl.arange(0, TILE))[:, None]
        mask = (token < tokens) & own[None, :]
        q = tl.load(source + token * 3 * dim, mask, 0.0)
        k = tl.load(source + token * 3 * dim + dim, mask, 0.0)
        product = tl.dot(tl.trans(q), k, product, input_precision=PRECISION)
        squares_q += tl.sum(q.to(tl.float32) * q.to(tl.float32), 0)
        squares_k += tl.sum(k.to(tl.float32) * k.to(tl.float32), 0)
    cosine = product * _inverse_length(squares_q)[:, None] * _inverse_length(squares_k)[None, :]
    attention = _softmax(cosine * tl.load(temperature + head), own).to(low)

    for start in range(0, tokens, TILE):
        token = (start + tl.arange(0, TILE))[:, None]
        mask = (token < tokens) & own[None, :]
        v = tl.load(source + token * 3 * dim + 2 * dim, mask, 0.0)
        mixed = tl.dot(v, tl.trans(attention), input_precision=PRECISION)
        tl.store(target + token * dim, mixed.to(low), mask)


@triton.jit
def xca_backward(
    qkv, temperature, grad, grad_qkv, grad_temperature, tokens, heads,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad [B, N, D] -> grad_qkv [B, N, 3 D], grad_temperature [B, H]."""
    image, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    dim = heads * WIDTH
    channel = tl.arange(0, PADDED)
    own = channel < WIDTH
    low = qkv.dtype.element_ty
    offset = image.to(tl.int64) * tokens * 3 * dim + head * WIDTH + channel[None, :]
    source, target = qkv + offset, grad_qkv + offset
    grads = grad + image.to(tl.int64) * tokens * dim + head * WIDTH + channel[None, :]

    product = tl.zeros((PADDED, PADDED), tl.float32)
    grad_attention = tl.zeros((PADDED, PADDED), tl.float32)
    squares_q = tl.zeros((PADDED,), tl.float32)
    squares_k = tl.zeros((PADDED,), tl.float32)
    for start in range(0, tokens, TILE):
        token = (start + tl.arange(0, TILE))[:, None]
        mask = (token < tokens) & own[None, :]
        q = tl.load(source + token * 3 * dim, mask, 0.0)
        k = tl.load(source + token * 3 * dim + dim, mask, 0.0)
        v = tl.load(source + token * 3 * dim + 2 * dim, mask, 0.0)
        g = tl.load(grads + token * dim, mask, 0.0)
        product = tl.dot(tl.trans(q), k, product, input_precision=PRECISION)
        grad_attention = tl.dot(tl.trans(g), v, grad_attention, input_precision=PRECISION)
        squares_q += tl.sum(q.to(tl.float32) * q.to(tl.float32), 0)
        squares_k += tl.sum(k.to(tl.float32) * k.to(tl.float32), 0)

    scale_q, scale_k = _inverse_length(squares_q), _inverse_length(squares_k)
    heat = tl.load(temperature + head)
    cosine = product * scale_q[:, None] * scale_k[None, :]
    attention = _softmax(cosine * heat, own)
    grad_scores = attention * (grad_attention - tl.sum(grad_attention * attention, 1)[:, None])
    grad_scores = tl.where(own[:, None], grad_scores, 0.0)
    along = grad_scores * cosine
    tl.store(grad_temperature + tl.program_id(0), tl.sum(tl.sum(along, 1), 0))
    # The cosine does not depend on a channel's norm: subtract that component, unless the norm was clamped.
    shrink_q = tl.where(squares_q >= 1e-24, tl.sum(along, 1) * heat, 0.0)
    shrink_k = tl.where(squares_k >= 1e-24, tl.sum(along, 0) * heat, 0.0)
    grad_cosine = (grad_scores * heat).to(low)
    attention_low = attention.to(low)

    for start in range(0, tokens, TILE):
        token = (start + tl.arange(0, TILE))[:, None]
        mask = (token < tokens) & own[None, :]
        unit_q = (tl.load(source + token * 3 * dim, mask, 0.0).to(tl.float32) * scale_q[None, :]).to(low)
        unit_k = (tl.load(source + token * 3 * dim + dim, mask, 0.0).to(tl.float32) * scale_k[None, :]).to(low)
        g = tl.load(grads + token * dim, mask, 0.0)
        grad_q = tl.dot(unit_k, tl.trans(grad_cosine), input_precision=PRECISION)
        grad_q = (grad_q - unit_q.to(tl.float32) * shrink_q[None, :]) * scale_q[None, :]
        grad_k = tl.dot(unit_q, grad_cosine, input_precision=PRECISION)
        grad_k = (grad_k - unit_k.to(tl.float32) * shrink_k[None, :]) * scale_k[None, :]
        grad_v = tl.dot(g, attention_low, input_precision=PRECISION)
        tl.store(target + token * 3 * dim, grad_q.to(low), mask)
        tl.store(target + token * 3 * dim + dim, grad_k.to(low), mask)
        tl.store(target + token * 3 * dim + 2 * dim, grad_v.to(low), mask)


@triton_op("dino_xcit::xca", mutates_args=())
def attention(qkv: Tensor, temperature: Tensor, images: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Attention between the channels of each head.

    Args:
        qkv: [T, 3 * D], the tokens of crops of several sizes; each token has q, k and v, each with its heads in order.
        temperature: [H, 1, 1] float32.
        images, tokens: number of images and tokens per image for each crop size.

    Returns:
        [T, D] in qkv's dtype.
    """
    qkv = qkv.contiguous()
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
    heads, width = _heads_and_width(qkv, temperature)
    first = 0
    for count, length in zip(images, tokens, strict=True):
        rows = slice(first, first + count * length)
        launchable(xca_forward)[(count * heads,)](
            qkv[rows], temperature, out[rows], length, heads, **_constants(qkv, width, FORWARD)
        )  # fmt: skip
        first += count * length
    return out


@triton_op("dino_xcit::xca_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, qkv: Tensor, temperature: Tensor, images: Sequence[int], tokens: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """grad [T, D] -> gradients of qkv [T, 3 D] and of the temperature for each image, [B, H]."""
    heads, width = _heads_and_width(qkv, temperature)
    qkv = qkv.contiguous()
    grad_qkv, grad_temperature = torch.empty_like(qkv), temperature.new_empty(sum(images), heads)
    first = image = 0
    for count, length in zip(images, tokens, strict=True):
        rows = slice(first, first + count * length)
        launchable(xca_backward)[(count * heads,)](
            qkv[rows], temperature, grad[rows], grad_qkv[rows], grad_temperature[image : image + count], length, heads,
            **_constants(qkv, width, BACKWARD),
        )  # fmt: skip
        first, image = first + count * length, image + count
    return grad_qkv, grad_temperature


def _heads_and_width(qkv: Tensor, temperature: Tensor) -> tuple[int, int]:
    return len(temperature), qkv.shape[1] // 3 // len(temperature)


def _constants(qkv: Tensor, width: int, tile_bytes: int) -> dict[str, Any]:
    padded, tile = max(16, triton.next_power_of_2(width)), max(16, tile_bytes // qkv.element_size())
    return {"WIDTH": width, "PADDED": padded, "TILE": tile, "PRECISION": dot_precision(), "num_warps": 8}


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, temperature, ctx.images, ctx.tokens = inputs
    ctx.save_for_backward(qkv, temperature)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    qkv, temperature = ctx.saved_tensors
    grad_qkv, by_image = _attention_backward(grad.to(qkv.dtype).contiguous(), qkv, temperature, ctx.images, ctx.tokens)
    return grad_qkv, by_image.sum(dim=0)[:, None, None], None, None


attention.register_autograd(_backward, setup_context=_keep)
