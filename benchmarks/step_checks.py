"""Do the pipelines of benchmarks/step.py do the same work? Losses, gradients, and what 16 bits cost; before any clock.

The same weights, the same crops, no drop-path (whose masks each draws in its own way), the sizes that are timed, at
most two images. B batch, K prototypes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from step_crops import draw_crops, normalised, view_by_view
from step_flops import flops_of_a_step
from step_ours import OurStep, exists
from step_plain import PlainStep, in_timms_names
from step_settings import Precision, Row, Settings
from torch import Tensor, nn

IMAGES = 2
DRAWS = 4
"""Of weights and crops: what rounding to bf16 does to one of them is to a third chance."""
NO_GRADIENT = ".attn.k.bias"
"""Of class attention: a softmax does not see what all its inputs share, so in exact arithmetic this gradient is zero,
and what is found is rounding. XCA's keys share their layer with its queries and values."""

State = dict[str, Tensor]


@dataclasses.dataclass
class Outcome:
    """What a pipeline makes of the common weights and crops."""

    loss: float
    gradients: State
    """By timm's names, float64, on the CPU."""


class Common:
    """The weights and crops that all pipelines are given; ``draw`` is the seed of both."""

    def __init__(self, settings: Settings, draw: int) -> None:
        self.settings = dataclasses.replace(settings, batch=min(IMAGES, settings.batch), drop_path=0.0)
        self.device = torch.device(settings.device)
        state = OurStep(self.settings, Row("", "", "ours", "fp32")).state
        _without_tf32()
        generator = torch.Generator().manual_seed(draw)
        # Fresh biases are zero and fresh LayerScales may be 1e-5: with noise on top nothing hides behind them.
        self.student = _with_noise(state.method.state_dict()["student"], generator)
        self.teacher = _with_noise(self.student, generator)
        self.crops = draw_crops(self.settings, draw)

    def plain(self, precision: Precision, dtype: torch.dtype = torch.float32) -> Outcome:
        """timm's network in the plain step."""
        step = PlainStep(self.settings, precision, self.device)
        for network, state in ((step.student, self.student), (step.teacher, self.teacher)):
            network.load_official(_part(state, "backbone."), _part(state, "head."))
            network.to(dtype)
        step.center = step.center.to(dtype)
        loss, _ = step.loss([crop.to(self.device, dtype) for crop in normalised(self.crops)])
        loss.backward()
        return Outcome(float(loss.detach()), _gradients(step.student))

    def ours(self, row: Row) -> Outcome:
        """The project's own training step, as it is timed."""
        step = OurStep(self.settings, row)
        _without_tf32()
        method = step.state.method
        method.load_state_dict(method.state_dict() | {"student": self.student, "teacher": self.teacher})
        found: State = {}
        for name, parameter in method.trained.named_parameters():
            if parameter.requires_grad:
                # Before the step clips them, or lets them go.
                parameter.register_post_accumulate_grad_hook(
                    lambda p, name=name: found.update({name: p.grad.detach().to("cpu", torch.float64)})  # type: ignore[misc]
                )
        loss = float(step(self.crops))
        backbone = PlainStep(self.settings, "fp32", torch.device("meta")).student.backbone
        mapped = in_timms_names(_part(found, "backbone."), backbone)
        gradients = {f"backbone.{name}": value for name, value in mapped.items()}
        gradients |= {f"head.{name}": value for name, value in _part(found, "head.").items()}
        return Outcome(loss, gradients)

    def reference_loss(self, folder: Path) -> float:
        """facebookresearch/dino's, in fp32."""
        from step_reference import ReferenceStep, import_reference

        step = ReferenceStep(import_reference(folder), self.settings, "fp32")
        step.load_official(self.student, self.teacher)
        views = view_by_view(normalised(self.crops), self.settings)
        return float(step.loss([view.to(self.device) for view in views]).detach())


def _without_tf32() -> None:
    """On a GPU our step is timed with TF32, which here would hide what is to be seen."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def _with_noise(state: Mapping[str, Tensor], generator: torch.Generator) -> State:
    new: State = {}
    for name, value in state.items():
        if value.is_floating_point() and not name.endswith(("running_mean", "running_var", "weight_g")):
            new[name] = value.cpu() + 0.02 * torch.randn(value.shape, generator=generator)
        else:
            new[name] = value.cpu().clone()
    return new


def _part(state: Mapping[str, Tensor], prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _gradients(module: nn.Module) -> State:
    return {
        name: parameter.grad.detach().to("cpu", torch.float64)
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def relative_errors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """|found - expected| / |expected| of each parameter's gradient; a gradient that only one of the two has is wrong by
    infinity."""
    errors = {name: float("inf") for name in found.keys() ^ expected.keys()}
    for name in found.keys() & expected.keys():
        errors[name] = float((found[name] - expected[name]).norm() / expected[name].norm())
    return {name: error for name, error in errors.items() if not name.endswith(NO_GRADIENT)}


def check(settings: Settings, ours: Sequence[Row], reference: Path | None) -> dict[str, Any]:
    """What the pipelines find, for :mod:`step_verdict`, and the work of a timed step.

    Args:
        ours: those rows of this project's that are to be timed.
        reference: the folder with the peers' checkouts, where there is one.

    Returns:
        ``losses`` of the first draw by row (``exact``: in fp64); ``gradient_errors``, by fp32 row, the parameter whose
        gradient is furthest from that of the plain fp32 step, and how far; ``bf16_errors``, by bf16 row, the mean over
        parameters and draws of a gradient's relative distance from fp64; ``flops`` of a step; ``left_out``, rows that
        ask for a setting that the project does not have.
    """
    left_out = [row.key for row in ours if not exists(row)]
    ours = [row for row in ours if exists(row)]
    low_rows = [row for row in ours if row.precision == "bf16"]
    bf16_errors: dict[str, list[float]] = {key: [] for key in ("timm-bf16", *(row.key for row in low_rows))}
    losses: dict[str, float] = {}
    gradient_errors: dict[str, tuple[str, float]] = {}
    for draw in range(DRAWS if low_rows else 1):
        common = Common(settings, draw)
        exact = common.plain("fp32", torch.float64)
        if draw == 0:
            plain = common.plain("fp32")
            losses = {"exact": exact.loss, "timm-fp32": plain.loss}
            if reference:
                losses["reference"] = common.reference_loss(reference)
            for row in ours:
                if row.precision == "fp32":
                    outcome = common.ours(row)
                    losses[row.key] = outcome.loss
                    found = relative_errors(outcome.gradients, plain.gradients)
                    gradient_errors[row.key] = max(found.items(), key=lambda item: item[1])
        if low_rows:
            outcomes = {"timm-bf16": common.plain("bf16")} | {row.key: common.ours(row) for row in low_rows}
            for key, outcome in outcomes.items():
                bf16_errors[key].append(mean(relative_errors(outcome.gradients, exact.gradients).values()))
    return {
        "losses": losses,
        "gradient_errors": gradient_errors,
        "bf16_errors": {key: mean(found) for key, found in bf16_errors.items() if found},
        "flops": flops_of_a_step(settings),
        "left_out": left_out,
    }
