"""Where weights are read from: a path, the Hugging Face hub (``hf-hub:ORG/NAME``) or timm's list (``timm:NAME``).

With a timm model come its name and the images it was measured on: from timm's own list, or from the ``config.json``
that timm writes beside its files. Hugging Face transformers writes a ``config.json`` too, and another file for images.
"""

from __future__ import annotations

import contextlib
import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dino_xcit import safe_load
from dino_xcit.errors import InputError, near_matches
from dino_xcit.models.vit import vit_shape
from dino_xcit.models.xcit import XCIT_SIZES
from dino_xcit.transform import EvalTransform
from dino_xcit.weights.hub import HUB, TIMM, download
from dino_xcit.weights.json_file import CONFIG_LIMIT, read_settings
from dino_xcit.weights.safetensors_file import is_safetensors, read_safetensors
from dino_xcit.weights.timm_config import transform_of
from dino_xcit.weights.transformers_config import CONFIG, PREPROCESSOR, TransformersFolder

ASSUMED = "assumed_eval_transform"
"""Under this name an export's metadata has a transform that its checkpoint did not say (a guess, JSON)."""
EXCEPTION = "eval_transform_exception"
"""Under this name an export's metadata has a clause on what its transform cannot express of what was said of images."""
_NAMES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class WeightsFile:
    """A file that was read, and what is known about it from outside."""

    path: Path
    content: Mapping[str, Any]
    timm_name: str = ""
    """timm's name of the architecture, where it is known."""
    transform: EvalTransform | None = None
    transform_from: str = ""
    """Whose transform that is."""
    transform_exception: str = ""
    """A clause on what that transform cannot express: ``, but for its crop_mode 'squash': the centre is cut``."""
    named_by: str = ""
    """The config.json that ``timm_name`` is of."""
    transformers: TransformersFolder | None = None
    """What Hugging Face transformers says in the folder that the file lies in."""


def open_weights(spec: str | Path) -> WeightsFile:
    """Find the file and read it.

    Args:
        spec: a path, of a file or of a folder as the hub has them; ``hf-hub:ORG/NAME`` or
            ``hf-hub:ORG/NAME@REVISION``; ``timm:NAME`` or ``timm:NAME.TAG``.

    Raises:
        InputError: no such file or name, no network, or a file that is not read safely.
    """
    text = str(spec)
    if text.startswith(TIMM):
        return _of_timm(text.removeprefix(TIMM))
    if text.startswith(HUB):
        repository = text.removeprefix(HUB)
        config = download(repository, (CONFIG,), optional=True)
        path = download(repository, _NAMES)
        assert path is not None
        return _with_config(path, config, text, repository)
    path = _in_folder(Path(text).expanduser())
    beside = path.with_name(CONFIG)
    told = (is_safetensors(path) or path.name in _NAMES) and beside.is_file()
    return _with_config(path, beside if told else None, path.name)


def _of_timm(name: str) -> WeightsFile:
    import timm

    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:  # it knows the architecture, not the tag
        config = None
    if config is None:
        tags = timm.list_models(f"{name.partition('.')[0]}.*", pretrained=True)
        near = (
            f"; it has {', '.join(TIMM + tag for tag in tags[:6])}"
            if tags
            else near_matches(name, timm.list_models(), prefix=TIMM)
        )
        raise InputError(
            f"timm has no weights named {name!r}{near} (timm {timm.__version__}; timm.list_models(pretrained=True) "
            "prints all)"
        )
    if not config.hf_hub_id:
        found = f"only at {config.url}: download that and give its path" if config.url else "nowhere: name another tag"
        raise InputError(f"timm has the weights of {name} {found}")
    tagged = f"{config.architecture}.{config.tag}" if config.tag else str(config.architecture)
    path = download(config.hf_hub_id, (config.hf_hub_filename,) if config.hf_hub_filename else _NAMES)
    assert path is not None
    transform, exception = transform_of(config.to_dict(), f"timm's settings for {tagged}")
    return WeightsFile(path, _read(path), str(config.architecture), transform, f"timm's for {tagged}", exception)


def _with_config(path: Path, config: Path | None, name: str, repository: str = "") -> WeightsFile:
    """``repository``: of the hub, from where other settings are fetched when they are needed; empty: a folder."""
    content = _read(path)
    named, prepared = "args" in content and is_safetensors(path), "eval_transform" in content
    if config is None or (named and prepared):  # what the file says of itself goes before what lies beside it
        return WeightsFile(path, content)
    stored = read_settings(config)
    settings = stored.get("pretrained_cfg", stored)  # timm before 0.9 had them beside the architecture
    architecture = stored.get("architecture")
    if not isinstance(architecture, str) or not isinstance(settings, Mapping):
        return WeightsFile(path, content, transformers=_of_transformers(stored, config, repository))
    if len(architecture) > 100 or not architecture.isprintable():
        raise InputError(f"{config} names an architecture that is none")
    transform, exception = transform_of(settings, str(config))
    if transform is not None and transform == content.get(ASSUMED):  # config.json repeats the export's guess
        transform = None
    origin = f"config.json's of {name}" if transform else ""
    if named:
        return WeightsFile(path, content, "", transform, origin, exception)
    return WeightsFile(path, content, architecture, transform, origin, exception, str(config))


def _of_transformers(stored: Mapping[str, Any], config: Path, repository: str) -> TransformersFolder | None:
    if not isinstance(stored.get("model_type"), str):
        return None  # another library's
    beside: Path | None = config.with_name(PREPROCESSOR)
    if beside is not None and not beside.is_file():
        beside = download(repository, (PREPROCESSOR,), optional=True) if repository else None
    return TransformersFolder(repository or str(config.parent), stored, read_settings(beside) if beside else None)


def _read(path: Path) -> Mapping[str, Any]:
    """A checkpoint's content; of a .safetensors file, what a checkpoint with the same tensors would hold."""
    if not is_safetensors(path):
        return safe_load.read(path)
    tensors, said = read_safetensors(path)
    content: dict[str, Any] = {"state_dict": tensors}
    if _named_here(said.get("arch", "")):  # as python -m dino_xcit.export writes them
        content["args"] = {"arch": said["arch"]}
    if "eval_transform" in said:
        try:
            content["eval_transform"] = json.loads(said["eval_transform"][:CONFIG_LIMIT])
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: the eval_transform in its metadata is no JSON") from error
        content[EXCEPTION] = said.get(EXCEPTION, "")
    if ASSUMED in said:
        with contextlib.suppress(ValueError, RecursionError, InputError, OverflowError, RuntimeError):
            content[ASSUMED] = EvalTransform.from_dict(json.loads(said[ASSUMED][:CONFIG_LIMIT]))
    return content


def _named_here(architecture: str) -> bool:
    """Whether a word is this project's name of an architecture, as an export's metadata has it."""
    return (
        architecture.startswith(TIMM)
        or architecture.rpartition("_p")[0] in XCIT_SIZES
        or vit_shape(architecture) is not None
    )


def _in_folder(path: Path) -> Path:
    """The file of weights in a folder as the hub has them, with config.json beside it; a file itself."""
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        raise InputError(
            f"there is no file {path}: expected weights such as runs/.../checkpoint.pth, hf-hub:ORG/NAME or timm:NAME"
        ) from None
    except (OSError, ValueError):  # reading says why
        return path
    if not is_folder:
        return path
    inside = next((name for name in ("checkpoint.pth", *_NAMES) if (path / name).is_file()), "checkpoint.pth")
    if inside in _NAMES and (path / CONFIG).is_file():
        return path / inside
    raise InputError(f"{path} is a folder: expected a file, such as {path / inside}")
