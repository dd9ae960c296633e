"""From a file to one network's weights, compared key by key with their architecture, and into a frozen backbone."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino_xcit.errors import InputError
from dino_xcit.models import build_backbone, is_registered
from dino_xcit.models.vit import vit_shape
from dino_xcit.transform import EvalTransform
from dino_xcit.weights.layouts import Layout, StoredNetwork, architecture_of, read_network
from dino_xcit.weights.locate import CONFIG, TIMM, WeightsFile, open_weights
from dino_xcit.weights.names import State, shown
from dino_xcit.weights.transforms import preparation

CLASSIFIERS = ("head.*", "fc.*", "head_dist.*", "classifier.*")
"""What stands on a supervised backbone: no part of it, where the architecture has nothing of that name."""
OF_TRAINING = (
    "mask_token", "masked_embed",  # what stands for hidden patches: DINOv2, MAE; iBOT's students
    "decoder_embed.*", "decoder_pos_embed", "decoder_blocks.*", "decoder_norm.*", "decoder_pred.*",  # MAE's decoder
    "pooler.*",  # transformers' layer on the class token, which no feature of DINO's has been through
)  # fmt: skip
"""What is used while training alone, or stands beside the features: no part of a backbone either."""
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MOCO_V3_HEADS = {384: 12, 768: 12}
"""Heads by width (facebookresearch/moco-v3, vits.py): its small transformer has twice those of everybody else's."""
_COMPUTED: dict[str, list[object]] = {
    "hidden_act": ["gelu"], "qkv_bias": [True], "use_swiglu_ffn": [False],
    "layer_norm_eps": [1e-12, 1e-6],  # ours is 1e-6: the same to a millionth where the features' variance is 1 or more
}  # fmt: skip
"""Settings in transformers' config.json of networks that are computed here."""


@dataclass(frozen=True)
class Allowed:
    """Keys that may be missing or left over, by their exact names or by a beginning and ``*``."""

    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()

    def check(self) -> None:
        """Refuse what would allow everything.

        Raises:
            InputError: an empty name, or ``*`` without anything before it.
        """
        for pattern in (*self.missing, *self.unexpected):
            if not pattern.strip("*") or "*" in pattern[:-1]:
                raise InputError(f"--allow-missing and --allow-unexpected take keys and head.*, not {pattern!r}")


@dataclass(kw_only=True)
class Provenance:
    """What is known about one network of a file."""

    arch: str
    network: str
    """``teacher``, ``student``, or ``the only network`` of a backbone-only file."""
    path: Path
    transform: EvalTransform
    data: str | None
    """What it was trained on, where the file says so."""
    training: dict[str, Any] = field(default_factory=dict)
    """The stored settings of the run, and its epochs_trained, where the file has them."""
    spec: str = ""
    """What was asked for: a path, ``hf-hub:ORG/NAME`` or ``timm:NAME``."""
    layout: str = ""
    """Whose layout the file has, in words."""
    left_aside: tuple[str, ...] = ()
    """Parts of the file that are not this backbone: heads, classifiers, the other network."""
    allowed: tuple[str, ...] = ()
    """``missing KEY`` and ``unexpected KEY`` for each exception that was made: such a backbone is not the file's."""
    transform_from: str = ""
    """Who says how its images are prepared, and ``transform_exception``; empty: nobody."""
    transform_exception: str = ""
    """A clause on what ``transform`` cannot express of what they say: ``, but for its squashing of images to squares:
    the centre is cut``."""
    transform_guess: str = ""
    """Where nobody says it, what ``transform`` is and why: ``ImageNet's way for 384 pixels, as its positions``."""
    classifiers: tuple[str, ...] = ()
    """Classifiers on the backbone, which were left aside: such a file was trained with labels."""
    heads_assumed: int = 0
    """A transformer's heads where nobody named them; 0: they are known."""


@dataclass(kw_only=True)
class StoredWeights(Provenance):
    """One network's weights out of a file, compared with its architecture, not yet in a network."""

    state: State
    """The backbone's, under the architecture's names; without those that were allowed to be missing."""
    head: State
    """Its DINO head's under DINO's names; empty where the file has none."""


