"""What supervised tasks share: initial weights, batches, schedules, layer-wise learning rates, the training method.

B: images of a batch.
"""

from __future__ import annotations

import copy
import math
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dino_xcit.config import refuse_xcit_only
from dino_xcit.data.decode import UndecodableImage
from dino_xcit.data.loader import AnyBatch, BatchDataset, Key, StepSampler, Unreadable
from dino_xcit.errors import DIVERGED, InputError, RunStopped
from dino_xcit.methods.method import Method, Stats
from dino_xcit.methods.student_teacher import Ema
from dino_xcit.metrics import require_wandb
from dino_xcit.models import XCiT, build_backbone
from dino_xcit.models.timm_backbone import TimmBackbone
from dino_xcit.optim import Constant, CosineSchedule, Rates, Schedule, Schedules, decays
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import counted
from dino_xcit.runtime.sync_batch_norm import synchronise_batch_norm
from dino_xcit.train import Buffers, TrainState, set_numerics
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import Allowed, StoredWeights, hash_state, read_weights
from dino_xcit.weights.locate import is_remote
from eval.pooling import autocast
from eval.setup import demand_writable
from supervised.config import SCRATCH, SupervisedConfig

Config = TypeVar("Config", bound=SupervisedConfig)
JsonObject = dict[str, object]


# ---- initial weights


@dataclass(frozen=True)
class InitialWeights:
    """The backbone that a run starts from."""

    backbone: nn.Module
    """In train mode, with its initial weights."""
    arch: str
    transform: EvalTransform
    """The transform of the weights, or DINO's."""
    metadata: JsonObject
    """Origin of the weights, for the result file."""
    description: str
    """Origin of the weights, for the log."""
    data: str | None = None
    """Training data of the checkpoint, if it stores them."""


def load_initial_weights(config: SupervisedConfig) -> InitialWeights:
    """Build the backbone of a run and load its pretrained weights.

    Raises:
        InputError: no weights are given, or they are invalid.
    """
    if not config.weights:
        raise InputError("no weights given: add --weights FILE, such as runs/.../checkpoint.pth, or --weights none")
    stored: StoredWeights | None = None
    if config.weights != SCRATCH:
        allowed = Allowed(config.allow_missing, config.allow_unexpected)
        stored = read_weights(config.weights, config.network, config.arch or None, allowed)
    arch = stored.arch if stored else config.arch
    torch.manual_seed(config.seed)
    rate = {"drop_path_rate": config.drop_path_rate} if config.drop_path_rate else {}
    backbone = build_backbone(arch, stored.transform.channels if stored else 3, **rate)
    if isinstance(backbone, XCiT):
        if config.activation_checkpointing == "auto":
            raise InputError(
                "activation_checkpointing is auto, which only run_pretrain.py supports: expected on or off"
            )
        if config.activation_checkpointing == "on":
            backbone.recomputed_stages = backbone.stages
        if config.kernels != "auto":
            backbone.use_kernels(config.kernels)
    else:
        refuse_xcit_only(config, arch)
    if stored is None:
        metadata: JsonObject = {"path": SCRATCH, "arch": arch, "seed": config.seed}
        return InitialWeights(backbone, arch, EvalTransform(), metadata, f"random weights of {arch}")
    backbone.load_state_dict(stored.state, strict=not stored.allowed)
    metadata = {
        "path": str(Path(stored.path).absolute()), "asked_for": stored.spec, "network": stored.network, "arch": arch,
        "hash": hash_state(stored.state), "allowed": list(stored.allowed),
    }  # fmt: skip
    description = f"starting from {stored.network} {arch} of {stored.spec or stored.path} ({stored.layout})"
    return InitialWeights(backbone, arch, stored.transform, metadata, description, stored.data)


def set_up_run(config: SupervisedConfig) -> torch.device:
    """Join the other ranks, choose the kernels, and return the device."""
    if config.quiet:
        log.only_warnings()
    require_wandb(config.wandb)
    device = distributed.choose_device(config.device)
    distributed.start(device, config.hang_timeout + 30)  # the watchdog fires first: its report has more detail
    demand_writable({"json": config.json})
    set_numerics(config, device)
    return device


