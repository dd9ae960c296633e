"""Find and read weight files: a path, the Hugging Face hub (``hf-hub:ORG/NAME``) or timm (``timm:NAME``).

Also reads the files beside them: ``config.json`` of timm or transformers, ``preprocessor_config.json`` of transformers.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor

from dino_xcit import safe_load
from dino_xcit.errors import InputError, near_matches, one_line
from dino_xcit.models.vit import vit_shape
from dino_xcit.models.xcit import XCIT_SIZES

HUB, TIMM = "hf-hub:", "timm:"
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
ASSUMED = "assumed_eval_transform"
"""Metadata key of an export with a guessed transform (JSON)."""
EXCEPTION = "eval_transform_exception"
"""Metadata key of an export with the deviation of its transform from the original's, as a clause."""
_NAMES = ("model.safetensors", "pytorch_model.bin")
_SHARDED = "sharded weights, not supported: merge them with model.save_pretrained(OUT, max_shard_size='99GB')"


class WeightsFile(NamedTuple):
    """Content of a file, and of the files beside it."""

    path: Path
    content: Mapping[str, Any]
    config: Mapping[str, Any] = {}
    """config.json, or timm's settings in the same form."""
    config_from: str = ""
    """Origin of ``config``: ``config.json's of NAME``, ``timm's for NAME.TAG``."""
    preprocessor: Mapping[str, Any] = {}
    """preprocessor_config.json of transformers."""


def is_remote(spec: str) -> bool:
    """Whether weights are specified by a name of the hub or timm rather than a path."""
    return spec.startswith((HUB, TIMM))


def open_weights(spec: str | Path) -> WeightsFile:
    """Find and read a file of weights.

    Args:
        spec: Path of a file, or of a folder in the layout of the hub; ``hf-hub:ORG/NAME`` or
            ``hf-hub:ORG/NAME@REVISION``; ``timm:NAME`` or ``timm:NAME.TAG``.

    Raises:
        InputError: The file or name does not exist, the network is down, or the file is not safely readable.
    """
    name = str(spec)
    if name.startswith(TIMM):
        return _of_timm(name.removeprefix(TIMM))
    repository = name.removeprefix(HUB) if name.startswith(HUB) else None
    if repository is not None:
        config = _download(repository, [CONFIG], optional=True)
        path = _download(repository, _NAMES)
    else:
        path = _file_of(Path(name).expanduser())
        config = path.with_name(CONFIG) if is_safetensors(path) or path.name in _NAMES else Path()
        name = path.name
    content = read_file(path)
    if not config.is_file():
        return WeightsFile(path, content)
    settings = _read_json(config)
    preprocessor = config.with_name(PREPROCESSOR)
    if repository is not None and isinstance(settings.get("model_type"), str):  # transformers'
        preprocessor = _download(repository, [PREPROCESSOR], optional=True)
    images = _read_json(preprocessor) if preprocessor.is_file() else {}
    return WeightsFile(path, content, settings, f"{CONFIG}'s of {name}", images)


def read_file(path: Path) -> Mapping[str, Any]:
    """Read a checkpoint, or a .safetensors file in the form of a checkpoint.

    Raises:
        InputError: The file is missing, damaged, unsafe or of another kind.
    """
    if re.search(r"-\d{5}-of-\d{5}\.|\.index\.json$", path.name):
        raise InputError(f"{path} is a part of {_SHARDED}")
    if not is_safetensors(path):
        return safe_load.read(path)
    tensors, metadata = read_safetensors(path)
    content = {"state_dict": tensors, EXCEPTION: metadata.get(EXCEPTION, "")}
    arch = metadata.get("arch", "")
    if arch.startswith(TIMM) or arch.rpartition("_p")[0] in XCIT_SIZES or vit_shape(arch):  # from an export
        content["args"] = {"arch": arch}
    with safe_load.refusing(path, "file of weights"):
        return content | {name: json.loads(metadata[name]) for name in ("eval_transform", ASSUMED) if name in metadata}


