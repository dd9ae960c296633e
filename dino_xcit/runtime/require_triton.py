"""Whether Triton's kernels can run."""

from __future__ import annotations

import torch

from dino_xcit.errors import InputError


def require_triton(device: torch.device, setting: str, instead: str) -> None:
    """Check that Triton's kernels can run on ``device``.

    Args:
        setting: what needs them, for the message.
        instead: flags that do not.

    Raises:
        InputError: they cannot.
    """
    try:
        from triton import knobs
    except ImportError as error:
        raise InputError(
            f"{setting} needs the package triton, of the version that comes with PyTorch ({error}): pip install "
            f"triton, or {instead}"
        ) from error
    if device.type != "cuda" and not knobs.runtime.interpret:
        raise InputError(f"{setting} needs a GPU, but the device is {device.type}: expected {instead}")
