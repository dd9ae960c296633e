"""The work of a training step, counted once for all pipelines. B batch."""

from __future__ import annotations

from typing import Any

import torch
from step_plain import PlainStep
from step_settings import Settings
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count


def _convolution_backward(
    grad_out: list[int], x: list[int], weight: list[int], *arguments: Any, out_shape: Any = None, **_: Any
) -> int:
    """Each of the two gradients takes as many products as the forward pass. PyTorch's own formula (2.15) takes the
    gradient of a depthwise kernel for a dense one's, D times too many."""
    wants_input, wants_weight, _bias = arguments[-1]
    return (int(wants_input) + int(wants_weight)) * conv_flop_count(x, weight, grad_out)


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter of matrix products and convolutions, with the gradient of grouped convolutions set right."""
    mapping = {torch.ops.aten.convolution_backward: _convolution_backward}
    return FlopCounterMode(display=False, custom_mapping=mapping)


def flops_of_a_step(settings: Settings) -> int:
    """Floating-point operations of one plain fp32 step (a multiplication and an addition are two).

    The networks have shapes and no memory here; drop-path skips no work in the plain step. A pipeline that reaches the
    same result with less is credited with all of it: what counts is the work that is done away with, a second.
    """
    with torch.device("meta"):
        step = PlainStep(settings, "fp32", torch.device("meta"))
        crops = [torch.empty(views * settings.batch, 3, size, size) for views, size in settings.groups]
        with flop_counter() as counter:
            loss, _ = step.loss(crops)
            loss.backward()
    return counter.get_total_flops()
