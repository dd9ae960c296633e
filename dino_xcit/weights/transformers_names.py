"""Hugging Face transformers' names of a vision transformer's weights, to timm's: ViTModel, Dinov2Model, with registers.

Files have the names of transformers before 5 (``encoder.layer.0.attention.attention.query.weight``), whichever version
wrote them; its networks in memory have others since (``layers.0.attention.q_proj.weight``), which a plain torch.save of
a state dict keeps. Both are read. D features.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_TOKEN = "embeddings.cls_token"
_DEEPEST = 3
"""Words before ``embeddings.`` at most: ``vit.``, ``dinov2_with_registers.``."""
_BLOCK = re.compile(r"(?:encoder\.)?layers?\.(\d{1,4})\.(.+)")
_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_INSIDE = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
}
_QKV = {f"attention.attention.{word}": index for index, word in enumerate(("query", "key", "value"))} | {
    f"attention.{word}_proj": index for index, word in enumerate("qkv")
}


def is_transformers(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has these names."""
    return _prefix(state) is not None


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with timm's names.

    Args:
        state: transformers' names; ``query``, ``key`` and ``value`` weights [D, D] and biases [D] become one ``qkv``
            of [3 D, D] and [3 D].

    Returns:
        Keys that are no part of such a transformer (``pooler``, ``classifier``) keep their names, and so do those whose
        new name is taken, and queries, keys and values that are not all there in one shape and type.
    """
    prefix = _prefix(state)
    if prefix is None:
        return dict(state)
    out: dict[str, Tensor] = {}
    joined: dict[str, dict[int, str]] = {}  # of each qkv, the keys of its three parts
    for key, value in state.items():
        name = _renamed(key.removeprefix(prefix)) if key.startswith(prefix) else key
        if isinstance(name, tuple):
            whole, index = name
            joined.setdefault(whole, {})[index] = key
        else:
            out[key if name in out or (name != key and name in state) else name] = value
    for whole, keys in joined.items():
        parts = [state[keys[index]] for index in range(3) if index in keys]
        alike = len(parts) == 3 and parts[0].ndim and len({(part.shape, part.dtype) for part in parts}) == 1
        if alike and whole not in state:
            out[whole] = torch.cat(parts)
        else:
            out |= {key: state[key] for key in keys.values()}
    return out


def _prefix(state: Mapping[str, Tensor]) -> str | None:
    """What stands before ``embeddings.cls_token``; None where no key ends so."""
    found = [key[: -len(_TOKEN)] for key in state if key.endswith(_TOKEN) and key.count(".") <= _DEEPEST]
    return found[0] if len(found) == 1 and (not found[0] or found[0].endswith(".")) else None


def _renamed(key: str) -> str | tuple[str, int]:
    """A key's new name; of a query, key or value the name of the three together, and which of them it is."""
    if key in _OUTSIDE:
        return _OUTSIDE[key]
    found = _BLOCK.fullmatch(key)
    if not found:
        return key
    block, rest = found.groups()
    part, _, kind = rest.rpartition(".")
    if part in _QKV:
        return f"blocks.{block}.attn.qkv.{kind}", _QKV[part]
    if rest in _INSIDE:
        return f"blocks.{block}.{_INSIDE[rest]}"
    return f"blocks.{block}.{_INSIDE.get(part, part)}.{kind}"
