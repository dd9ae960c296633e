"""Check published k-NN and linear accuracies against published weights: pass or fail.

    python -m eval.reproduce --weights dino_xcit_small_12_p16_pretrain.pth --data-path /imagenet \\
        --linear dino_xcit_small_12_p16_linearweights.pth
    make reproduce DATA=/imagenet WEIGHTS=... LINEAR=...

The architecture is inferred from the shapes in the file. k-NN: k = 20, T = 0.07. Images: resize 256 bicubic, centre
crop 224. Exit code 0: all accuracies are within the tolerance; 1: one is not; 2: user error.
"""

from __future__ import annotations

# Import before torch: it sets how OpenMP threads wait.
import dino_xcit  # noqa: F401  # isort: skip

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le

from dino_xcit import safe_load
from dino_xcit.bounds import FilePath, refuse_changed
from dino_xcit.cli import parse
from dino_xcit.data import open_parts
from dino_xcit.errors import InputError, RunStopped
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.transform import EvalTransform
from eval.compare import CLASSES, PUBLISHED, TEMPERATURE, TRAIN, VAL, K
from eval.config import BackboneConfig
from eval.features import cached, width_of
from eval.knn import knn_predict
from eval.results import KNN_PROTOCOL, data_metadata, result_content, write_json
from eval.setup import cache_folder, open_backbone
from eval.stats import correct, wilson_interval


@dataclass(frozen=True)
class ReproduceConfig(BackboneConfig):
    """Compare published weights with their published accuracy."""

    linear: FilePath = ""
    """Published linear classifier of the same network (dino_..._linearweights.pth). Default: only k-NN."""
    tolerance: Annotated[float, Ge(0), Le(100)] = 0.3
    """Maximum difference from the published result in percentage points."""
    train_data: str = ""
    """ImageNet's training images. Default: DATA_PATH/train."""
    val_data: str = ""
    """ImageNet's validation images, one folder per class. Default: DATA_PATH/val."""

    def check(self) -> None:
        """See :meth:`BackboneConfig.check`; the published protocol is fixed."""
        super().check()
        fixed = ("eval_resize", "eval_crop", "network", "allow_missing", "allow_unexpected", "precision")
        refuse_changed(self, fixed, "here")


def reproduce(config: ReproduceConfig) -> list[dict[str, Any]]:
    """Measure, log, and return a verdict for each accuracy on rank 0, and an empty list on other ranks.

    Raises:
        InputError: the network has no published result, the data is not ImageNet-1k, or the head does not fit.
    """
    started = time.perf_counter()
    loaded, device = open_backbone(config, fixed=EvalTransform())
    if loaded.arch not in PUBLISHED:
        measurable = ", ".join(name for name in PUBLISHED if name.startswith("xcit_"))
        raise InputError(f"{loaded.path} is {loaded.arch}; expected one of {measurable}")
    train, val = open_parts(config.data_path or None, config.train_data or None, config.val_data or None)
    found, expected = (len(train), len(val), len(train.classes or ())), (TRAIN, VAL, CLASSES)
    if found[1:] != expected[1:] or not 0.999 * TRAIN <= len(train) <= TRAIN:  # some copies lack a few images
        raise InputError(f"{train.url} has {found} training and validation images and classes, expected {expected}")
    head = read_head(Path(config.linear), (CLASSES, width_of(loaded.backbone))) if config.linear else None
    how = loaded.transform, device, cache_folder(config), config.batch_size_per_gpu, config.num_workers
    known, queries = (cached(loaded.backbone, loaded.hash, part, *how) for part in (train, val))
    if not distributed.is_main():
        return []
    guesses = knn_predict(known.features, known.labels, queries.features, [K], [TEMPERATURE], progress=True)
    measured = {"knn": guesses[K, TEMPERATURE]}
    if head:
        measured["linear"] = (queries.features @ head[0].T + head[1]).argmax(axis=1)[:, None]
    verdicts: list[dict[str, Any]] = []
    for key, labels in measured.items():
        measure, published = {"knn": "k-NN"}.get(key, key), PUBLISHED[loaded.arch][key]
        hits = correct(labels, queries.labels, 1)
        top1, interval = 100.0 * float(hits.mean()), wilson_interval(hits)
        log.info(f"{loaded.arch}, {measure}: {top1:.2f} %, published {published} +- {config.tolerance:g}")
        verdict = {"measure": measure, "top1": top1, "interval": interval, "published": published}
        passed = abs(top1 - published) <= config.tolerance + 1e-9  # decimal fractions are inexact in binary
        verdicts.append(verdict | {"tolerance": config.tolerance, "passed": passed})
    if config.json:
        protocol = {"name": KNN_PROTOCOL, "k": K, "temperature": TEMPERATURE, "linear": config.linear or None}
        data = {"train": data_metadata(train, known.fingerprint), "val": data_metadata(val, queries.fingerprint)}
        about = loaded, data, loaded.transform, device, time.perf_counter() - started
        write_json(Path(config.json), result_content("reproduce", protocol, verdicts, *about))
    return verdicts


def read_head(path: Path, shape: tuple[int, int]) -> tuple[Any, Any]:
    """Read weight [classes, features] and bias [classes] of a linear classifier published by DINO.

    Raises:
        InputError: the file is missing, unsafe, or not a state_dict with both tensors in these shapes.
    """
    state: Any = safe_load.read(path).get("state_dict")
    found: Any = [state.get(f"module.linear.{key}") if isinstance(state, dict) else None for key in ("weight", "bias")]
    if [getattr(tensor, "shape", None) for tensor in found] != [shape, shape[:1]]:
        raise InputError(f"{path} is no linear head of this network: expected module.linear.weight of {shape} and bias")
    return found[0].float().numpy(), found[1].float().numpy()


def main() -> None:
    """Run the command.

    Raises:
        RunStopped: an accuracy differs from the published one.
    """
    config = parse(ReproduceConfig, sys.argv[1:], "python -m eval.reproduce")
    if failed := [one["measure"] for one in reproduce(config) if not one["passed"]]:
        raise RunStopped(1, f"fail: {' and '.join(failed)} of {config.weights} differ by more than the tolerance")
    log.info("pass")


if __name__ == "__main__":
    distributed.run_command(main)
