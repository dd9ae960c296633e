"""The same k-NN accuracy in less time: facebookresearch/dino (the reference), and this project.

    python benchmarks/time_to_knn.py --reference DIR [--epochs 6] [--seeds 2] [--only ROW ...]

``--reference`` is that of step.py. All rows train the same XCiT on the same PNG images of Fashion-MNIST (DINO's
augmentation, batch, crop sizes and schedules), with one thread for the step and one loader process. k-NN (k = 20) of
the teacher is measured on held-out images before and after the run. These runs are too short for DINO to raise it by
more than the difference between seeds, so it only shows that the results agree.

The last line is one JSON object. ``ratio_time_equal`` is the reference's time divided by that of ours in fp32,
``ratio_time`` by that of the fastest row; null if the mean final accuracy is more than 0.5 points below the
reference's. ``knn_*`` are accuracies by seed, before and at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dino_xcit  # noqa: E402, F401  # isort: skip  (before torch: configures idle OpenMP threads)
import numpy as np  # noqa: E402
import torch  # noqa: E402
from against import import_peer, in_a_process  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from PIL import Image  # noqa: E402
from step import ReferenceStep, Settings  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from dino_xcit.config import PretrainConfig  # noqa: E402
from dino_xcit.data import open_source  # noqa: E402
from dino_xcit.data.loader import Loader, MultiCropDataset, StepSampler  # noqa: E402
from dino_xcit.optim import Schedules  # noqa: E402
from dino_xcit.runtime.memory import keep_freed_memory  # noqa: E402
from dino_xcit.train import build_state, train_step  # noqa: E402
from dino_xcit.transform import IMAGENET_MEAN, IMAGENET_STD, normalise  # noqa: E402
from eval.knn import knn_predict  # noqa: E402
from eval.table import table  # noqa: E402

CPU = torch.device("cpu")
Train = Callable[[], None]
MARGIN = 0.5
TRAINING, HELD_OUT = 4000, 6000
CONFIG = PretrainConfig(
    arch="xcit_pico_4_p8", out_dim=1024, head_hidden_dim=512, head_bottleneck_dim=64, batch_size_per_gpu=64,
    global_crops_size=48, local_crops_size=24, local_crops_number=2, warmup_epochs=0.5, freeze_last_layer=0, lr=8e-3,
    momentum_teacher=0.99, device="cpu", num_workers=1,
)  # fmt: skip
"""Settings of all rows; the others are DINO's."""


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    key: str
    """Name in --only and the JSON object."""
    title: str
    precision: Literal["fp32", "bf16"]
    schedule: str = ""
    """``--resolution-schedule``."""


ROWS = (
    Row("reference", "facebookresearch/dino + xcit, fp32", "fp32"),
    Row("ours-fp32", "ours, fp32", "fp32"),
    Row("ours-bf16", "ours, bf16", "bf16"),
    Row("ours-bf16-schedule", "ours, bf16, crops of half the size in the first half", "bf16", "0:24/16 0.5:48/24"),
)


def write_images(folder: Path) -> None:
    """Write a folder per class of training images of the embedded sample."""
    source = open_source("sample:fashion-mnist", "train")
    for index in range(TRAINING):
        pixels, label = source.read(index)
        assert isinstance(pixels, np.ndarray)
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / str(label) / f"{index:05d}.png")


def eval_images(start: int, count: int) -> tuple[Tensor, NDArray[np.int64]]:
    """Return images of the embedded sample [count, 3, side, side], normalised, and their labels."""
    source = open_source("sample:fashion-mnist", "train")
    pixels, labels = zip(*(source.read(index) for index in range(start, start + count)), strict=True)
    small = torch.from_numpy(np.stack(pixels))[:, None].expand(-1, 3, -1, -1)
    side = CONFIG.global_crops_size
    large = nn.functional.interpolate(small.float(), (side, side), mode="bicubic", antialias=True).clamp(0, 255)
    return normalise(large.round().to(torch.uint8), IMAGENET_MEAN, IMAGENET_STD), np.array(labels)


def ours(config: PretrainConfig) -> tuple[nn.Module, Train]:
    """Return the teacher's backbone and the training of this project."""
    source = open_source(config.data_path, "train")
    dataset = MultiCropDataset(source, config.augmentation(), config.seed, first=config.first_augmentations())
    dataset.compile()
    sampler = StepSampler(len(source), config.batch_size_per_gpu, seed=config.seed)
    schedules = Schedules.of(config, sampler.steps_per_epoch, sampler.global_batch)
    sampler.stop_step = schedules.total_steps
    state = build_state(config, CPU)

    def train() -> None:
        for batches in Loader(dataset, sampler, config.num_workers, CPU).steps(1):
            train_step(state, batches, schedules, config)

    return state.method.eval_backbone, train


