"""Triton kernels for CUDA devices. Each module has one operation, a twin of a function in ``dino_xcit.models``,
``dino_xcit.methods`` or ``dino_xcit.augment``: both compute the same, and the tests compare them.

Operations are PyTorch custom operators (``torch.library.triton_op``), so torch.compile and fake tensors see them as one
operator. With ``TRITON_INTERPRET=1`` they run on the CPU, which tests use; the interpreter multiplies bfloat16 wrongly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.library import wrap_triton
from triton.runtime.jit import JITFunction


def launchable(kernel: Any) -> Any:
    """Wrap ``kernel`` so that it appears in traces, unless Triton interprets it: such kernels cannot be traced."""
    return wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel


def dot_precision() -> str:
    """Return the precision of ``tl.dot`` for float32 that PyTorch's own products have."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
