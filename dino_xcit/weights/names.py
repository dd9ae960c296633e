"""Rename state dict keys of other projects to those of this one: official XCiT, timm's (and DINO's) ViT, torchvision's
ResNet.

Each project has a table of regular expressions. A key without a match, or whose new name is taken, keeps its name, so
that the comparison with the architecture reports it. D: features, N: patches, R: registers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]

_WRAPPERS = ("module.", "_orig_mod.", "model.", "_feature_blocks.", "vit.")
"""Prefixes of DistributedDataParallel, torch.compile, this project's timm backbones, VISSL's trunks and lightly's
masked transformers."""

# Files of all versions have the names of transformers 4 (encoder.layer.0.attention.attention.query). Networks of
# version 5 in memory have others (layers.0.attention.q_proj). Both are supported.
_TRANSFORMERS = (
    (r"^(?:\w+\.){1,2}(?=(?:embeddings|layers?|layernorm|pooler)\.)", ""),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^layernorm\.", "norm."),
    (r"^layers?\.(\d{1,4})\.", r"blocks.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\.", r".attn.\1."),
    (r"\.attention\.(q|k|v)_proj\.", r".attn.\1."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)
_TRANSFORMERS_TOKEN = re.compile(r"(?:\w+\.){0,2}embeddings\.cls_token")
# torchvision's ResNet as nn.Sequential(*list(resnet.children())[:-1]). 2, 3 and 8 have no weights.
_SEQUENTIAL = (
    (r"^0\.", "conv1."), (r"^1\.", "bn1."),
    (r"^4\.", "layer1."), (r"^5\.", "layer2."), (r"^6\.", "layer3."), (r"^7\.", "layer4."),
)  # fmt: skip
_TIMM_XCIT = ((r"^pos_embed\.", "pos_embeder."),)
_HEAD = (
    (r"^layers\.", "mlp."),  # lightly
    (r"^prototypes0\.", "last_layer."),  # VISSL
    (r"parametrizations\.weight\.original0$", "weight_g"),  # PyTorch's newer weight_norm
    (r"parametrizations\.weight\.original1$", "weight_v"),
)
_QUERY = re.compile(r"((?:cls_attn_)?blocks\.\d+\.attn\.)q(\.weight|\.bias)")
_CHUNKED = re.compile(r"blocks\.\d{1,4}\.(\d{1,4})\.(.+)")


def shown(keys: Iterable[object], most: int = 8) -> str:
    """Format the first ``most`` keys on one line, truncated and printable, followed by the number of further ones."""
    keys = list(keys)
    text = ", ".join("".join(c if c.isprintable() else "?" for c in str(key)[:80]) for key in keys[:most])
    return f"{text} and {len(keys) - most} more" if len(keys) > most else text


def unwrapped(state: Mapping[str, Tensor]) -> State:
    """Remove the prefixes of wrappers that all keys have, in any order."""
    out = dict(state)
    for _ in range(6):  # bounded, as a key of a hostile file may have a million wrappers
        prefix = next((word for word in _WRAPPERS if out and all(key.startswith(word) for key in out)), "")
        out = {key.removeprefix(prefix): value for key, value in out.items()}
    return out


def backbone_names(state: Mapping[str, Tensor]) -> State:
    """Rename the keys of a backbone."""
    out = unwrapped(state)
    if is_transformers(out):
        out = _joined(_renamed(out, _TRANSFORMERS))
    if "vit.cls_token" in out:  # lightly has a further mask_token beside the ViT
        out = _renamed(out, ((r"^vit\.", ""),))
    if out.keys() >= {"0.weight", "1.running_mean", "4.0.conv1.weight"}:
        out = _renamed(out, _SEQUENTIAL)
    if "pos_embed.token_projection.weight" in out:
        out = _joined(_renamed(out, _TIMM_XCIT))
    return _registers(_without_chunks(out))


def is_transformers(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the names of a ViT of Hugging Face transformers."""
    return any(_TRANSFORMERS_TOKEN.fullmatch(key) for key in state)


def head_names(state: Mapping[str, Tensor]) -> State:
    """Rename the keys of a DINO head to ``mlp.0.weight`` ... ``last_layer.weight_v``; empty if it is not one."""
    kept = {key: value for key, value in unwrapped(state).items() if not key.startswith("last_layer2.")}  # iBOT's
    out = _renamed(kept, _HEAD)
    return out if out.keys() >= {"mlp.0.weight", "last_layer.weight_v"} else {}


def to_timm(state: Mapping[str, Tensor]) -> State:
    """Rename the keys of an XCiT to timm's (timm 1.0.31, models/xcit.py), the inverse of :func:`backbone_names`.

    Args:
        state: State dict with official names. ``qkv.weight`` [3 D, D] and ``qkv.bias`` [3 D] of the class attention are
            split into ``q``, ``k`` and ``v``.

    Returns:
        Tensors that do not share memory with one another.
    """
    out: State = {}
    for key, value in state.items():
        if key.startswith("cls_attn_blocks.") and ".attn.qkv." in key:
            parts = zip("qkv", value.chunk(3), strict=True)
            out |= {key.replace(".qkv.", f".{part}."): rows.clone() for part, rows in parts}
        else:
            out[re.sub(r"^pos_embeder\.", "pos_embed.", key)] = value
    return out


def _renamed(state: Mapping[str, Tensor], table: tuple[tuple[str, str], ...]) -> State:
    out: State = {}
    for key, value in state.items():
        name = key
        for pattern, new in table:
            name = re.sub(pattern, new, name)
        out[key if name in out or name in state else name] = value
    return out


def _joined(state: State) -> State:
    """Join ``attn.q``, ``attn.k`` and ``attn.v`` [D, D] to ``attn.qkv`` [3 D, D], if all exist with equal shapes."""
    out = dict(state)
    for found in filter(None, map(_QUERY.fullmatch, state)):
        whole, *names = (f"{found[1]}{part}{found[2]}" for part in ("qkv", "q", "k", "v"))
        parts = [state[name] for name in names if name in state]
        alike = len({(part.shape, part.dtype) for part in parts}) == 1 and parts[0].ndim
        if len(parts) == 3 and alike and whole not in state:
            out[whole] = torch.cat([out.pop(name) for name in names])
    return out


def _without_chunks(state: State) -> State:
    """Remove the chunk number from DINOv2's ``blocks.CHUNK.BLOCK.norm1.weight``, as BLOCK is unique."""
    names = {key: _CHUNKED.sub(r"blocks.\1.\2", key) for key in state if key.startswith("blocks.")}
    chunked = all(name != key for key, name in names.items()) and len(set(names.values())) == len(names)
    return {names[key] if chunked and key in names else key: value for key, value in state.items()}


def _registers(state: State) -> State:
    """Convert DINOv2's registers [1, R, D] to timm's form, with position embeddings for patches only.

    The position embedding of the class token, the first of ``pos_embed`` [1, 1 + N, D], is added to the class token.
    """
    registers, token, positions = (state.get(name) for name in ("register_tokens", "cls_token", "pos_embed"))
    if registers is None or token is None or positions is None or "reg_token" in state:
        return state
    if positions.ndim != 3 or token.shape != positions[:, :1].shape:
        return state
    out = {key: value for key, value in state.items() if key != "register_tokens"}
    class_token = token.float() + positions[:, :1].float()
    return out | {"reg_token": registers, "cls_token": class_token, "pos_embed": positions[:, 1:]}
