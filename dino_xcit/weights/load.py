"""Read one network from a file, compare it key by key with its architecture, and load it into a frozen backbone."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn

from dino_xcit.data.decode import decode_image
from dino_xcit.data.storage import MAX_IMAGE_BYTES, read_file
from dino_xcit.errors import InputError
from dino_xcit.models import build_backbone, build_empty, is_registered
from dino_xcit.models.vit import vit_shape
from dino_xcit.transform import Channels, EvalTransform, normalise, require_rgb
from dino_xcit.weights.layouts import Layout, StoredNetwork, architecture_of, read_network
from dino_xcit.weights.locate import CONFIG, TIMM, WeightsFile, open_weights
from dino_xcit.weights.names import State, shown
from dino_xcit.weights.transforms import preparation

CLASSIFIERS = ("head.*", "fc.*", "head_dist.*", "classifier.*")
"""Classifiers on a supervised backbone, ignored unless the architecture has such a key."""
OF_TRAINING = (
    "mask_token", "masked_embed",  # tokens of masked patches: DINOv2, MAE; iBOT's students
    "decoder_embed.*", "decoder_pos_embed", "decoder_blocks.*", "decoder_norm.*", "decoder_pred.*",  # MAE's decoder
    "pooler.*",  # transformers' layer on the class token, not part of DINO's features
)  # fmt: skip
"""Parts that are used in training only or not for features, ignored too."""
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MOCO_V3_HEADS = {384: 12, 768: 12}
"""Width to number of heads (facebookresearch/moco-v3, vits.py). Other projects' ViT-S has 6 heads."""
_COMPUTED: dict[str, list[object]] = {
    "hidden_act": ["gelu"], "qkv_bias": [True], "use_swiglu_ffn": [False],
    "layer_norm_eps": [1e-12, 1e-6],  # 1e-6 here: equal to 1e-6 for features of variance >= 1
}  # fmt: skip
"""Supported values in transformers' config.json."""


@dataclass(frozen=True)
class Allowed:
    """Keys that may be missing or unexpected: exact names, or a prefix and ``*``."""

    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()

    def check(self) -> None:
        """Check the patterns.

        Raises:
            InputError: A pattern is empty, is ``*`` alone, or has ``*`` before its end.
        """
        for pattern in (*self.missing, *self.unexpected):
            if not pattern.strip("*") or "*" in pattern[:-1]:
                raise InputError(f"--allow-missing and --allow-unexpected take keys and head.*, not {pattern!r}")


@dataclass(kw_only=True)
class Provenance:
    """Origin and metadata of one network of a file."""

    arch: str
    network: str
    """``teacher``, ``student``, or ``the only network`` of a backbone-only file."""
    path: Path
    transform: EvalTransform
    data: str | None
    """Training data, if stored."""
    training: dict[str, Any] = field(default_factory=dict)
    """Settings of the run and ``epochs_trained``, if stored."""
    spec: str = ""
    """Requested weights: a path, ``hf-hub:ORG/NAME`` or ``timm:NAME``."""
    layout: str = ""
    """Value of :class:`~dino_xcit.weights.layouts.Layout`."""
    left_aside: tuple[str, ...] = ()
    """Ignored parts of the file: heads, classifiers, the other network."""
    allowed: tuple[str, ...] = ()
    """``missing KEY`` and ``unexpected KEY`` for each allowed mismatch."""
    transform_from: str = ""
    """Origin of ``transform``, followed by ``transform_exception``; empty: it is a guess."""
    transform_exception: str = ""
    """Deviation of ``transform`` from its origin, as a clause such as ``, but the centre is cropped``."""
    transform_guess: str = ""
    """Description of a guessed ``transform``; else empty."""
    classifiers: tuple[str, ...] = ()
    """Ignored classifiers on the backbone, which was therefore trained with labels."""
    heads_assumed: int = 0
    """Number of heads of a ViT if it is a guess; 0: it is known."""


@dataclass(kw_only=True)
class StoredWeights(Provenance):
    """Weights of one network of a file, which match its architecture."""

    state: State
    """State dict of the backbone, without keys that were allowed to be missing."""
    head: State
    """State dict of the DINO head, with DINO's names; empty if the file has none."""


Embeddable = str | Path | Image.Image | NDArray[Any]
"""An image for :meth:`LoadedBackbone.embed`."""


