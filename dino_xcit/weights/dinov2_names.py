"""DINOv2's names of a vision transformer's weights, to timm's: chunks of blocks, registers. D features, N patches."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_CHUNKED = re.compile(r"blocks\.\d{1,4}\.(\d{1,4})\.(.+)")


def from_dinov2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with timm's names.

    Training splits the blocks in chunks for FSDP, ``blocks.CHUNK.BLOCK.norm1.weight``, where BLOCK counts through all
    chunks. With registers (``register_tokens`` [1, R, D]) timm's positions are of the patches alone: the class token's,
    the first of ``pos_embed`` [1, 1 + N, D], is added to the class token, as DINOv2's code does in each forward pass.

    Returns:
        Other networks' keys, and shapes that do not fit together, stay as they are: whoever loads the result names
        them.
    """
    out = _without_chunks(state)
    registers, token, positions = (out.get(name) for name in ("register_tokens", "cls_token", "pos_embed"))
    if registers is None or token is None or positions is None or "reg_token" in out:
        return out
    if token.ndim != 3 or positions.ndim != 3 or token.shape != positions[:, :1].shape:
        return out
    out["reg_token"] = out.pop("register_tokens")
    out["cls_token"] = token.float() + positions[:, :1].float() if token.is_floating_point() else token
    out["pos_embed"] = positions[:, 1:]
    return out


def _without_chunks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {
        key: f"blocks.{found[1]}.{found[2]}" if (found := _CHUNKED.fullmatch(key)) else key
        for key in state
        if key.startswith("blocks.")
    }
    chunked = all(name != key for key, name in renamed.items()) and len(set(renamed.values())) == len(renamed)
    return {renamed[key] if chunked and key in renamed else key: value for key, value in state.items()}