def default_output_dir(config: SupervisedConfig) -> str:
    """Return ``output_dir``, else a folder named like the recipe beside the weights."""
    if config.output_dir:
        return config.output_dir
    if config.weights == SCRATCH or is_remote(config.weights):
        name = config.arch if config.weights == SCRATCH else config.weights
        return str(Path("runs") / re.sub(r"[^\w.]+", "-", f"{name}-{config.recipe}"))
    return str(Path(config.weights).expanduser().parent / config.recipe)


def run_folder(weights: str) -> Path:
    """Return the output directory of the run that wrote a checkpoint."""
    folder = Path(weights).parent
    return folder.parent if folder.name == "checkpoints" else folder


def report_unreadable(unreadable: Sequence[str], pictures: int) -> int:
    """Warn about the unreadable pictures of ``--predict`` on all ranks, and return the number of readable ones.

    Raises:
        InputError: no picture is readable.
    """
    lines = [line for of_rank in distributed.gather_objects(list(unreadable)) for line in of_rank]
    for line in lines:
        log.warning(line)
    if len(lines) == pictures:
        raise InputError(
            f"none of {counted(pictures, 'picture')} of --predict can be read: give image files or folders"
        )
    return pictures - len(lines)


# ---- batches


@dataclass(kw_only=True)
class SupervisedBatch(AnyBatch):
    """Images and targets of one forward pass on one rank."""

    images: Any
    """[B, channels, height, width], or a list of B tensors [channels, height, width]; normalised, or
    pixels that the network normalises."""
    targets: Any
    """Tensors, or lists and dictionaries of tensors."""

    def pin_memory(self) -> SupervisedBatch:
        return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> SupervisedBatch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def tensors(self) -> Iterator[Tensor]:
        yield from _tensors_in([self.images, self.targets, self.indices])

    def _map(self, convert: Callable[[Tensor], Tensor]) -> SupervisedBatch:
        images, targets = _mapped(self.images, convert), _mapped(self.targets, convert)
        return replace(self, images=images, targets=targets, indices=convert(self.indices))


