"""Whether the pipelines do the same work, from what benchmarks/step_checks.py found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LOSS, GRADIENT, BF16 = 1e-4, 1e-3, 1.2
"""Largest relative difference of the losses in fp32, and of any parameter's gradient; how many times the plain step's
error in bf16 ours may be. Rounding falls differently in different code: the mean of four draws still moves by a tenth.
"""


def judge(found: Mapping[str, Any]) -> list[str]:
    """One sentence for each check that fails.

    Args:
        found: what :func:`step_checks.check` returns.
    """
    wrong = []
    expected = found["losses"]["exact"]
    for row, loss in found["losses"].items():
        error = abs(loss - expected) / abs(expected)
        if not error <= LOSS:
            wrong.append(
                f"the loss of {row} on the common weights and crops is {loss:.7g}, expected {expected:.7g} within "
                f"{LOSS:g} of it"
            )
    for row, (name, error) in found["gradient_errors"].items():
        if not error <= GRADIENT:
            wrong.append(
                f"the gradient of {name} in {row} differs from the plain step's by {error:.2g} of its length, expected "
                f"at most {GRADIENT:g}"
            )
    plain = found["bf16_errors"].get("timm-bf16")
    for row, error in found["bf16_errors"].items():
        if not error <= BF16 * plain:
            wrong.append(
                f"the gradients of {row} are off by {error:.2g} from fp64, those of plain autocast by {plain:.2g}: "
                f"expected at most {BF16:g} times that"
            )
    return wrong


def lines(found: Mapping[str, Any]) -> list[str]:
    """The same figures for the screen."""
    shown = ["  loss: " + ", ".join(f"{row} {loss:.6f}" for row, loss in found["losses"].items())]
    for row, (name, error) in found["gradient_errors"].items():
        shown.append(f"  gradients, {row} against the plain step: at most {error:.1e} ({name})")
    if found["bf16_errors"]:
        errors = ", ".join(f"{row} {error:.4f}" for row, error in found["bf16_errors"].items())
        shown.append(f"  gradients in bf16 against fp64, mean over parameters: {errors}")
    return shown


def figures(found: Mapping[str, Any]) -> dict[str, float]:
    """For the JSON line: ``gradient_error`` of the worst fp32 row, ``bf16_error_ours`` of the worst bf16 row,
    ``bf16_error_plain``; those that were looked at."""
    out: dict[str, float] = {}
    if found["gradient_errors"]:
        out["gradient_error"] = max(error for _, error in found["gradient_errors"].values())
    ours = [error for row, error in found["bf16_errors"].items() if row != "timm-bf16"]
    if ours:
        out |= {"bf16_error_ours": max(ours), "bf16_error_plain": found["bf16_errors"]["timm-bf16"]}
    return out
