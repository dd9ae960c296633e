"""``--to torch-export``: a .pt2 file, the network as a graph that runs without this project's code."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from dino_xcit.errors import InputError, one_line
from dino_xcit.export.comparison import Features
from dino_xcit.export.plain_network import traced
from dino_xcit.export.provenance import metadata
from dino_xcit.runtime import atomic
from dino_xcit.weights import LoadedBackbone


def write(loaded: LoadedBackbone, path: Path, patch_tokens: bool) -> None:
    """One file; its extra files are the metadata, one string each.

    Raises:
        InputError: PyTorch cannot trace this network.
    """
    try:
        program = traced(loaded.backbone, patch_tokens, loaded.transform.crop)
    except Exception as error:
        raise InputError(f"PyTorch cannot trace {loaded.arch} ({one_line(error)}): --to timm or safetensors") from error
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files=dict(metadata(loaded)))
    atomic.write(path, lambda file: file.write(buffer.getbuffer()))


def reload(path: Path) -> Features:
    """What PyTorch computes of the file."""
    with open(path, "rb") as file:
        program = torch.export.load(file)  # noqa: TID251 - this process wrote it a moment ago
    network: Features = program.module()
    return network
