"""Is a published figure what its published file gives here? k-NN and the published linear head, pass or fail.

    python -m eval.reproduce --weights dino_xcit_small_12_p16_pretrain.pth --data-path /imagenet \\
        --linear dino_xcit_small_12_p16_linearweights.pth
    make reproduce DATA=/imagenet WEIGHTS=... LINEAR=...

The network is recognised by the shapes in the file. k-NN: k = 20, T = 0.07. Images: resize 256 bicubic, centre crop
224. Exit code 0: every figure is within the tolerance; 1: one is not; 2: something has to be mended first.

C classes, D features.
"""

from __future__ import annotations

# Import before torch: it sets how OpenMP threads wait.
import dino_xcit  # noqa: F401  # isort: skip

import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Le
from numpy.typing import NDArray
from torch import Tensor

from dino_xcit import safe_load
from dino_xcit.bounds import FilePath, refuse_changed
from dino_xcit.cli import parse
from dino_xcit.data import Source, open_parts
from dino_xcit.errors import InputError, RunStopped
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import Layout, LoadedBackbone
from dino_xcit.weights.locate import is_safetensors, read_safetensors
from dino_xcit.weights.names import shown
from eval.accuracy import bootstrap_interval, correct
from eval.compare.published import IMAGENET_CLASSES, IMAGENET_TRAIN, IMAGENET_VAL, PUBLISHED, TEMPERATURE, K, Published
from eval.config import BackboneConfig
from eval.features import cached, width_of
from eval.knn import knn_predict
from eval.protocol import KNN_PROTOCOL, data_card, result_card, write_json
from eval.setup import cache_folder, open_backbone
from eval.table import percent, table

_ROWS_AT_ONCE = 4096
_OTHER_METHODS = (Layout.DINOV2, Layout.MOCO, Layout.MOCO_V3, Layout.MAE)
_LACKING = 0.001
"""Share of the training images that may be missing: some copies of ImageNet lack a few, which no figure notices."""


@dataclass(frozen=True)
class ReproduceConfig(BackboneConfig):
    """Settings of python -m eval.reproduce."""

    linear: FilePath = ""
    """The published linear classifier of the same network (dino_..._linearweights.pth); empty: k-NN alone."""
    tolerance: Annotated[float, Ge(0), Le(100)] = 0.3
    """Points by which a figure may differ from the published one, above or below."""
    train_data: str = ""
    """ImageNet's training images, where not DATA_PATH/train."""
    val_data: str = ""
    """ImageNet's validation images, a folder a class, where not DATA_PATH/val."""

    def check(self) -> None:
        """See :meth:`BackboneConfig.check`."""
        super().check()
        if not self.data_path and not (self.train_data and self.val_data):
            raise InputError("no data given: use --data-path DIR, ImageNet with DIR/train and DIR/val")
        fixed = ("eval_resize", "eval_crop", "network", "allow_missing", "allow_unexpected")
        refuse_changed(self, fixed, "here, because published figures were measured in one way")


@dataclass(frozen=True)
class DataSet:
    """What the published figures were measured on."""

    classes: int = IMAGENET_CLASSES
    train: int = IMAGENET_TRAIN
    """Images."""
    val: int = IMAGENET_VAL


