"""What an exported file says about itself: plain strings, for the metadata of safetensors, ONNX and torch.export."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

import safetensors

import dino_xcit
from dino_xcit.errors import printable
from dino_xcit.weights import LoadedBackbone
from dino_xcit.weights.locate import ASSUMED, EXCEPTION

_WRITER = "dino_xcit "
_LONGEST = 200


def metadata(loaded: LoadedBackbone) -> dict[str, str]:
    """``arch`` and ``eval_transform`` (JSON) are for :mod:`dino_xcit.weights`; the rest says where it is from.

    A transform that nobody said is no ``eval_transform``: read back, it would be the checkpoint's word. What it
    leaves out of what was said (``squashing of images to squares``) is stored beside it.
    """
    transform = "eval_transform" if loaded.transform_from else ASSUMED
    said = {
        "format": "pt",
        "arch": loaded.arch,
        transform: json.dumps(loaded.transform.to_dict()),
        "network": loaded.network,
        "weights_hash": loaded.hash,
        "source_file": loaded.path.name,
        "written_by": f"{_WRITER}{dino_xcit.__version__}",
    }
    if loaded.transform_exception:
        said[EXCEPTION] = loaded.transform_exception
    if loaded.data:
        said["data"] = shown_place(loaded.data)
    return {name: printable(value) for name, value in said.items()}


def is_export(path: Path) -> bool:
    """Whether a .safetensors, .onnx or .pt2 file says that this project wrote it; one that cannot be read does not."""
    readers = {".safetensors": _safetensors_writer, ".onnx": _onnx_writer, ".pt2": _program_writer}
    try:
        return readers[path.suffix](path).startswith(_WRITER)
    except Exception:  # a file of any kind, read by three libraries
        return False


def _safetensors_writer(path: Path) -> str:
    with safetensors.safe_open(path, framework="pt", device="cpu") as file:
        return str((file.metadata() or {}).get("written_by", ""))


def _onnx_writer(path: Path) -> str:
    import onnx

    properties = onnx.load(path, load_external_data=False).metadata_props
    return next((str(one.value) for one in properties if one.key == "written_by"), "")


def _program_writer(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/extra/written_by"))
        with archive.open(name) as file:
            return file.read(_LONGEST).decode()


def shown_place(url: str) -> str:
    """A data set's address without the folders of the machine it lay on: ``.../imagenet/train``."""
    scheme, path = re.fullmatch(r"((?:\w{2,}:)?)(.*)", url, re.DOTALL).groups()  # type: ignore[union-attr]
    if path.startswith("//") or not path.startswith(("/", "~")):  # a remote address, or a name
        return url
    return f"{scheme}.../{'/'.join(path.rstrip('/').split('/')[-2:])}"