def _mapped(value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return convert(value)
    if isinstance(value, dict):
        return {name: _mapped(inner, convert) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapped(inner, convert) for inner in value]
    return value


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(inner)


class SupervisedDataset(BatchDataset[SupervisedBatch]):
    """Map keys to batches of augmented images and their targets; a subclass augments one image."""

    stacks = True
    """Whether to stack images and targets; otherwise they stay lists."""

    def augmented(self, index: int, pixels: NDArray[Any], label: int | None) -> tuple[Tensor, Any]:
        """Return an augmented image [channels, height, width] and its target.

        Python's, numpy's and torch's generators are seeded from (seed, epoch, index) before the call.

        Args:
            index: index of the image in the source.
            pixels: [height, width, channels], uint8 for three, float32 from 0 to 1 for others.
            label: its label in the source; None without labels.

        Raises:
            InputError: the target is invalid; ends the run.
        """
        raise NotImplementedError

    def __getitems__(self, keys: list[Key]) -> SupervisedBatch | UndecodableImage:
        images, targets, indices = [], [], []
        unreadable: list[Unreadable] = []
        spent = np.zeros(3)
        for epoch, index in keys:
            found = self.read(epoch, index, unreadable, spent)
            if isinstance(found, UndecodableImage):
                return found
            candidate, label, pixels = found
            began = time.perf_counter()
            seed_everything(self.seed, epoch, index)
            try:
                image, target = self.augmented(candidate, pixels[..., : self.format.channels], label)
            except InputError as error:  # returned, because a worker would wrap the message in a traceback
                return UndecodableImage(str(error))
            spent[2] += time.perf_counter() - began
            images.append(image)
            targets.append(target)
            indices.append(candidate)
        return SupervisedBatch(
            images=torch.stack(images) if self.stacks else images,
            targets=torch.stack(targets) if self.stacks else targets,
            epoch=keys[0][0],
            indices=torch.tensor(indices),
            unreadable=unreadable,
            seconds=(float(spent[0]), float(spent[1]), float(spent[2])),
        )


def seed_everything(*words: int) -> None:
    """Seed the generators of Python, numpy and torch's CPU; libraries draw augmentations from all three."""
    seed = int(np.random.SeedSequence(words).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


# ---- schedules


@dataclass(frozen=True)
class Warmup:
    """Linear from ``start`` to the value of ``then`` at the same step, as in mmcv; ``then`` begins at step 0."""

    start: float
    steps: int
    then: Schedule

    def at(self, step: int) -> float:
        """Return the value for the 0-based ``step``."""
        value = self.then.at(step)
        return value if step >= self.steps else self.start + (value - self.start) * step / self.steps


@dataclass(frozen=True)
class LinearDecay:
    """Linear from ``base`` to ``final``."""

    base: float
    final: float
    total_steps: int

    def at(self, step: int) -> float:
        """Return the value for the 0-based ``step``."""
        return self.final + (self.base - self.final) * max(0.0, 1 - step / self.total_steps)


@dataclass(frozen=True)
class StepDecay:
    """``base``, times 0.1 at each of ``steps``."""

    base: float
    steps: tuple[int, ...]

    def at(self, step: int) -> float:
        """Return the value for the 0-based ``step``."""
        return self.base * 0.1 ** sum(step >= drop for drop in self.steps)


def build_schedules(config: SupervisedConfig, steps_per_epoch: int, global_batch: int) -> Schedules:
    """Build the schedules of a run; a warm-up that covers the whole run is shortened to a tenth of it."""
    total = config.steps or config.epochs * steps_per_epoch
    warmup, warning = config.warmup_steps or round(config.warmup_epochs * steps_per_epoch), ""
    if warmup >= total:
        warning = f"the warm-up of {warmup} steps is not shorter than the run of {total}: shortened to {total // 10}"
        warmup = total // 10
    peak = config.lr * (global_batch / config.lr_reference_batch if config.lr_reference_batch else 1.0)
    shapes: dict[str, Schedule] = {
        "cosine": CosineSchedule(peak, config.min_lr, total),
        "linear": LinearDecay(peak, config.min_lr, total),
        "step": StepDecay(peak, tuple(round(share * total) for share in config.lr_drops)),
    }
    return Schedules(
        lr=Warmup(config.warmup_start_lr, warmup, shapes[config.lr_schedule]),
        weight_decay=Constant(config.weight_decay),
        momentum=Constant(config.ema or math.nan),
        teacher_temp=Constant(math.nan),
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        warning=warning,
    )


# ---- layers of a backbone


def layers_of(backbone: nn.Module) -> dict[str, int]:
    """Return the layer of each parameter of a backbone: 0 for the stem, then one number per block.

    timm's models define their own layers.

    Raises:
        InputError: the backbone is of another kind.
    """
    names = [name for name, _ in backbone.named_parameters()]
    if isinstance(backbone, XCiT):
        return {name: _xcit_layer(name, len(backbone.blocks), len(backbone.cls_attn_blocks)) for name in names}
    if isinstance(backbone, TimmBackbone):
        from timm.models import group_parameters

        found = group_parameters(backbone.model, backbone.model.group_matcher(coarse=False), reverse=True)
        return {f"model.{name}": layer for name, layer in found.items()}
    raise InputError(f"layer_decay needs an XCiT or a timm model, but the backbone is a {type(backbone).__name__}")


def _xcit_layer(name: str, depth: int, class_blocks: int) -> int:
    part, _, rest = name.partition(".")
    if part in ("patch_embed", "pos_embeder"):
        return 0
    if part == "blocks":
        return 1 + int(rest.partition(".")[0])
    if part == "cls_token":
        return depth + 1
    if part == "cls_attn_blocks":
        return depth + 1 + int(rest.partition(".")[0])
    return depth + class_blocks  # the last norm


def layer_groups(network: nn.Module, backbone: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Return the optimizer's groups of a network, with ``lr_scale`` decay ** (distance from the last layer).

    Parameters outside the backbone belong to the layer after its last one. Biases and 1-D tensors have no weight decay.
    """
    trained = {name: parameter for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    by_name = layers_of(backbone) if decay < 1 else dict.fromkeys(trained, 0)
    layers = {id(parameter): by_name[name] for name, parameter in trained.items()}
    above = max(layers.values(), default=0) + 1
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            layer, has_decay = layers.get(id(parameter), above), decays(name, parameter)
            empty = {"params": [], "lr_scale": decay ** (above - layer), "decays": has_decay}
            group = groups.setdefault((layer, has_decay), empty if has_decay else empty | {"weight_decay": 0.0})
            group["params"].append(parameter)
    return list(groups.values())


# ---- the method


class Supervised(Method):
    """Base class of supervised methods: one network, and an average of its weights if ``config.ema`` is set.

    A subclass defines ``loss``.
    """

    def __init__(
        self, config: SupervisedConfig, device: torch.device, network: nn.Module, backbone: nn.Module,
        classes: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """``backbone``: the part of ``network`` with pretrained weights; ``classes``: names, stored in checkpoints."""
        self.config, self.device, self.classes = config, device, list(classes)
        network = synchronise_batch_norm(network, device).to(device).train()
        place = next(name for name, module in network.named_modules() if module is backbone)
        self.trained = self.evaluated = network
        self._average: Ema | None = None
        if config.ema:
            self.evaluated = copy.deepcopy(network).requires_grad_(False)
            self._average = Ema(self.evaluated, network, as_vector=device.type == "cuda")
            self._buffers, self._average_buffers = Buffers(network), Buffers(self.evaluated)
        self.backbone = network.get_submodule(place)
        self.eval_backbone = self.evaluated.get_submodule(place)
        self.ddp_student = distributed.wrap_ddp(network, device)

    def loss(self, batch: SupervisedBatch, rates: Rates) -> tuple[Tensor, Stats]:
        """Return the loss of a batch and statistics to log: sums over images, and their number as ``images``.

        Runs under autocast. Must call the network through ``ddp_student``.
        """
        raise NotImplementedError

    def forward_backward(self, batch: Any, rates: Rates) -> tuple[Tensor, Stats]:
        with autocast(self.config.precision, self.device):
            loss, stats = self.loss(batch, rates)
        (loss * rates.loss_scale).backward()
        return loss.detach(), stats

    def after_step(self, stats: Stats, rates: Rates, accepted: Tensor) -> None:
        """Update the average of the weights; BatchNorm statistics are copied."""
        if self._average:
            self._average(rates.momentum, accepted)
            self._average_buffers.write(self._buffers.read())

    def metrics(self, stats: Stats) -> dict[str, Tensor | float]:
        """Return the means of the statistics over the images of the step."""
        return {name: value / stats["images"] for name, value in stats.items() if name != "images"}

    def parameter_groups(self) -> list[dict[str, Any]]:
        return layer_groups(self.trained, self.backbone, self.config.layer_decay)

    def state_dict(self) -> dict[str, Any]:
        state = {"network": self.trained.state_dict(), "class_names": self.classes}
        return state | ({"ema": self.evaluated.state_dict()} if self._average else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["class_names"] != self.classes:
            raise ValueError("its classes differ from those of the data")
        self.trained.load_state_dict(state["network"])
        if self._average:
            self.evaluated.load_state_dict(state["ema"])


def stop_diverged(state: TrainState, config: SupervisedConfig, sampler: StepSampler) -> RunStopped:
    """Return what ends a supervised run after too many consecutive skipped steps."""
    distributed.barrier()
    sentence = (
        f"error: {int(state.skipped_in_a_row)} consecutive steps up to step {state.step} were not finite and were "
        "skipped: lower --lr, raise --warmup-steps or --warmup-epochs, or use --precision fp32"
    )
    return RunStopped(DIVERGED, sentence if distributed.is_main() else "")
