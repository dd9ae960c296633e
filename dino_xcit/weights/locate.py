"""Where weights are read from: a path, the Hugging Face hub (``hf-hub:ORG/NAME``) or timm's list (``timm:NAME``); and
what lies beside them: ``config.json`` of timm or transformers, ``preprocessor_config.json`` of transformers.
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
"""Under this name an export's metadata has a transform that its checkpoint did not say (a guess, JSON)."""
EXCEPTION = "eval_transform_exception"
"""Under this name an export's metadata has a clause on what its transform cannot express of what was said of images."""
_NAMES = ("model.safetensors", "pytorch_model.bin")
_SHARDED = "sharded weights, not read here: join them, as model.save_pretrained(OUT, max_shard_size='99GB') does"


class WeightsFile(NamedTuple):
    """A file that was read, and what is said about it from outside."""

    path: Path
    content: Mapping[str, Any]
    config: Mapping[str, Any] = {}
    """config.json, or timm's own settings in the same form."""
    config_from: str = ""
    """``config.json's of NAME``, ``timm's for NAME.TAG``."""
    preprocessor: Mapping[str, Any] = {}
    """transformers' settings of images."""


def is_remote(spec: str) -> bool:
    """Whether weights are named by a hub's or timm's name rather than by a path."""
    return spec.startswith((HUB, TIMM))


def open_weights(spec: str | Path) -> WeightsFile:
    """Find the file and read it.

    Args:
        spec: a path, of a file or of a folder as the hub has them; ``hf-hub:ORG/NAME`` or
            ``hf-hub:ORG/NAME@REVISION``; ``timm:NAME`` or ``timm:NAME.TAG``.

    Raises:
        InputError: no such file or name, no network, or a file that is not read safely.
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
    """A checkpoint's content; of a .safetensors file, what a checkpoint with the same tensors would hold.

    Raises:
        InputError: no such file, or one that is damaged, unsafe or of another kind.
    """
    if re.search(r"-\d{5}-of-\d{5}\.|\.index\.json$", path.name):
        raise InputError(f"{path} is a part of {_SHARDED}")
    if not is_safetensors(path):
        return safe_load.read(path)
    tensors, said = read_safetensors(path)
    content = {"state_dict": tensors, EXCEPTION: said.get(EXCEPTION, "")}
    arch = said.get("arch", "")
    if arch.startswith(TIMM) or arch.rpartition("_p")[0] in XCIT_SIZES or vit_shape(arch):  # as an export writes it
        content["args"] = {"arch": arch}
    with safe_load.refusing(path, "file of weights"):
        return content | {name: json.loads(said[name]) for name in ("eval_transform", ASSUMED) if name in said}


def is_safetensors(path: Path) -> bool:
    """Whether a file has that name, or begins as one does (the hub's cache has names of its own)."""
    if path.suffix == ".safetensors":
        return True
    try:
        with safe_load.opened(path) as file:
            return file.read(9)[8:] == b"{"
    except safe_load.UNREADABLE:  # reading it as a checkpoint says why
        return False


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor by its name, on the CPU, and the metadata of the header.

    Raises:
        InputError: no such file, a folder, or a file that is damaged or claims more than it has.
    """
    with safe_load.refusing(path, ".safetensors file"), safe_load.opened(path) as file:
        safe_load.refuse_git_lfs(file.read(99))
        # The library refuses a header that does not account for every byte of the file once.
        with safe_open(path, framework="pt", device="cpu") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}, tensors.metadata() or {}  # noqa: SIM118


def _file_of(path: Path) -> Path:
    """A file itself; of a folder as the hub has them, with config.json beside it, the file of weights."""
    expected = "expected weights such as runs/.../checkpoint.pth, hf-hub:ORG/NAME or timm:NAME"
    if not os.path.exists(path):
        raise InputError(f"there is no file {path}: {expected}")
    if path.suffix == ".json" and not path.name.endswith(".index.json"):  # that of sharded weights is told as such
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
        raise InputError(f"{path} is a distributed checkpoint, which is not read here: type {convert}")
    what = f"a file, such as {path / found}" if found else f"a file, or a folder with {_NAMES[0]} and {CONFIG} in it"
    raise InputError(f"{path} is a folder: expected {what}")


def _read_json(path: Path) -> Mapping[str, Any]:
    with safe_load.refusing(path, "JSON file of settings"), open(path, "rb") as file:
        stored = json.loads(file.read(2**20))  # a longer one is cut, and no JSON then
        if not isinstance(stored, Mapping):
            raise safe_load.RefusedError("it holds no settings")
    return stored


def _of_timm(name: str) -> WeightsFile:
    import timm

    try:
        config: Any = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        near = near_matches(name, [*timm.list_models(pretrained=True), *timm.list_models()], prefix=TIMM)
        raise InputError(f"timm {timm.__version__} has no weights named {name!r}{near}") from error
    if not config.hf_hub_id:
        found = f"only at {config.url}: download that and give its path" if config.url else "nowhere: name another tag"
        raise InputError(f"timm has the weights of {name} {found}")
    path = _download(config.hf_hub_id, [config.hf_hub_filename] if config.hf_hub_filename else _NAMES)
    tagged = f"{config.architecture}.{config.tag}" if config.tag else config.architecture
    settings = {"architecture": config.architecture, "pretrained_cfg": config.to_dict()}
    return WeightsFile(path, read_file(path), settings, f"timm's for {tagged}")


def _download(repository: str, names: Sequence[str], optional: bool = False) -> Path:
    """The first of the files that a repository of the hub has, from this machine if it was fetched before; a path
    without a file where it has none of them and they are optional."""
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    place, _, revision = repository.partition("@")
    for name in names:
        try:
            return Path(hf_hub_download(place, name, revision=revision or None))
        except (OSError, RuntimeError, ValueError) as error:  # the network's and the names' ways to fail
            absent = isinstance(error, EntryNotFoundError)
            if isinstance(error, LocalEntryNotFoundError):  # no network: an earlier look may have found it absent
                absent = try_to_load_from_cache(place, name, revision=revision or None) is _CACHED_NO_EXIST
            if not absent:
                raise InputError(
                    f"cannot fetch {name} of {repository!r} from the Hugging Face hub: "
                    f"{one_line(error.__cause__ or error)}; check the name (hf-hub:ORG/NAME), the network and hf auth "
                    "login, or download the file and give its path"
                ) from error
    if optional:
        return Path()
    raise InputError(f"{place} has no {' and no '.join(names)} (sharded weights are not read): give a file's path")