@dataclass(kw_only=True)
class LoadedBackbone(Provenance):
    """A frozen backbone in eval mode, with its origin."""

    backbone: nn.Module
    hash: str
    """Hash of the backbone's weights, the same for checkpoint.pth and the backbone.pth beside it."""

    @torch.inference_mode()
    def embed(self, images: Sequence[Embeddable] | Embeddable, batch_size: int = 64) -> NDArray[np.float32]:
        """Return the class tokens of images as unit vectors [N, D], so that products are cosines.

        The network runs where ``backbone`` is: ``loaded.backbone.to("cuda")`` moves it.

        Args:
            images: one or several of: a file, an RGB image of Pillow, an array [height, width, channels] (uint8 for
                RGB).

        Raises:
            InputError: an image cannot be read or decoded, or has another number of channels.
        """
        if isinstance(images, str | Path | Image.Image | np.ndarray):
            images = [images]
        device = next(self.backbone.parameters()).device
        found: list[Tensor] = []
        for start in range(0, len(images), batch_size):
            pixels = []
            for index, one in enumerate(images[start : start + batch_size], start):
                if isinstance(one, Image.Image):
                    require_rgb(self.transform.pixel_format, str(self.path))
                    image: Image.Image | Channels = ImageOps.exif_transpose(one).convert("RGB")
                elif isinstance(one, np.ndarray):
                    image = decode_image(one, f"images[{index}]", self.transform.pixel_format)
                else:
                    image = decode_image(read_file(str(one), MAX_IMAGE_BYTES), str(one), self.transform.pixel_format)
                pixels.append(self.transform(image))
            batch = normalise(torch.stack(pixels).to(device), self.transform.mean, self.transform.std)
            found.append(nn.functional.normalize(self.backbone(batch).cls_token.float(), dim=1).cpu())
        width = int(self.backbone.embed_dim)  # type: ignore[arg-type]
        return torch.cat(found).numpy() if found else np.zeros((0, width), dtype=np.float32)

    def describe(self) -> str:
        """Describe the origin in one line, with a further line for each assumption or mismatch."""
        lines = [f"{self.network} {self.arch} from {self.spec or self.path} ({self.layout}; weights {self.hash[:12]})"]
        if self.left_aside:
            lines.append(f"left aside, not the backbone: {shown(self.left_aside)}")
        if self.heads_assumed:
            lines.append(f"heads assumed: {self.heads_assumed} (a family's; --arch names another)")
        if self.allowed:
            lines.append(f"warning: allowed mismatches of the file: {shown(self.allowed)}")
        return "\n".join(lines)


def load_backbone(
    spec: str | Path, network: str = "teacher", arch: str | None = None, allowed: Allowed | None = None
) -> LoadedBackbone:
    """Load a frozen backbone.

    Args:
        spec: A checkpoint file, or a folder in the layout of the hub; ``hf-hub:ORG/NAME``; or ``timm:NAME``, with or
            without timm's pretrained tag.
        network: ``teacher`` or ``student``, for files with both.
        arch: Architecture, if the file does not determine it.
        allowed: Keys that may be missing (initialized as in an untrained network with seed 0) or unexpected.

    Raises:
        InputError: The file is missing or not safely readable, has no such network or another architecture, has missing
            or unexpected keys (the first few are named), or values that are not finite.
    """
    read = read_weights(spec, network, arch, allowed)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        backbone = build_backbone(read.arch, len(read.transform.mean))
    backbone.load_state_dict(read.state, strict=not read.allowed)
    backbone.eval().requires_grad_(False)
    known = {each.name: getattr(read, each.name) for each in dataclasses.fields(Provenance)}
    return LoadedBackbone(backbone=backbone, hash=hash_state(backbone.state_dict()), **known)


