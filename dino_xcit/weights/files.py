"""Where weights are read from: a path, the Hugging Face hub (``hf-hub:ORG/NAME``) or timm's list (``timm:NAME``).

With a timm model come its name and the images it was measured on: from timm's own list, or from the ``config.json``
that timm writes beside its files.
"""

from __future__ import annotations

import contextlib
import json
import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dino_xcit import safe_load
from dino_xcit.errors import InputError, near_matches
from dino_xcit.models.vit import vit_side
from dino_xcit.models.xcit import XCIT_SIZES
from dino_xcit.transform import EvalTransform
from dino_xcit.weights.hub import HUB, TIMM, download
from dino_xcit.weights.safetensors_file import is_safetensors, read_safetensors

CONFIG_LIMIT = 2**20
"""Bytes of a config.json."""
SIDE_LIMIT = 4096
ASSUMED = "assumed_eval_transform"
"""Under this name an export's metadata has a transform that its checkpoint did not say (a guess, JSON)."""
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
    named_by: str = ""
    """The config.json that ``timm_name`` is of."""


def open_weights(spec: str | Path) -> WeightsFile:
    """Find the file and read it.

    Args:
        spec: a path; ``hf-hub:ORG/NAME`` or ``hf-hub:ORG/NAME@REVISION``; ``timm:NAME`` or ``timm:NAME.TAG``.

    Raises:
        InputError: no such file or name, no network, or a file that is not read safely.
    """
    text = str(spec)
    if text.startswith(TIMM):
        return _of_timm(text.removeprefix(TIMM))
    if text.startswith(HUB):
        repository = text.removeprefix(HUB)
        config = download(repository, ("config.json",), optional=True)
        path = download(repository, _NAMES)
        assert path is not None
        return _with_config(path, config, text)
    path = Path(text).expanduser()
    _refuse_folder(path)
    beside = path.with_name("config.json")
    return _with_config(path, beside if is_safetensors(path) and beside.is_file() else None, path.name)


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
    transform, exception = _transform_of(config.to_dict(), f"timm's settings for {tagged}")
    return WeightsFile(path, _read(path), str(config.architecture), transform, f"timm's for {tagged}{exception}")


def _with_config(path: Path, config: Path | None, name: str) -> WeightsFile:
    content = _read(path)
    named, prepared = "args" in content and is_safetensors(path), "eval_transform" in content
    if config is None or (named and prepared):  # what the file says of itself goes before what lies beside it
        return WeightsFile(path, content)
    stored = _json(config)
    settings = stored.get("pretrained_cfg", stored)  # timm before 0.9 had them beside the architecture
    architecture = stored.get("architecture")
    if not isinstance(architecture, str) or not isinstance(settings, Mapping):
        return WeightsFile(path, content)  # another library's
    if len(architecture) > 100 or not architecture.isprintable():
        raise InputError(f"{config} names an architecture that is none")
    transform, exception = _transform_of(settings, str(config))
    if transform is not None and transform == content.get(ASSUMED):  # config.json repeats the export's guess
        transform = None
    origin = f"config.json's of {name}{exception}" if transform else ""
    if named:
        return WeightsFile(path, content, "", transform, origin)
    return WeightsFile(path, content, architecture, transform, origin, str(config))


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
    if ASSUMED in said:
        with contextlib.suppress(ValueError, RecursionError, InputError, OverflowError, RuntimeError):
            content[ASSUMED] = EvalTransform.from_dict(json.loads(said[ASSUMED][:CONFIG_LIMIT]))
    return content


def _named_here(architecture: str) -> bool:
    """Whether a word is this project's name of an architecture, as an export's metadata has it."""
    return (
        architecture.startswith(TIMM) or architecture.rpartition("_p")[0] in XCIT_SIZES or bool(vit_side(architecture))
    )


def _json(path: Path) -> Mapping[str, Any]:
    try:
        with open(path, "rb") as file:
            text = file.read(CONFIG_LIMIT + 1)
        stored = json.loads(text) if len(text) <= CONFIG_LIMIT else None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: it is damaged, or no JSON; mend it, or move it away") from error
    if not isinstance(stored, Mapping):
        raise InputError(f"{path} holds no settings, or more than {CONFIG_LIMIT >> 20} MiB: mend it, or move it away")
    return stored


def _transform_of(settings: Mapping[str, Any], where: str) -> tuple[EvalTransform | None, str]:
    """timm's pretrained_cfg as a transform, and a clause on what it cannot express; None where it says too little.

    timm resizes the shorter side to side / crop_pct, rounded down, and cuts the centre (timm.data.create_transform).
    """
    if not {"input_size", "mean", "std"} <= settings.keys():
        return None, ""
    try:
        _, height, width = settings["input_size"]
        share = float(settings.get("crop_pct") or 0.875)
        side = int(width)
        if height != width or not 1 <= side <= SIDE_LIMIT or not side / SIDE_LIMIT <= share <= 1:
            raise ValueError("no square of a size that can be")
        stored = {
            "resize": math.floor(side / share),
            "crop": side,
            "interpolation": settings.get("interpolation") or "bicubic",
            "mean": settings["mean"],
            "std": settings["std"],
        }
        transform = EvalTransform.from_dict(stored)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{where}: the evaluation transform in it cannot be read ({' '.join(str(error).split())[:200]})"
        ) from error
    mode = settings.get("crop_mode") or "center"
    return transform, "" if mode == "center" else f", but for its crop_mode {str(mode)[:20]!r}: the centre is cut"


def _refuse_folder(path: Path) -> None:
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        raise InputError(
            f"there is no file {path}: expected weights such as runs/.../checkpoint.pth, hf-hub:ORG/NAME or timm:NAME"
        ) from None
    except (OSError, ValueError):  # reading says why
        return
    if is_folder:
        inside = next((name for name in ("checkpoint.pth", *_NAMES) if (path / name).is_file()), "checkpoint.pth")
        raise InputError(f"{path} is a folder: expected a file, such as {path / inside}")
