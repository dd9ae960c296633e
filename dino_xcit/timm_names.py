"""XCiT's weights under the official names and under timm's: the one place that knows the difference.

timm writes ``pos_embed`` for the official ``pos_embeder``, and keeps class attention's ``qkv`` as ``q``, ``k`` and
``v``; every other name is the same (timm 1.0.31, models/xcit.py). D features.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_OFFICIAL_POSITION, _TIMM_POSITION = "pos_embeder.", "pos_embed."
_JOINED = re.compile(r"(cls_attn_blocks\.\d+\.attn\.)qkv\.(weight|bias)")
_FIRST_OF_THREE = re.compile(r"(cls_attn_blocks\.\d+\.attn\.)q\.(weight|bias)")


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with timm's names: the inverse of :func:`from_timm`, bit by bit.

    Args:
        state: official names; class attention's ``qkv.weight`` is [3 D, D], ``qkv.bias`` [3 D].

    Returns:
        Tensors that share no memory with one another. Keys that are no part of an XCiT stay as they are, and so does
        one whose new name is taken or that cannot be cut in three: whoever loads the result names it.
    """
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if joined := _JOINED.fullmatch(key):
            names = [f"{joined[1]}{part}.{joined[2]}" for part in "qkv"]
            if value.ndim and value.shape[0] % 3 == 0 and not any(name in state for name in names):
                out |= dict(zip(names, (part.clone() for part in value.chunk(3)), strict=True))
                continue
        out[_renamed(key, _OFFICIAL_POSITION, _TIMM_POSITION, state)] = value
    return out


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the official names: the inverse of :func:`to_timm`, bit by bit.

    Args:
        state: timm's names.

    Returns:
        Keys that are no part of an XCiT stay as they are, and so do those whose new name is taken, and ``q``, ``k`` and
        ``v`` that are not all there in one shape and type.
    """
    out: dict[str, Tensor] = {}
    joined: set[str] = set()
    for key, value in state.items():
        if first := _FIRST_OF_THREE.fullmatch(key):
            names = [f"{first[1]}{part}.{first[2]}" for part in "qkv"]
            parts = [state[name] for name in names if name in state]
            whole = f"{first[1]}qkv.{first[2]}"
            if whole not in state and len(parts) == 3 and value.ndim and len({(p.shape, p.dtype) for p in parts}) == 1:
                out[whole] = torch.cat(parts)
                joined.update(names)
                continue
        out[_renamed(key, _TIMM_POSITION, _OFFICIAL_POSITION, state)] = value
    return {key: value for key, value in out.items() if key not in joined}


def _renamed(key: str, old: str, new: str, state: Mapping[str, Tensor]) -> str:
    name = new + key.removeprefix(old) if key.startswith(old) else key
    return key if name in state else name
