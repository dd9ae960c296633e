"""Any known checkpoint to a frozen backbone: which file, which network in it, which architecture, all said.

Known: this project's checkpoint.pth and backbone.pth; DINO's full checkpoints (with their argparse.Namespace) and its
backbone-only files; supervised XCiT files. Reading executes nothing, and keys that are missing or left over are an
error.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dino_xcit.errors import InputError
from dino_xcit.models import build_backbone
from dino_xcit.models.xcit import XCIT_SIZES
from dino_xcit.transform import EvalTransform

NETWORKS = ("teacher", "student")

UNREADABLE = (
    OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, struct.error,
    pickle.UnpicklingError, zipfile.BadZipFile,
)  # fmt: skip
"""What ``torch.load(..., weights_only=True)`` raises for files that are damaged, foreign or unsafe."""


def why_unreadable(error: Exception) -> str:
    """A clause for one of :data:`UNREADABLE`. PyTorch's own text for unsafe files says how to run them all the same."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    unsafe = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and unsafe:
        return f"it holds {unsafe[1]}, and reading that could run a program"
    return "it is damaged, cut short, or of another kind"


@dataclass
class LoadedBackbone:
    """A backbone in eval mode, and where it comes from."""

    backbone: nn.Module
    arch: str
    network: str
    """``teacher``, ``student``, or ``the only network`` of a backbone-only file."""
    path: Path
    hash: str
    """Of the backbone's weights alone: the same for checkpoint.pth and the backbone.pth written beside it."""
    transform: EvalTransform
    data: str | None
    """What it was trained on, where the file says so."""
    training: dict[str, Any] = field(default_factory=dict)
    """The stored settings of the run, where the file has them."""

    def describe(self) -> str:
        """One line for the screen."""
        return f"{self.network} {self.arch} from {self.path} (weights {self.hash[:12]})"


def load_backbone(path: str | Path, network: str = "teacher", arch: str | None = None) -> LoadedBackbone:
    """Read a backbone.

    Args:
        path: a checkpoint file.
        network: ``teacher`` or ``student``, for files that hold both.
        arch: its architecture, where the file neither says nor shows it.

    Raises:
        InputError: no such file, not readable safely, no such network, another architecture, missing or unknown keys
            (the first few are named).
    """
    path = Path(path).expanduser()
    content = _read(path)
    stored = content.get("args", {})
    if isinstance(stored, argparse.Namespace):
        stored = vars(stored)
    training = dict(stored) if isinstance(stored, Mapping) else {}
    state, chosen = _choose_network(content, network, path)
    name = arch or _arch_of(state, training, path)
    backbone = build_backbone(name)
    _load_strictly(backbone, state, name, path)
    backbone.eval().requires_grad_(False)
    transform = EvalTransform()
    if "eval_transform" in content:
        transform = EvalTransform.from_dict(content["eval_transform"])
    data = str(training["data_path"]) if training.get("data_path") else None
    return LoadedBackbone(backbone, name, chosen, path, hash_state(backbone.state_dict()), transform, data, training)


def hash_state(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of a state dict, in order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Any]:
    # A Namespace is a bag of attributes; DINO's files hold one, of numbers, words and lists. Their optimizer's learning
    # rate and weight decay are NumPy numbers, which are rebuilt by one function that has had two names.
    scalar = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [argparse.Namespace, np.dtype, *(type(np.dtype(code)) for code in ("f8", "f4", "i8", "i4"))]
    allowed += [(scalar, f"numpy.{package}.multiarray.scalar") for package in ("core", "_core")]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(
            f"there is no file {path}: --weights takes a checkpoint such as runs/.../checkpoint.pth"
        ) from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder: --weights takes a file, such as {path / 'checkpoint.pth'}") from None
    except UNREADABLE as error:
        raise InputError(f"{path} is no checkpoint that can be read safely: {why_unreadable(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, expected a checkpoint (a dictionary of tensors)")
    return content


def _choose_network(content: Mapping[str, Any], network: str, path: Path) -> tuple[dict[str, Tensor], str]:
    """The backbone's state dict with bare keys, and which network it is."""
    if network not in NETWORKS:
        raise InputError(f"network is {network!r}, expected one of {', '.join(NETWORKS)}")
    if any(isinstance(content.get(name), Mapping) for name in NETWORKS):
        if not isinstance(content.get(network), Mapping):
            present = [name for name in NETWORKS if isinstance(content.get(name), Mapping)]
            raise InputError(f"{path} holds no {network}, only {', '.join(present)}: use --network {present[0]}")
        state = {key.removeprefix("module."): value for key, value in content[network].items()}
        prefix = "backbone."
        if not any(key.startswith(prefix) for key in state):
            raise InputError(f"the {network} in {path} has no keys that start with {prefix!r}: not a DINO checkpoint")
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}, network
    inner = content.get("model", content)
    if not isinstance(inner, Mapping) or not inner or not all(isinstance(value, Tensor) for value in inner.values()):
        keys = ", ".join(list(map(str, content))[:5])
        raise InputError(f"{path} is no checkpoint of a known kind: its keys are {keys} ...")
    return {key.removeprefix("module."): value for key, value in inner.items()}, "the only network"


def _arch_of(state: Mapping[str, Tensor], training: Mapping[str, Any], path: Path) -> str:
    """The architecture by the file's own word, or by the shapes of an XCiT."""
    if str(training.get("arch", "")).startswith("timm:"):
        return str(training["arch"])
    if "cls_token" in state and "pos_embeder.token_projection.weight" in state:
        dim = state["cls_token"].shape[-1]
        depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
        temperatures = [value for key, value in state.items() if key.endswith(".attn.temperature")]
        if not temperatures:
            raise InputError(f"{path} looks like an XCiT but lacks blocks.0.attn.temperature, as of every block")
        heads = temperatures[0].shape[0]
        stages = sum(key.startswith("patch_embed.proj.") and key.endswith(".0.weight") for key in state)
        for name, size in XCIT_SIZES.items():
            if (size.dim, size.depth, size.heads) == (dim, depth, heads):
                return f"{name}_p{2**stages}"
        raise InputError(
            f"{path} is an XCiT of {dim} features, {depth} layers and {heads} heads, which has no name here"
        )
    raise InputError(f"cannot tell the architecture of {path} (first keys: {', '.join(list(state)[:3])}): give --arch")


def _load_strictly(backbone: nn.Module, state: Mapping[str, Tensor], arch: str, path: Path) -> None:
    own = backbone.state_dict()
    # A classifier on top of a supervised backbone is no part of it.
    given = {key: value for key, value in state.items() if key in own or key not in ("head.weight", "head.bias")}
    missing, left_over = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    wrong = sorted(key for key in own.keys() & given.keys() if own[key].shape != given[key].shape)
    problems = []
    for kind, keys in (("lacks", missing), ("has besides", left_over), ("has in another shape", wrong)):
        if keys:
            problems.append(f"{kind} {', '.join(keys[:4])}{f' and {len(keys) - 4} more' if len(keys) > 4 else ''}")
    if problems:
        raise InputError(f"{path} does not fit {arch}: it {'; it '.join(problems)} (--arch names another architecture)")
    backbone.load_state_dict(dict(given))
