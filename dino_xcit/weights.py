"""Any known checkpoint to a frozen backbone: which file, which network in it, which architecture, all said.

Known: this project's checkpoint.pth and backbone.pth; DINO's full checkpoints (with their argparse.Namespace) and its
backbone-only files; supervised XCiT files. Reading executes nothing, and keys that are missing or left over are an
error.
"""

from __future__ import annotations

import argparse
import hashlib
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino_xcit import safe_load
from dino_xcit.errors import InputError
from dino_xcit.models import build_backbone
from dino_xcit.models.xcit import XCIT_SIZES
from dino_xcit.transform import EvalTransform

NETWORKS = ("teacher", "student")


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
    # Without memory of its own first: a file of a few bytes may name or resemble a network of twenty gigabytes.
    _check_fit(_without_memory(name), state, name, path)
    backbone = build_backbone(name)
    backbone.load_state_dict({key: state[key] for key in backbone.state_dict()})
    backbone.eval().requires_grad_(False)
    transform = _transform_in(content, path)
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
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        raise InputError(
            f"there is no file {path}: --weights takes a checkpoint such as runs/.../checkpoint.pth"
        ) from None
    except (OSError, ValueError):  # reading says why
        is_folder = False
    if is_folder:
        raise InputError(f"{path} is a folder: --weights takes a file, such as {path / 'checkpoint.pth'}")
    return safe_load.read(path)


def _choose_network(content: Mapping[str, Any], network: str, path: Path) -> tuple[dict[str, Tensor], str]:
    """The backbone's state dict with bare keys, and which network it is."""
    if network not in NETWORKS:
        raise InputError(f"network is {network!r}, expected one of {', '.join(NETWORKS)}")
    if any(isinstance(content.get(name), Mapping) for name in NETWORKS):
        if not isinstance(content.get(network), Mapping):
            present = [name for name in NETWORKS if isinstance(content.get(name), Mapping)]
            raise InputError(f"{path} holds no {network}, only {', '.join(present)}: use --network {present[0]}")
        state = _bare(content[network], f"the {network} in {path}")
        prefix = "backbone."
        if not any(key.startswith(prefix) for key in state):
            raise InputError(f"the {network} in {path} has no keys that start with {prefix!r}: not a DINO checkpoint")
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}, network
    inner = content.get("model", content)
    if not isinstance(inner, Mapping) or not inner or not all(isinstance(value, Tensor) for value in inner.values()):
        raise InputError(f"{path} is no checkpoint of a known kind: its keys are {_shown(list(content)[:5])} ...")
    return _bare(inner, str(path)), "the only network"


def _bare(state: Mapping[Any, Any], holder: str) -> dict[str, Tensor]:
    """A state dict without DistributedDataParallel's prefix."""
    wrong = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if wrong:
        raise InputError(f"{holder} holds besides tensors {_shown(wrong[:3])}: not a checkpoint of a known kind")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _shown(keys: Iterable[object]) -> str:
    """Keys of a file, which may be of any length and hold anything, in one line."""
    return ", ".join("".join(c if c.isprintable() else "?" for c in str(key)[:80]) for key in keys)


def _transform_in(content: Mapping[str, Any], path: Path) -> EvalTransform:
    if "eval_transform" not in content:
        return EvalTransform()
    try:
        return EvalTransform.from_dict(content["eval_transform"])
    except (InputError, OverflowError, RuntimeError) as error:
        raise InputError(f"{path}: {_shown([' '.join(str(error)[:1000].split())])}") from error


def _arch_of(state: Mapping[str, Tensor], training: Mapping[str, Any], path: Path) -> str:
    """The architecture by the file's own word, or by the shapes of an XCiT."""
    named = training.get("arch")
    if isinstance(named, str) and named.startswith("timm:"):
        if len(named) > 100 or not named.isprintable():
            raise InputError(f"{path} names an architecture that is none: {_shown([named])}")
        return named
    if "cls_token" in state and "pos_embeder.token_projection.weight" in state:
        dim = state["cls_token"].shape[-1] if state["cls_token"].ndim else 0
        depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
        temperatures = [value for key, value in state.items() if key.endswith(".attn.temperature")]
        if not temperatures:
            raise InputError(f"{path} looks like an XCiT but lacks blocks.0.attn.temperature, as of every block")
        if not dim or not temperatures[0].ndim:
            raise InputError(f"{path} looks like an XCiT, but its cls_token or attn.temperature is a single number")
        heads = temperatures[0].shape[0]
        stages = sum(key.startswith("patch_embed.proj.") and key.endswith(".0.weight") for key in state)
        for name, size in XCIT_SIZES.items():
            if (size.dim, size.depth, size.heads) == (dim, depth, heads) and stages < 10:
                return f"{name}_p{2**stages}"
        raise InputError(
            f"{path} is an XCiT of {dim} features, {depth} layers and {heads} heads, which has no name here"
        )
    raise InputError(f"cannot tell the architecture of {path} (first keys: {_shown(list(state)[:3])}): give --arch")


def _without_memory(arch: str) -> nn.Module:
    try:
        with torch.device("meta"):
            return build_backbone(arch)
    except RuntimeError:  # a model of timm's that computes with its weights while it is built
        return build_backbone(arch)


def _check_fit(backbone: nn.Module, state: Mapping[str, Tensor], arch: str, path: Path) -> None:
    own = backbone.state_dict()
    # A classifier on top of a supervised backbone is no part of it.
    given = {key: value for key, value in state.items() if key in own or key not in ("head.weight", "head.bias")}
    missing, left_over = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    wrong = sorted(key for key in own.keys() & given.keys() if own[key].shape != given[key].shape)
    problems = []
    for kind, keys in (("lacks", missing), ("has besides", left_over), ("has in another shape", wrong)):
        if keys:
            problems.append(f"{kind} {_shown(keys[:4])}{f' and {len(keys) - 4} more' if len(keys) > 4 else ''}")
    if problems:
        raise InputError(f"{path} does not fit {arch}: it {'; it '.join(problems)} (--arch names another architecture)")
