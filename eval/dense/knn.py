"""k-NN segmentation with frozen patch features (Hummingbird, arXiv 2306.01667).

A memory holds patches of the training images: unit features, and the fraction of each class in the patch. Each patch of
a validation image takes the mean of the fractions of its ``k`` nearest neighbours, weighted by softmax(cosine / T). The
map of fractions is enlarged to the image, and the largest wins. Images are resized to a square; scores use the masks in
their own size.

The memory is drawn as in the paper: the same number of patches from each image, preferring patches with classes that
are rare in the image. Ignored pixels do not count.

The ranks share the images. All hold the whole memory.

B: batch size, S: side of the images, (h, w): grid of patches, N = h * w patches, D: features, K: classes, M: patches in
the memory.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from dino_xcit.cli import parse
from dino_xcit.data import decode
from dino_xcit.data.masks import IGNORE, MaskSource, open_masks
from dino_xcit.data.source import evenly_spaced
from dino_xcit.data.workers import choose_workers, each_image
from dino_xcit.errors import InputError
from dino_xcit.runtime import atomic, distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import counted, progress_bar
from dino_xcit.runtime.memory import available_memory
from dino_xcit.transform import EvalTransform, to_tensor
from dino_xcit.weights import LoadedBackbone
from eval.baselines import untrained
from eval.dense.config import PatchKnnConfig
from eval.dense.patches import patch_features, write_result
from eval.miou import class_iou, confusion, mean_iou
from eval.palette import Segmented, segmentation_sheet
from eval.pooling import patch_size_of
from eval.results import Metric, data_metadata, images_metadata
from eval.search_index import DeviceIndex, search
from eval.setup import open_weights
from eval.table import table

Rows = NDArray[np.float32]
Mask = NDArray[np.uint8]

PIXELS_AT_ONCE = 16 * 224**2
"""Pixels in one pass through the backbone."""
SHOWN = 8
"""Images of the sheet."""
_NUMBERS_AT_ONCE = 1 << 26
"""Maximum number of similarities and of gathered fractions in one search."""


def main() -> None:
    """Parse the command line, evaluate, and report."""
    began = time.perf_counter()
    config = parse(PatchKnnConfig, sys.argv[1:], "python -m eval.dense knn")
    loaded, device = open_weights(config)
    train, val = open_masks(config)
    names, white_level = train.classes or (), config.white_level or loaded.transform.white_level
    transform = replace(loaded.transform, resize=config.size, crop=config.size, white_level=white_level)
    loaded = replace(loaded, transform=transform)
    log.info(
        f"k-NN segmentation: {len(train):,} training images of {train.url}, {len(val):,} validation images of "
        f"{val.url}, {counted(len(names), 'class')}"
    )
    demand_room(config, loaded, train, device)
    models = [("trained", loaded.backbone)]
    if config.baselines:
        models.append(("untrained", untrained(loaded.arch).to(device)))
    records: dict[str, dict[str, Any]] = {}
    for model, backbone in models:
        evaluation = Evaluation(config, model, backbone, transform, device, len(names))
        memory = evaluation.remember(train)
        matrix, shown = evaluation.measure(val, memory)
        ious = [None if np.isnan(iou) else float(iou) for iou in class_iou(matrix)]
        iou = dict(zip(names, ious, strict=True))
        records[model] = {"miou": mean_iou(matrix), "iou": iou, "patches": len(memory.fractions)}
        if shown and distributed.is_main():
            atomic.write(Path(config.out), partial(segmentation_sheet(shown, names).save, format="PNG"))
            log.info(f"written: {config.out}")
    if not distributed.is_main():
        return

    # ---- report
    seconds = time.perf_counter() - began
    rows = [(name, [one["iou"][name] for one in records.values()]) for name in names]
    rows.append(("mean IoU", [one["miou"] for one in records.values()]))
    cells = [[name, *("-" if iou is None else f"{iou:.1f}" for iou in ious)] for name, ious in rows]
    log.info(table(["IoU %", *records], cells) + f"\n{seconds:.0f} s")
    settings = ("size", "memory", "k", "temperature", "seed", "precision", "layout", "ignore_label")
    protocol = {name: getattr(config, name) for name in settings} | {"classes": list(names)}
    protocol["name"] = "k-NN segmentation with patch features (Hummingbird, arXiv 2306.01667), square images"
    parts = (("train", train), ("val", val)) if config.json else ()
    data = {name: data_metadata(one, one.fingerprint()) | images_metadata(one) for name, one in parts}
    metrics = [
        Metric(f"{model} mIoU", {"model": model}, one["miou"], None, model != "trained")
        for model, one in records.items()
    ]
    results = records.pop("trained") | records
    write_result(config, "dense knn", protocol, results, metrics, loaded, data, device, seconds)


def demand_room(config: PatchKnnConfig, loaded: LoadedBackbone, train: MaskSource, device: torch.device) -> None:
    """Check the size of the images and of the memory with a pass of one image.

    Raises:
        InputError: the size is no multiple of the patch size, or this machine has too little memory.
    """
    patch = patch_size_of(loaded.backbone)
    if config.size % patch:
        near = max(1, round(config.size / patch)) * patch
        raise InputError(f"size is {config.size}, expected a multiple of the patch size, {patch}: give --size {near}")
    blank = torch.zeros(1, 3, config.size, config.size, dtype=torch.uint8, device=device)
    _, height, width, features = patch_features(loaded.backbone, blank, loaded.transform, config.precision).shape
    every, classes = len(train) * height * width, len(train.classes or ())
    needed = 4 * min(config.memory, every) * (2 * features + classes)  # features twice while the index is built
    free = available_memory() // distributed.processes_here()
    what = f"{min(config.memory, every):,} of {every:,} training patches"
    log.info(f"memory: {what}, {features} features each, {needed / 1e9:.2f} GB per process")
    if needed > free:
        fitting = int(0.8 * free / needed * min(config.memory, every))
        raise InputError(
            f"memory is {config.memory}: {what} take {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free per "
            f"process; {f'give --memory {fitting} or less' if fitting else 'use fewer processes'}"
        )


# ---- memory


@dataclass(frozen=True)
class Memory:
    """Patches of training images."""

    index: DeviceIndex
    """Of the features [M, D]."""
    fractions: Tensor
    """[M, K], the fraction of each class in the patch; each row sums to 1."""


def class_fractions(mask: Mask, grid: tuple[int, int], classes: int) -> tuple[Rows, NDArray[np.bool_]]:
    """Return the fraction of each class in the scored pixels of each patch [N, K], and which patches have any [N].

    Args:
        mask: [S, S], class numbers, or IGNORE.
        grid: (h, w).
    """
    rows, columns = (np.arange(side) * patches // side for side, patches in zip(mask.shape, grid, strict=True))
    scored = mask != IGNORE
    place = (rows[:, None] * grid[1] + columns)[scored] * classes + mask[scored]
    counts = np.bincount(place, minlength=grid[0] * grid[1] * classes).reshape(-1, classes)
    pixels = counts.sum(axis=1, keepdims=True)
    return (counts / np.maximum(pixels, 1)).astype(np.float32), pixels[:, 0] > 0


def choose_patches(
    fractions: Rows, scored: NDArray[np.bool_], count: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Draw at most ``count`` scored patches of an image, and return their numbers in order.

    A patch's score is the sum, over its classes, of the number of patches with this class, times a uniform random
    number. The patches with the lowest scores are chosen, so rare classes are preferred (arXiv 2306.01667, appendix).

    Args:
        fractions, scored: see :func:`class_fractions`.
    """
    has = (fractions > 0).astype(np.float64)
    scores = np.where(scored, has @ has.sum(axis=0) * generator.random(len(fractions)), np.inf)
    return np.sort(np.argsort(scores, kind="stable")[: min(count, int(scored.sum()))])


