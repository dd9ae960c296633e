"""What an exported file says about itself: plain strings, for the metadata of safetensors, ONNX and torch.export."""

from __future__ import annotations

import json
import re

import dino_xcit
from dino_xcit.console import printable
from dino_xcit.weights import LoadedBackbone


def metadata(loaded: LoadedBackbone) -> dict[str, str]:
    """``arch`` and ``eval_transform`` (JSON) are for :mod:`dino_xcit.weights`; the rest says where it is from."""
    said = {
        "format": "pt",
        "arch": loaded.arch,
        "eval_transform": json.dumps(loaded.transform.to_dict()),
        "network": loaded.network,
        "weights_hash": loaded.hash,
        "source_file": loaded.path.name,
        "written_by": f"dino_xcit {dino_xcit.__version__}",
    }
    if loaded.data:
        said["data"] = shown_place(loaded.data)
    return {name: printable(value) for name, value in said.items()}


def shown_place(url: str) -> str:
    """A data set's address without the folders of the machine it lay on: ``.../imagenet/train``."""
    scheme, path = re.fullmatch(r"((?:\w{2,}:)?)(.*)", url, re.DOTALL).groups()  # type: ignore[union-attr]
    if path.startswith("//") or not path.startswith(("/", "~")):  # a remote address, or a name
        return url
    return f"{scheme}.../{'/'.join(path.rstrip('/').split('/')[-2:])}"
