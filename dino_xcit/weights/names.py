"""One network, several spellings: keys of a state dict as other programs write them, to the names used here.

Only names change, and q, k and v are put together; of values the class token's alone, with DINOv2's registers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from dino_xcit.timm_names import from_timm
from dino_xcit.weights.dinov2_names import from_dinov2
from dino_xcit.weights.transformers_names import from_transformers

_WRAPPERS = (
    "module.",  # DistributedDataParallel
    "_orig_mod.",  # torch.compile
    "model.",  # this project's timm backbones
    "_feature_blocks.",  # VISSL's trunks
    "vit.",  # lightly's masked transformers around timm's
)
_DEEPEST = 6
_PARTS_OF_SEQUENTIAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
"""torchvision's ResNet as ``nn.Sequential(*list(resnet.children())[:-1])``; 2, 3 and 8 have no weights."""
_TIMM_POSITION = "pos_embed.token_projection.weight"


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without prefixes that every key has: those of wrappers, a few deep, in any order."""
    out = dict(state)
    for _ in range(_DEEPEST):  # a key of a file may be a million wrappers long
        prefix = next((word for word in _WRAPPERS if out and all(key.startswith(word) for key in out)), "")
        out = {key.removeprefix(prefix): value for key, value in out.items()} if prefix else out
    return out


def backbone_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's weights under the official names of XCiT, timm's of a ViT (DINO's are the same), torchvision's of a
    ResNet.

    A key that belongs to none of them keeps its name, so that whoever loads the result can name it.
    """
    out = from_dinov2(from_transformers(unwrapped(state)))
    if "vit.cls_token" in out:  # beside it lightly has a mask_token of its own
        out = _without_prefix(out, "vit.")
    if "0.weight" in out and out.keys() >= {"1.running_mean", "4.0.conv1.weight"}:
        out = {_part_renamed(key): value for key, value in out.items()}
    return from_timm(out) if _TIMM_POSITION in out else out


def _part_renamed(key: str) -> str:
    number, _, rest = key.partition(".")
    return f"{_PARTS_OF_SEQUENTIAL.get(number, number)}.{rest}"


def _without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Keys lose the prefix, but for those whose name is then taken."""
    return {
        key.removeprefix(prefix) if key.removeprefix(prefix) not in state else key: value
        for key, value in state.items()
    }


def head_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A DINO head's weights under DINO's names, ``mlp.0.weight`` to ``last_layer.weight_v``; empty if it is none.

    lightly says ``layers`` for ``mlp``, VISSL ``prototypes0`` for ``last_layer``, and PyTorch's newer weight_norm
    ``parametrizations.weight.original0`` and ``1`` for ``weight_g`` and ``weight_v``.
    """
    out: dict[str, Tensor] = {}
    for key, value in unwrapped(state).items():
        if key.startswith("last_layer2."):  # iBOT's, for patches
            continue
        name = re.sub(r"^layers\.", "mlp.", key)
        name = re.sub(r"^prototypes0\.", "last_layer.", name)
        name = name.replace("parametrizations.weight.original0", "weight_g")
        out[name.replace("parametrizations.weight.original1", "weight_v")] = value
    return out if out.keys() >= {"mlp.0.weight", "last_layer.weight_v"} else {}


def with_batch_counts(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """BatchNorm's counts of batches set to 0 where the whole file has none: PyTorch before 0.4.1 did not write them.

    Nothing is computed with them here. Where a file has some, one that is missing is a gap like any other.
    """
    counts = [key for key in wanted if key.endswith(".num_batches_tracked")]
    if not counts or any(key.endswith("num_batches_tracked") for key in state):
        return dict(state)
    running = [key for key in counts if key.replace("num_batches_tracked", "running_mean") in state]
    return {**state, **{key: torch.zeros((), dtype=torch.int64) for key in running}}