def knn_predict(features: Rows, memory: Memory, k: int, temperature: float) -> Tensor:
    """Return the mean class fractions [N, K] of the nearest neighbours of features [N, D], weighted."""
    k = min(k, len(memory.fractions))
    chunk = max(1, _NUMBERS_AT_ONCE // (k * memory.fractions.shape[1] + len(memory.fractions)))
    found = []
    for cosines, rows in search(memory.index, features, k, chunk):
        weights = (torch.from_numpy(cosines) / temperature).softmax(dim=1)
        found.append((weights[..., None] * memory.fractions[torch.from_numpy(rows)]).sum(dim=1))
    return torch.cat(found)


def draw_labels(fractions: Tensor, height: int, width: int) -> Mask:
    """Enlarge class fractions [h, w, K] bilinearly and return the classes with the largest, [height, width]."""
    present = fractions.amax(dim=(0, 1)).nonzero()[:, 0]  # absent classes cannot win, and 150 large maps take gigabytes
    maps = fractions[..., present].permute(2, 0, 1)[None]
    enlarged = F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)[0]
    return present[enlarged.argmax(dim=0)].numpy().astype(np.uint8)


# ---- evaluation


@dataclass(frozen=True)
class Evaluation:
    """Settings and backbone of one evaluation."""

    config: PatchKnnConfig
    model: str
    """Name of the backbone."""
    backbone: nn.Module
    transform: EvalTransform
    device: torch.device
    classes: int
    """K."""

    def remember(self, train: MaskSource) -> Memory:
        """Build the memory of training patches, the same on all ranks.

        Raises:
            InputError: no pixel of the masks has a class.
        """
        images, wanted, found = len(train), self.config.memory, []
        for index, features, mask in self._features(train):
            square = Image.fromarray(mask).resize((self.config.size,) * 2, Image.Resampling.NEAREST)
            height, width = features.shape[:2]
            fractions, scored = class_fractions(np.asarray(square), (height, width), self.classes)
            count = (index + 1) * wanted // images - index * wanted // images
            chosen = choose_patches(fractions, scored, count, np.random.default_rng([self.config.seed, index]))
            found.append((features.flatten(0, 1)[chosen].numpy(), fractions[chosen]))
        rows, labels = (
            np.concatenate(every)
            for every in zip(*(pair for of_rank in distributed.gather_objects(found) for pair in of_rank), strict=True)
        )
        if not len(rows):
            raise InputError(f"no pixel of the training masks of {train.url} has a class: all are ignored")
        # On a CPU, too: for these sizes PyTorch's product and topk take a quarter of the time of faiss's search.
        return Memory(DeviceIndex(rows, self.device), torch.from_numpy(labels))

    def measure(self, val: MaskSource, memory: Memory) -> tuple[NDArray[np.int64], list[Segmented]]:
        """Return the confusion matrix [K, K] of all validation images, and some of the images for a sheet."""
        matrix, shown = np.zeros((self.classes, self.classes), dtype=np.int64), []
        drawn = evenly_spaced(len(val), SHOWN) if self.config.out and self.model == "trained" else []
        for index, features, mask in self._features(val):
            fractions = knn_predict(features.flatten(0, 1).numpy(), memory, self.config.k, self.config.temperature)
            labels = draw_labels(fractions.unflatten(0, features.shape[:2]), *mask.shape)
            matrix += confusion(labels, mask, self.classes)
            if index in drawn:
                image = decode(val.read(index)[0], val.name(index), self.transform.white_level)
                shown.append((val.name(index), image, {"prediction": labels, "ground truth": mask}))
        parts = distributed.gather_objects((matrix, shown))
        return np.sum([part for part, _ in parts], axis=0), [one for _, more in parts for one in more]

    def _features(self, source: MaskSource) -> Iterator[tuple[int, Tensor, Mask]]:
        """Yield this rank's images: index, features [h, w, D] on the CPU, and mask, in its own size."""
        world, rank = distributed.world_size(), distributed.rank()
        own = range(rank * len(source) // world, (rank + 1) * len(source) // world)
        workers = choose_workers(self.config.num_workers, distributed.processes_here())
        size = max(1, PIXELS_AT_ONCE // self.config.size**2)
        read = partial(_read, side=self.config.size, transform=self.transform)
        with (
            closing(each_image(source, own, read, workers)) as images,
            progress_bar(len(own), f"{self.model}: {source.url}", distributed.is_main()) as bar,
        ):
            for start in range(0, len(own), size):
                pixels, masks = [], []
                for one in islice(images, size):
                    if isinstance(one, str):
                        raise InputError(one)
                    pixels.append(one[0])
                    masks.append(np.asarray(one[1]))  # workers send tensors
                batch = torch.stack(pixels).to(self.device)
                features = patch_features(self.backbone, batch, self.transform, self.config.precision).cpu()
                for index, row, mask in zip(own[start : start + size], features, masks, strict=True):
                    yield index, row, mask
                    bar.update()


def _read(source: MaskSource, index: int, side: int, transform: EvalTransform) -> tuple[Tensor, Mask] | str:
    """Return an image [3, S, S] and its mask, in its own size, or why they cannot be read: an error raised in a worker
    would arrive inside a traceback."""
    try:
        image = decode(source.read(index)[0], source.name(index), transform.white_level)
        mask = source.mask(index, (image.height, image.width))
    except InputError as error:
        return str(error)
    method = Image.Resampling[transform.interpolation.partition("-")[0].upper()]
    return to_tensor(image.resize((side, side), method)), mask


def command() -> None:
    """Run :func:`main` with the exit codes of docs/reliability.md."""
    distributed.run_command(main, "give a smaller --size or --memory")


if __name__ == "__main__":
    command()