def reference(folder: Path, config: PretrainConfig) -> tuple[nn.Module, Train]:
    """Return the teacher's backbone and the training of the reference."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    settings = Settings(
        arch=config.arch, batch=config.batch_size_per_gpu, out_dim=config.out_dim, drop_path=config.drop_path_rate,
        local_crops=config.local_crops_number, head_hidden=config.head_hidden_dim,
        head_bottleneck=config.head_bottleneck_dim,
    )  # fmt: skip
    step = ReferenceStep(folder, settings, "fp32", config.seed)
    augmentation = import_peer(folder, "dino/main_dino.py").DataAugmentationDINO(
        config.global_crops_scale, config.local_crops_scale, config.local_crops_number
    )
    for transforms, side in (
        (augmentation.global_transfo1, config.global_crops_size),
        (augmentation.global_transfo2, config.global_crops_size),
        (augmentation.local_transfo, config.local_crops_size),
    ):
        transforms.transforms[0].size = (side, side)  # the original has 224 and 96
    loader = DataLoader(
        ImageFolder(config.data_path, transform=augmentation), config.batch_size_per_gpu, shuffle=True,
        num_workers=config.num_workers, pin_memory=True, drop_last=True,
    )  # fmt: skip
    schedules = Schedules.of(config, len(loader), config.batch_size_per_gpu)

    def train() -> None:
        for epoch in range(config.epochs):
            for number, (images, _) in enumerate(loader):
                rates = schedules.at(len(loader) * epoch + number, torch.ones(()))
                step.set_rates(rates.lr, rates.weight_decay, rates.momentum)
                step(images)

    return step.teacher.get_submodule("backbone"), train


@torch.no_grad()
def knn(backbone: nn.Module) -> float:
    """Return the k-NN accuracy of held-out images in percent."""
    training = backbone.training
    backbone.eval()

    def features(images: Tensor) -> NDArray[np.float32]:
        found = [backbone(part) for part in images.split(100)]
        return torch.cat([one if isinstance(one, Tensor) else one.cls_token for one in found]).float().numpy()

    (neighbours, labels), (queries, expected) = eval_images(0, TRAINING), eval_images(TRAINING, HELD_OUT)
    predicted = knn_predict(features(neighbours), labels, features(queries), [20], [0.07])[20, 0.07][:, 0]
    backbone.train(training)
    return 100 * float((predicted == expected).mean())


def run(row: Row, config: PretrainConfig, folder: Path) -> tuple[float, float, float]:
    """Train a row; return k-NN accuracy before and after in percent, and seconds of training."""
    torch.set_num_threads(1)
    keep_freed_memory()
    config = replace(config, precision=row.precision, resolution_schedule=row.schedule)
    backbone, train = reference(folder, config) if row.key == "reference" else ours(config)
    before = knn(backbone)
    began = time.perf_counter()
    train()
    seconds = time.perf_counter() - began
    return before, knn(backbone), seconds


def main() -> None:
    """Train all rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, metavar="DIR")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=[row.key for row in ROWS], default=[row.key for row in ROWS])
    given = parser.parse_args()
    found: dict[str, list[tuple[float, float, float]]] = {}
    with tempfile.TemporaryDirectory() as images:
        write_images(Path(images))
        for seed in range(given.seeds):
            config = replace(CONFIG, data_path=images, epochs=given.epochs, seed=seed)
            for row in (row for row in ROWS if row.key in given.only):
                one = in_a_process(run, row, config, given.reference.resolve())
                found.setdefault(row.key, []).append(one)
                print(f"{row.title}, seed {seed}: k-NN {one[0]:.1f} to {one[1]:.1f} in {one[2]:.0f} s", flush=True)
    means = {key: tuple(map(mean, zip(*runs, strict=True))) for key, runs in found.items()}
    rows = []
    for row in (row for row in ROWS if row.key in found):
        finals = ", ".join(f"{after:.1f}" for _, after, _ in found[row.key])
        before, after, seconds = means[row.key]
        ratio = f"{means['reference'][2] / seconds:.2f}" if "reference" in means else "-"
        rows.append([row.title, f"{before:.1f}", f"{after:.1f} ({finals})", f"{seconds:.0f}", ratio])
    print(table(["", "k-NN before", "after (seeds)", "seconds", "times as fast"], rows))
    ratios: dict[str, float] = {}
    if "reference" in means:
        _, theirs, slow = means["reference"]
        as_good = {key: seconds for key, (_, after, seconds) in means.items() if after >= theirs - MARGIN}
        ratios = {key: round(slow / seconds, 2) for key, seconds in as_good.items() if key != "reference"}
    result: dict[str, Any] = {
        "ratio_time": max(ratios.values(), default=None), "ratio_time_equal": ratios.get("ours-fp32"),
    }  # fmt: skip
    for name, key in (("reference", "reference"), ("ours_equal", "ours-fp32")):
        runs = found.get(key, [])
        result[f"knn_{name}_before"] = [round(before, 2) for before, _, _ in runs]
        result[f"knn_{name}"] = [round(after, 2) for _, after, _ in runs]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
