"""DINO's targets and loss over K prototypes: one kernel for the targets, one each for the loss and its backward pass.

The twins are ``DINOLoss.teacher_probabilities`` with ``entropy``, and ``DINOLoss.cross_entropy``, in
:mod:`dino_xcit.methods.dino`. Each pass reads the student's logits once, and none writes them in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from dino_xcit.kernels import launchable

VIEWS = 2
"""Views of an image that a program has at once; the targets that they share stay in the L1 cache."""
TILE = 1024
"""Prototypes per tile of the loss."""
ROW_TILE = 4096
"""Prototypes per tile of the targets."""


@triton.jit
def _image_and_views(views, VIEWS: tl.constexpr):
    """Neighbouring programs share an image, and so its targets in the L2 cache. The last view fills an odd group."""
    groups = tl.cdiv(views, VIEWS)
    view = tl.program_id(0) % groups * VIEWS + tl.arange(0, VIEWS)
    return tl.program_id(0) // groups, tl.minimum(view, views - 1)


@triton.jit
def _sum_of_others(targets, image, view, k, batch, prototypes, GLOBAL_VIEWS: tl.constexpr):
    """Sum of the targets of the global views other than ``view``, [VIEWS, TILE]."""
    total = tl.zeros((view.shape[0], k.shape[0]), tl.float32)
    for g in tl.static_range(GLOBAL_VIEWS):
        row = targets + (image + g * batch).to(tl.int64) * prototypes
        total += tl.load(row + k[None, :], (view != g)[:, None] & (k < prototypes)[None, :], 0.0)
    return total


@triton.jit
def cross_entropy_forward(
    student, targets, loss, peak, share, batch, views, prototypes, inverse_temp, factor,
    GLOBAL_VIEWS: tl.constexpr, VIEWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """loss [V * B], multiplied by factor; peak: the largest logit; share: sum of the target / sum of exponentials."""
    image, view = _image_and_views(views, VIEWS)
    row = view * batch + image
    source = student + row.to(tl.int64)[:, None] * prototypes
    highest = tl.load(student + row.to(tl.int64) * prototypes).to(tl.float32)
    total = tl.zeros((VIEWS, TILE), tl.float32)
    mass = tl.zeros((VIEWS, TILE), tl.float32)
    gap = tl.zeros((VIEWS, TILE), tl.float32)
    for start in range(0, prototypes, TILE):
        k = start + tl.arange(0, TILE)
        mask = (k < prototypes)[None, :]
        logits = tl.load(source + k[None, :], mask, -float("inf")).to(tl.float32)
        target = _sum_of_others(targets, image, view, k, batch, prototypes, GLOBAL_VIEWS)
        new = tl.maximum(highest, tl.max(logits, 1))
        total *= tl.exp((highest - new) * inverse_temp)[:, None]
        total += tl.exp((logits - new[:, None]) * inverse_temp)
        # Distances to the maximum are not negative, so nothing cancels in the sum of target * (maximum - logit).
        gap += mass * (new - highest)[:, None] + target * tl.where(mask, new[:, None] - logits, 0.0)
        mass += target
        highest = new
    sum_total, sum_mass = tl.sum(total, 1), tl.sum(mass, 1)
    tl.store(loss + row, (sum_mass * tl.log(sum_total) + tl.sum(gap, 1) * inverse_temp) * factor)
    tl.store(peak + row, highest)
    tl.store(share + row, sum_mass / sum_total)


@triton.jit
def cross_entropy_backward(
    student, targets, peak, share, grad, grad_student, batch, views, prototypes, inverse_temp, factor,
    GLOBAL_VIEWS: tl.constexpr, VIEWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """grad [] -> grad_student [V * B, K]."""
    image, view = _image_and_views(views, VIEWS)
    row = view * batch + image
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = (k < prototypes)[None, :]
    at = row.to(tl.int64)[:, None] * prototypes + k[None, :]
    logits = tl.load(student + at, mask, 0.0).to(tl.float32)
    target = _sum_of_others(targets, image, view, k, batch, prototypes, GLOBAL_VIEWS)
    power = tl.exp((logits - tl.load(peak + row)[:, None]) * inverse_temp)
    result = (power * tl.load(share + row)[:, None] - target) * (tl.load(grad) * factor * inverse_temp)
    tl.store(grad_student + at, result.to(grad_student.dtype.element_ty), mask)


@triton.jit
def sharpen(teacher, center, targets, entropy, prototypes, inverse_temp, TILE: tl.constexpr):
    """targets [rows, K], entropy [rows]."""
    first = tl.program_id(0).to(tl.int64) * prototypes
    highest = tl.load(teacher + first).to(tl.float32) - tl.load(center)
    total = tl.zeros((TILE,), tl.float32)
    for start in range(0, prototypes, TILE):
        k = start + tl.arange(0, TILE)
        mask = k < prototypes
        logits = tl.load(teacher + first + k, mask, -float("inf")).to(tl.float32) - tl.load(center + k, mask, 0.0)
        new = tl.maximum(highest, tl.max(logits, 0))
        total = total * tl.exp((highest - new) * inverse_temp) + tl.exp((logits - new) * inverse_temp)
        highest = new
    sum_total = tl.sum(total, 0)
    gap = tl.zeros((TILE,), tl.float32)
    for start in range(0, prototypes, TILE):
        k = start + tl.arange(0, TILE)
        mask = k < prototypes
        logits = tl.load(teacher + first + k, mask, 0.0).to(tl.float32) - tl.load(center + k, mask, 0.0)
        below = (highest - logits) * inverse_temp
        probability = tl.exp(-below) / sum_total
        gap += tl.where(mask, probability * below, 0.0)
        tl.store(targets + first + k, probability, mask)
    tl.store(entropy + tl.program_id(0), tl.log(sum_total) + tl.sum(gap, 0))


@triton_op("dino_xcit::cross_entropy", mutates_args=())
def _cross_entropy(
    student: Tensor, targets: Tensor, global_views: int, student_temp: float
) -> tuple[Tensor, Tensor, Tensor]:
    programs, sizes, constants = _launch(student, targets, global_views, student_temp)
    loss, peak, share = (targets.new_empty(len(student)) for _ in range(3))
    launchable(cross_entropy_forward)[(programs,)](student, targets, loss, peak, share, *sizes, **constants)
    return loss.sum(), peak, share


@triton_op("dino_xcit::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
    grad: Tensor, student: Tensor, targets: Tensor, peak: Tensor, share: Tensor, global_views: int, student_temp: float
) -> Tensor:
    programs, sizes, constants = _launch(student, targets, global_views, student_temp)
    grad_student = torch.empty_like(student)
    launchable(cross_entropy_backward)[(programs, triton.cdiv(student.shape[1], TILE))](
        student, targets, peak, share, grad, grad_student, *sizes, **constants
    )
    return grad_student


def _launch(
    student: Tensor, targets: Tensor, global_views: int, student_temp: float
) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
    """Return the number of programs per tile, and the last arguments and the constants of both kernels."""
    batch = len(targets) // global_views
    views = len(student) // batch
    pairs = batch * global_views * (views - 1)
    constants = {"GLOBAL_VIEWS": global_views, "VIEWS": VIEWS, "TILE": TILE, "num_warps": 8}
    sizes = batch, views, student.shape[1], 1 / student_temp, 1 / pairs
    return batch * triton.cdiv(views, VIEWS), sizes, constants


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, targets, ctx.global_views, ctx.student_temp = inputs
    _, peak, share = output
    ctx.mark_non_differentiable(peak, share)
    ctx.set_materialize_grads(False)  # else autograd launches kernels to fill zeros for peak and share
    ctx.save_for_backward(student, targets, peak, share)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grad_student = _cross_entropy_backward(grad, *ctx.saved_tensors, ctx.global_views, ctx.student_temp)
    return grad_student, None, None, None


_cross_entropy.register_autograd(_backward, setup_context=_keep)


def cross_entropy(student: Tensor, targets: Tensor, global_views: int, student_temp: float) -> Tensor:
    """Compute the mean over pairs (g, v) with v != g and over samples of -sum_k q_g[k] log p_v[k].

    Args:
        student: [V * B, K], logits in bfloat16, float16 or float32, view-major, the global views first.
        targets: [G * B, K] float32, probabilities, view-major; they get no gradient.
        global_views: G.
        student_temp: temperature of the student's softmax.

    Returns:
        A scalar, float32.
    """
    return _cross_entropy(student.contiguous(), targets.contiguous(), global_views, student_temp)[0]


@triton_op("dino_xcit::sharpened", mutates_args=())
def _sharpened(teacher: Tensor, center: Tensor, temp: float) -> tuple[Tensor, Tensor]:
    rows, prototypes = teacher.shape
    targets, entropy = center.new_empty(rows, prototypes), center.new_empty(rows)
    launchable(sharpen)[(rows,)](
        teacher, center, targets, entropy, prototypes, 1 / temp, TILE=ROW_TILE, num_warps=16
    )  # fmt: skip
    return targets, entropy


def sharpened(teacher: Tensor, center: Tensor, temp: float) -> tuple[Tensor, Tensor]:
    """Compute softmax((teacher - center) / temp) and its entropy, without gradient.

    Args:
        teacher: [rows, K], logits in bfloat16, float16 or float32.
        center: [1, K] float32.
        temp: temperature of the teacher's softmax.

    Returns:
        Targets [rows, K] and the entropy of each row in nats, [rows]; both float32.
    """
    return _sharpened(teacher.detach().contiguous(), center, temp)