@dataclass(frozen=True)
class Verdict:
    """One figure beside the published one; percent of the validation images."""

    measure: str
    top1: float
    interval: tuple[float, float]
    """95%, by bootstrap over the validation images."""
    published: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Within the tolerance; a hair is for decimal fractions in binary."""
        return abs(self.top1 - self.published) <= self.tolerance + 1e-9


def reproduce(
    config: ReproduceConfig, published: Mapping[str, Published] = PUBLISHED, data_set: DataSet | None = None
) -> list[Verdict]:
    """Measure, and say what came of it; the main process has the verdicts, the others an empty list.

    Args:
        published: figures by architecture.
        data_set: what they were measured on; None: ImageNet-1k.

    Raises:
        InputError: a network without a published figure, other data, or a head that does not belong to the network.
    """
    started = time.perf_counter()
    transform = EvalTransform()
    loaded, device = open_backbone(config, fixed=transform)
    figures = _figures_of(loaded, published)
    head = read_head(Path(config.linear).expanduser(), width_of(loaded.backbone)) if config.linear else None
    train, val = open_parts(config.data_path or None, config.train_data or None, config.val_data or None)
    for notice in check_data(train, val, data_set or DataSet()):
        log.warning(notice)
    classes = len(train.classes or ())
    if head and len(head[1]) != classes:
        raise InputError(f"{config.linear} knows {len(head[1])} classes, but {train.url} has {classes}")

    folder = cache_folder(config)
    known, asked = (
        cached(
            loaded.backbone, loaded.hash, part, transform, device, folder, config.batch_size_per_gpu, config.num_workers
        )
        for part in (train, val)
    )
    if not distributed.is_main():
        return []
    predicted = knn_predict(known.features, known.labels, asked.features, [K], [TEMPERATURE], progress=len(val) > 4096)
    hits = {"k-NN": correct(predicted[K, TEMPERATURE], asked.labels, 1)}
    if head:
        hits["linear"] = correct(classify(asked.features, *head, device)[:, None], asked.labels, 1)
    verdicts = [
        Verdict(measure, 100.0 * float(hit.mean()), bootstrap_interval(hit), getattr(figures, field), config.tolerance)
        for (measure, hit), field in zip(hits.items(), ("knn", "linear")[: len(hits)], strict=True)
    ]
    _report(verdicts, loaded.arch, figures, config.linear)
    if config.json:
        protocol = {"name": KNN_PROTOCOL, "k": K, "temperature": TEMPERATURE, "linear": config.linear or None}
        data = {"train": data_card(train, known.fingerprint), "val": data_card(val, asked.fingerprint)}
        records = [asdict(verdict) | {"passed": verdict.passed} for verdict in verdicts]
        seconds = time.perf_counter() - started
        write_json(
            Path(config.json), result_card("reproduce", protocol, records, loaded, data, transform, device, seconds)
        )
        log.info(f"written: {config.json}")
    return verdicts


def _figures_of(loaded: LoadedBackbone, published: Mapping[str, Published]) -> Published:
    """What was published for this network.

    Raises:
        InputError: nothing was, or the file is one of labelled training, or of another method's.
    """
    if loaded.arch not in published:
        known = ", ".join(name for name in published if name.startswith("xcit_"))
        raise InputError(f"{loaded.path} is {loaded.arch}, for which nothing was published; expected one of {known}")
    if loaded.classifiers:
        raise InputError(
            f"{loaded.path} was trained with labels: it has a classifier ({', '.join(loaded.classifiers)}); expected a "
            "file of DINO's, dino_..._pretrain.pth"
        )
    if loaded.layout in _OTHER_METHODS:
        raise InputError(
            f"{loaded.path} is {loaded.layout}, and what was published is of DINO's weights; expected a file of "
            "DINO's, dino_..._pretrain.pth"
        )
    return published[loaded.arch]


def check_data(train: Source, val: Source, expected: DataSet) -> list[str]:
    """Notices about data that are the published figures' but for a few images.

    Raises:
        InputError: other data, or classes that are not ImageNet's, by which the linear head would be misread.
    """
    classes = train.classes or ()
    strange = [name for name in classes if not re.fullmatch(r"n\d{8}", name)]
    if strange or list(classes) != sorted(classes):
        found = f"a class {strange[0]!r}" if strange else "classes in another order"
        raise InputError(f"{train.url} has {found}: expected ImageNet's wnids as folders, such as train/n01440764")
    if len(classes) != expected.classes or len(val) != expected.val:
        raise InputError(
            f"{train.url} has {len(classes):,} classes, and {val.url} {len(val):,} images: the published figures are "
            f"of {expected.classes:,} and {expected.val:,}"
        )
    lacking = expected.train - len(train)
    if not 0 <= lacking <= _LACKING * expected.train:
        raise InputError(
            f"{train.url} has {len(train):,} images: the published figures are of {expected.train:,}; complete it"
        )
    return [f"{train.url} lacks {lacking:,} of {expected.train:,} images"] if lacking else []


def read_head(path: Path, dim: int) -> tuple[Tensor, Tensor]:
    """The weight [C, D] and bias [C] of a linear classifier as DINO publishes it: ``state_dict`` with
    ``module.linear.weight`` and ``module.linear.bias``; or a ``.safetensors`` file with these two.

    Args:
        dim: D of the network it has to belong to.

    Raises:
        InputError: no such file, not read safely, another layout, or another network's.
    """
    state = read_safetensors(path)[0] if is_safetensors(path) else safe_load.read(path).get("state_dict")
    names = ("module.linear.weight", "module.linear.bias")
    if not isinstance(state, Mapping) or set(state) != set(names):
        found = f", found {shown(list(state)[:3])}" if isinstance(state, Mapping) else ""
        raise InputError(
            f"{path} is no linear head of DINO's: expected a state_dict with {' and '.join(names)} alone{found}"
        )
    weight, bias = (state[name] for name in names)
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor) or weight.ndim != 2 or not len(weight):
        raise InputError(f"{path} is no linear head of DINO's: {names[0]} is no matrix")
    if bias.shape != weight.shape[:1] or weight.shape[1] != dim:
        raise InputError(
            f"{path} has {names[0]} of {tuple(weight.shape)} and {names[1]} of {tuple(bias.shape)}, but the network "
            f"has {dim} features: give the head that was published with it"
        )
    return weight.float(), bias.float()


def classify(features: NDArray[np.float32], weight: Tensor, bias: Tensor, device: torch.device) -> NDArray[np.int64]:
    """Each image's first guess: features [images, D], weight [C, D], bias [C] to [images]."""
    guesses = np.empty(len(features), dtype=np.int64)
    weight, bias = weight.to(device), bias.to(device)
    for start in range(0, len(features), _ROWS_AT_ONCE):
        rows = torch.from_numpy(np.array(features[start : start + _ROWS_AT_ONCE])).to(device)
        guesses[start : start + len(rows)] = (rows @ weight.T + bias).argmax(dim=1).cpu().numpy()
    return guesses


def _report(verdicts: Sequence[Verdict], arch: str, figures: Published, linear: str) -> None:
    rows = [
        [
            verdict.measure,
            percent(verdict.top1, verdict.interval),
            percent(verdict.published),
            f"{verdict.top1 - verdict.published:+.2f}",
            f"{verdict.tolerance:g}",
            "pass" if verdict.passed else "FAIL",
        ]
        for verdict in verdicts
    ]
    log.info(f"{arch}, recognised by its shapes; published: {figures.source}")
    log.info(table(["", "top-1 % [95% interval]", "published", "difference", "tolerance", ""], rows))
    if not linear:
        log.info("linear: not measured (--linear FILE, the published head)")


def main() -> None:
    """The command.

    Raises:
        RunStopped: a figure is not the published one.
    """
    config = parse(ReproduceConfig, sys.argv[1:], "python -m eval.reproduce")
    failed = [verdict.measure for verdict in reproduce(config) if not verdict.passed]
    if failed:
        raise RunStopped(1, f"fail: {' and '.join(failed)} of {config.weights} differ by more than the tolerance")
    log.info("pass")


if __name__ == "__main__":
    distributed.run_command(main)