def is_safetensors(path: Path) -> bool:
    """Whether a file is a .safetensors file by its suffix or its first bytes (the hub's cache has other names)."""
    if path.suffix == ".safetensors":
        return True
    try:
        with safe_load.opened(path) as file:
            return file.read(9)[8:] == b"{"
    except safe_load.UNREADABLE:  # reading it as a checkpoint reports the cause
        return False


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors by name, on the CPU, and the metadata of the header.

    Raises:
        InputError: The file is missing or damaged.
    """
    with safe_load.refusing(path, ".safetensors file"), safe_load.opened(path) as file:
        safe_load.refuse_git_lfs(file.read(99))
        # The library checks that the header accounts for each byte of the file exactly once.
        with safe_open(path, framework="pt", device="cpu") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}, tensors.metadata() or {}  # noqa: SIM118


def _file_of(path: Path) -> Path:
    """Return the file, or the file of weights in a folder in the layout of the hub."""
    expected = "expected weights such as runs/.../checkpoint.pth, hf-hub:ORG/NAME or timm:NAME"
    if not os.path.exists(path):
        raise InputError(f"there is no file {path}: {expected}")
    if path.suffix == ".json" and not path.name.endswith(".index.json"):  # index.json: see read_file
        raise InputError(f"{path} is a JSON file: {expected}")
    if not os.path.isdir(path):
        return path
    found = next((name for name in (*_NAMES, "checkpoint.pth") if os.path.isfile(path / name)), "")
    if found in _NAMES and os.path.isfile(path / CONFIG):
        return path / found
    if any(os.path.isfile(path / f"{name}.index.json") for name in _NAMES):
        raise InputError(f"{path} is a folder of {_SHARDED}")
    if os.path.isfile(path / ".metadata"):
        convert = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE.pth"
        raise InputError(f"{path} is a distributed checkpoint: convert it with {convert}")
    expected = (
        f"a file, such as {path / found}" if found else f"a file, or a folder with {_NAMES[0]} and {CONFIG} in it"
    )
    raise InputError(f"{path} is a folder: expected {expected}")


def _read_json(path: Path) -> Mapping[str, Any]:
    with safe_load.refusing(path, "JSON file of settings"), open(path, "rb") as file:
        stored = json.loads(file.read(2**20))  # a longer file is truncated, and so invalid
        if not isinstance(stored, Mapping):
            raise safe_load.RefusedError("it contains no settings")
    return stored


def _of_timm(name: str) -> WeightsFile:
    import timm

    try:
        config: Any = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        near = near_matches(name, [*timm.list_models(pretrained=True), *timm.list_models()], prefix=TIMM)
        raise InputError(f"timm {timm.__version__} has no weights named {name!r}{near}") from error
    if not config.hf_hub_id:
        found = f"only at {config.url}: download them and give the path" if config.url else "nowhere: give another tag"
        raise InputError(f"timm has the weights of {name} {found}")
    path = _download(config.hf_hub_id, [config.hf_hub_filename] if config.hf_hub_filename else _NAMES)
    tagged = f"{config.architecture}.{config.tag}" if config.tag else config.architecture
    settings = {"architecture": config.architecture, "pretrained_cfg": config.to_dict()}
    return WeightsFile(path, read_file(path), settings, f"timm's for {tagged}")


def _download(repository: str, names: Sequence[str], optional: bool = False) -> Path:
    """Download the first existing one of some files in a repository of the hub, or use the cached copy.

    Returns an empty path if none exists and ``optional`` is set.
    """
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    place, _, revision = repository.partition("@")
    for name in names:
        try:
            return Path(hf_hub_download(place, name, revision=revision or None))
        except (OSError, RuntimeError, ValueError) as error:  # raised for network errors and invalid names
            absent = isinstance(error, EntryNotFoundError)
            if isinstance(error, LocalEntryNotFoundError):  # no network: the cache may know that it is absent
                absent = try_to_load_from_cache(place, name, revision=revision or None) is _CACHED_NO_EXIST
            if not absent:
                raise InputError(
                    f"cannot download {name} of {repository!r} from the Hugging Face hub: "
                    f"{one_line(error.__cause__ or error)}; check the name (hf-hub:ORG/NAME), the network and hf auth "
                    "login, or download the file and give its path"
                ) from error
    if optional:
        return Path()
    raise InputError(f"{place} has no {' and no '.join(names)} (sharded weights are not supported): give a file's path")
