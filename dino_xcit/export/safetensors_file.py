"""``--to safetensors``: one file under the names that this project and the official checkpoints use."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch

from dino_xcit.export.comparison import Features, features_of
from dino_xcit.export.provenance import metadata
from dino_xcit.models import build_backbone
from dino_xcit.runtime import atomic
from dino_xcit.weights import LoadedBackbone


def write(loaded: LoadedBackbone, path: Path) -> None:
    """The weights, and :func:`metadata` beside them."""
    tensors = {key: value.contiguous() for key, value in loaded.backbone.state_dict().items()}
    content = safetensors.torch.save(tensors, metadata(loaded))
    atomic.write(path, lambda file: file.write(content))


def reload(path: Path, arch: str) -> Features:
    """The class token [B, D] by a fresh network with the file's weights."""
    backbone = build_backbone(arch)
    backbone.load_state_dict(safetensors.torch.load_file(path))
    return features_of(backbone.eval().requires_grad_(False), patch_tokens=False)