def read_weights(
    spec: str | Path, network: str = "teacher", arch: str | None = None, allowed: Allowed | None = None
) -> StoredWeights:
    """Read weights as :func:`load_backbone`, without building the network, and with the DINO head if any."""
    allowed = allowed or Allowed()
    allowed.check()
    file = open_weights(spec)
    where = str(spec)
    stored = read_network(file.content, network, where)
    args = file.content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    training = dict(args) if isinstance(args, Mapping) else {}
    if training and "epoch" in file.content:  # the settings only have the planned epochs
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
    prepared = preparation(file, name, where, stored.layout is Layout.TRANSFORMERS)
    own = build_empty(name, len(prepared.transform.mean)).state_dict()
    for key, value in own.items():
        given = stored.state.get(key.removeprefix("model."), value)
        reads_images = value.ndim == given.ndim == 4 and value.shape[1] == len(prepared.transform.mean)
        if reads_images and len(given) == len(value) and given.shape[1] != value.shape[1]:
            raise InputError(
                f"{where} is for images of {given.shape[1]} channels, but has no mean and std of each: give the "
                "checkpoint.pth of the run"
            )
    state, left_aside, exceptions = compare(stored.state, own, misfit, allowed)
    tensors = {key: value for key, value in (state | stored.head).items() if value.is_floating_point()}
    if wrong := [key for key, value in tensors.items() if not value.isfinite().all()]:
        raise InputError(f"{where} has values that are not finite in {shown(wrong, 4)}: give an earlier checkpoint")
    classifiers = [word for word in left_aside if f"{word}.*" in CLASSIFIERS and f"{word}.weight" in stored.state]
    if stored.layout in (Layout.MOCO, Layout.MOCO_V3):  # trained without labels: these keys are its projector
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
        # Settings may name only the family, such as DINO's vit_small.
        heads_assumed=0 if arch or heads or f"{name}_".startswith(f"{named}_") else _heads_of(name),
    )


def compare(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], misfit: str, allowed: Allowed
) -> tuple[State, tuple[str, ...], tuple[str, ...]]:
    """Compare all keys and shapes of a state dict with those of an architecture.

    Args:
        state: State dict of a backbone, with names as from :func:`dino_xcit.weights.names.backbone_names`.
        own: State dict of the architecture.
        misfit: Start of the error message.
        allowed: Keys that may be missing or unexpected.

    Returns:
        The state dict to load; the first words of ignored keys, such as ``head``; and ``missing KEY`` or
        ``unexpected KEY`` for each allowed mismatch.

    Raises:
        InputError: Keys are missing, unexpected, or of another shape or type. The first few are named.
    """
    wrapper = "model." if own and all(key.startswith("model.") for key in own) else ""
    wanted = {key.removeprefix(wrapper): value for key, value in own.items()}
    given = dict(state)
    if not any(key.endswith("num_batches_tracked") for key in given):  # files from before PyTorch 0.4.1
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
        "has with another shape": [key for key in both if wanted[key].shape != given[key].shape],
        "has with another type": [key for key in floats if given[key].dtype not in _FLOATS],
    }
    sentences = [f"it {kind} {shown(keys, 4)}" for kind, keys in problems.items() if keys]
    if sentences:
        raise InputError(f"{misfit}: {'; '.join(sentences)} (see --arch, --allow-missing, --allow-unexpected)")
    exceptions = (*(f"missing {shown([key])}" for key in missing), *(f"unexpected {shown([key])}" for key in left_over))
    first_words = tuple(dict.fromkeys(key.partition(".")[0] for key in aside))
    return {wrapper + key: given[key] for key in both}, first_words, exceptions


def hash_state(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, types, shapes and bytes of a state dict, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(key.startswith(word[:-1]) if word.endswith("*") else key == word for word in patterns)


def _named_arch(named: str, file: WeightsFile) -> str:
    """Return the architecture named in the stored settings or in config.json; empty if the shapes must determine it."""
    if named.startswith(TIMM) or is_registered(named):
        return named
    beside = str(file.config.get("architecture", ""))[:100]
    # timm's XCiT is loaded as this project's, and the file's own settings take precedence over config.json.
    return "" if not beside or beside.startswith("xcit_") or "args" in file.content else f"{TIMM}{beside}"


def _heads_of(arch: str) -> int:
    shape = vit_shape(arch)
    return shape.heads if shape else 0


def _known_heads(stored: StoredNetwork, file: WeightsFile, named: str, where: str) -> int:
    """Return the number of heads of a ViT from its layout, transformers' config.json or the settings; 0: unknown.

    Raises:
        InputError: config.json describes an unsupported network.
    """
    if stored.layout is Layout.MOCO_V3 and "cls_token" in stored.state:
        return _MOCO_V3_HEADS.get(stored.state["cls_token"].shape[-1:].numel(), 0)
    if stored.layout is not Layout.TRANSFORMERS:
        return _heads_of(named)
    for name, computed in _COMPUTED.items():
        if (found := file.config.get(name, computed[0])) not in computed:
            raise InputError(f"{where}: {CONFIG} has {name} {shown([found])}, only {shown(computed)} is supported")
    heads = file.config.get("num_attention_heads", 0)
    return heads if type(heads) is int else 0