@dataclass(kw_only=True)
class LoadedBackbone(Provenance):
    """A backbone in eval mode, and where it comes from."""

    backbone: nn.Module
    hash: str
    """Of the backbone's weights alone: the same for checkpoint.pth and the backbone.pth written beside it."""

    def describe(self) -> str:
        """One line for the screen, and one more for each thing that should not go unnoticed."""
        lines = [f"{self.network} {self.arch} from {self.spec or self.path} ({self.layout}; weights {self.hash[:12]})"]
        if self.left_aside:
            lines.append(f"left aside, not the backbone: {shown(self.left_aside)}")
        if self.heads_assumed:
            lines.append(f"heads assumed: {self.heads_assumed} (a family's; --arch names another)")
        if self.allowed:
            lines.append(f"warning: allowed, though the file does not fit: {shown(self.allowed)}")
        return "\n".join(lines)


def load_backbone(
    spec: str | Path, network: str = "teacher", arch: str | None = None, allowed: Allowed | None = None
) -> LoadedBackbone:
    """Read a backbone.

    Args:
        spec: a checkpoint file, or a folder as the hub has them; ``hf-hub:ORG/NAME``; or ``timm:NAME``, with timm's
            pretrained tag or without.
        network: ``teacher`` or ``student``, for files that hold both.
        arch: its architecture, where the file neither says nor shows it.
        allowed: keys that may be missing (they keep the values that an untrained network with seed 0 has) or left over.

    Raises:
        InputError: no such file, not readable safely, no such network, another architecture, missing or unknown keys
            (the first few are named), values that are not finite.
    """
    read = read_weights(spec, network, arch, allowed)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        backbone = build_backbone(read.arch)
    backbone.load_state_dict(read.state, strict=not read.allowed)
    backbone.eval().requires_grad_(False)
    known = {each.name: getattr(read, each.name) for each in dataclasses.fields(Provenance)}
    return LoadedBackbone(backbone=backbone, hash=hash_state(backbone.state_dict()), **known)


def read_weights(
    spec: str | Path, network: str = "teacher", arch: str | None = None, allowed: Allowed | None = None
) -> StoredWeights:
    """As :func:`load_backbone`, without a network to put the weights into, and with the DINO head if any."""
    allowed = allowed or Allowed()
    allowed.check()
    file = open_weights(spec)
    where = str(spec)
    stored = read_network(file.content, network, where)
    args = file.content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    training = dict(args) if isinstance(args, Mapping) else {}
    if training and "epoch" in file.content:  # of epochs, the settings have those that were planned
        training["epochs_trained"] = file.content["epoch"]
    named = str(training.get("arch"))[:100]
    heads = _known_heads(stored, file, named, where)
    try:
        like = _named_arch(named, file) or architecture_of(stored.state, where, heads)
    except InputError:
        if not arch:
            raise
        like = ""
    name = arch or like
    misfit = f"{where} does not fit {name}"
    if like and like != name:
        misfit += f", it looks like {like}"
    elif name == f"{TIMM}{file.config.get('architecture')}":
        misfit += f" (named by {file.config_from})"
    state, left_aside, exceptions = compare(stored.state, _keys_of(name), misfit, allowed)
    tensors = {key: value for key, value in (state | stored.head).items() if value.is_floating_point()}
    if wrong := [key for key, value in tensors.items() if not value.isfinite().all()]:
        raise InputError(f"{where} has values that are not finite in {shown(wrong, 4)}: give an earlier checkpoint")
    prepared = preparation(file, name, where, stored.layout is Layout.TRANSFORMERS)
    classifiers = [word for word in left_aside if f"{word}.*" in CLASSIFIERS and f"{word}.weight" in stored.state]
    if stored.layout in (Layout.MOCO, Layout.MOCO_V3):  # which use no labels: it is the projector that stands there
        classifiers = []
    return StoredWeights(
        state=state,
        head=stored.head,
        arch=name,
        network=stored.network,
        path=file.path,
        spec=where,
        layout=stored.layout,
        left_aside=left_aside + stored.left_aside,
        allowed=exceptions,
        **prepared._asdict(),
        data=str(training["data_path"]) if training.get("data_path") else None,
        training=training,
        classifiers=tuple(classifiers),
        # Settings may name the family alone, as DINO's do: vit_small.
        heads_assumed=0 if arch or heads or f"{name}_".startswith(f"{named}_") else _heads_of(name),
    )


