"""Checkpoints of small networks for the export tests, in which every value affects the output."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dino_xcit.export import main
from dino_xcit.models import build_backbone
from dino_xcit.transform import EvalTransform

SMALL = EvalTransform(32, 28, "bilinear", (0.286, 0.286, 0.286), (0.353, 0.353, 0.353))


def scrambled(arch: str) -> nn.Module:
    """Return a network without weights, scales or statistics of 0 or 1, so that each affects the output."""
    torch.manual_seed(1)
    backbone = build_backbone(arch)
    with torch.no_grad():
        for name, value in backbone.state_dict().items():
            if value.is_floating_point():
                value.mul_(1 + 0.3 * torch.rand_like(value)).add_(0.05 * torch.rand_like(value))
            if name.endswith("running_mean"):
                value.add_(0.1)
    return backbone.eval().requires_grad_(False)


def checkpoint(folder: Path, arch: str = "xcit_pico_4_p8", transform: EvalTransform = SMALL, **args: object) -> Path:
    teacher = {f"backbone.{key}": value for key, value in scrambled(arch).state_dict().items()}
    content = {"teacher": teacher, "args": {"arch": arch, **args}, "eval_transform": transform.to_dict()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / "ckpt.pth")
    return folder / "ckpt.pth"


def export(weights: Path, target: str, out: Path, *flags: str) -> None:
    main(["--weights", str(weights), "--to", target, "--out", str(out), *flags])


def close(given: Tensor, expected: Tensor) -> bool:
    return float((given - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