def compare(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], misfit: str, allowed: Allowed
) -> tuple[State, tuple[str, ...], tuple[str, ...]]:
    """Compare a file's weights with an architecture's: every key, every shape.

    Args:
        state: a backbone's weights, under the names of :func:`dino_xcit.weights.names.backbone_names`.
        own: the architecture's state dict, for its names, shapes and kinds of numbers.
        misfit: how the message starts.

    Returns:
        What to load, under the architecture's own names; the first words of classifiers and the like that were left
        aside; ``missing KEY`` or ``unexpected KEY`` for each exception that was made.

    Raises:
        InputError: keys are missing, left over, of another shape or kind; the first few are named.
    """
    wrapper = "model." if own and all(key.startswith("model.") for key in own) else ""
    wanted = {key.removeprefix(wrapper): value for key, value in own.items()}
    given = dict(state)
    if not any(key.endswith("num_batches_tracked") for key in given):  # PyTorch before 0.4.1 did not write them
        counts = {key.replace("running_mean", "num_batches_tracked") for key in given if key.endswith("running_mean")}
        given |= dict.fromkeys(counts & wanted.keys(), torch.zeros((), dtype=torch.int64))
    unknown = [key for key in given if key not in wanted]
    aside = [key for names in (CLASSIFIERS, OF_TRAINING) for key in unknown if _matches(key, names)]
    missing, left_over = sorted(wanted.keys() - given.keys()), sorted(set(unknown) - set(aside))
    both = sorted(wanted.keys() & given.keys())
    floats = [key for key in both if wanted[key].is_floating_point()]
    problems = {
        "lacks": [key for key in missing if not _matches(key, allowed.missing)],
        "has besides": [key for key in left_over if not _matches(key, allowed.unexpected)],
        "has in another shape": [key for key in both if wanted[key].shape != given[key].shape],
        "has as another kind of numbers": [key for key in floats if given[key].dtype not in _FLOATS],
    }
    sentences = [f"it {kind} {shown(keys, 4)}" for kind, keys in problems.items() if keys]
    if sentences:
        raise InputError(f"{misfit}: {'; '.join(sentences)} (see --arch, --allow-missing, --allow-unexpected)")
    exceptions = (*(f"missing {shown([key])}" for key in missing), *(f"unexpected {shown([key])}" for key in left_over))
    first_words = tuple(dict.fromkeys(key.partition(".")[0] for key in aside))
    return {wrapper + key: given[key] for key in both}, first_words, exceptions


def hash_state(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of a state dict, in order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(key.startswith(word[:-1]) if word.endswith("*") else key == word for word in patterns)


def _named_arch(named: str, file: WeightsFile) -> str:
    """The architecture by its name in the settings or in config.json; empty where the shapes must tell."""
    if named.startswith(TIMM) or is_registered(named):
        return named
    beside = str(file.config.get("architecture", ""))[:100]
    # timm's XCiT is read as this project's, and what a file says of itself goes before what lies beside it.
    return "" if not beside or beside.startswith("xcit_") or "args" in file.content else f"{TIMM}{beside}"


def _heads_of(arch: str) -> int:
    shape = vit_shape(arch)
    return shape.heads if shape else 0


def _known_heads(stored: StoredNetwork, file: WeightsFile, named: str, where: str) -> int:
    """A transformer's heads by its layout, transformers' config.json or the stored settings; 0: nothing says it.

    Raises:
        InputError: config.json is of a network that is not computed here.
    """
    if stored.layout is Layout.MOCO_V3 and "cls_token" in stored.state:
        return _MOCO_V3_HEADS.get(stored.state["cls_token"].shape[-1:].numel(), 0)
    if stored.layout is not Layout.TRANSFORMERS:
        return _heads_of(named)
    for name, computed in _COMPUTED.items():
        if (found := file.config.get(name, computed[0])) not in computed:
            raise InputError(f"{where}: {CONFIG} has {name} {shown([found])}, only {shown(computed)} is read here")
    heads = file.config.get("num_attention_heads", 0)
    return heads if type(heads) is int else 0


def _keys_of(arch: str) -> Mapping[str, Tensor]:
    """An architecture's state dict, without memory: a small file may name or resemble a network of twenty gigabytes."""
    try:
        with torch.device("meta"):
            return build_backbone(arch).state_dict()
    except RuntimeError:  # a model of timm's that computes with its weights while it is built
        return build_backbone(arch).state_dict()
