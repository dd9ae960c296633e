"""Train a segmentation network on a pretrained backbone, evaluate it, or apply it to pictures.

    python run_segment.py --recipe own-data --weights runs/.../checkpoint.pth --data-path street/
    torchrun --nproc-per-node 8 run_segment.py --weights ckpt.pth --data-path /data/ADEChallengeData2016
    python run_segment.py --predict photos/ --weights street/own-data/checkpoint.pth

The loop is in dino_xcit/loop.py; heads, augmentation and evaluation are in supervised/segmentation.py.
"""

from __future__ import annotations

from dino_xcit.cli import check_flags  # before torch: dino_xcit configures the idle behaviour of OpenMP threads
from dino_xcit.recipes import parse_run
from supervised.segment_config import DEFAULT_RECIPE, RECIPES, SegmentConfig

if __name__ == "__main__":
    check_flags(SegmentConfig, "run_segment.py")

import dataclasses
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dino_xcit import loop
from dino_xcit.data import UndecodableImage
from dino_xcit.data.decode import picture_of, read_image
from dino_xcit.data.folder import open_files
from dino_xcit.data.masks import open_masks
from dino_xcit.errors import InputError
from dino_xcit.loop import Job
from dino_xcit.observers import Evaluator
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import counted
from dino_xcit.train import new_state
from dino_xcit.transform import size_of
from eval.miou import class_iou, mean_iou, pixel_accuracy
from eval.palette import colours, segmentation_sheet, to_palette
from eval.report.reporter import Reporter
from eval.results import Metric, data_metadata, images_metadata
from eval.setup import demand_writable
from eval.table import percent, table
from supervised import segmentation
from supervised.method import (
    InitialWeights,
    build_schedules,
    default_output_dir,
    load_initial_weights,
    report_unreadable,
    set_up_run,
    stop_diverged,
)
from supervised.results import write_result
from supervised.segmentation import MiouEvaluator, Predictor, Segmentation, SegmentationDataset, Segmenter


def main() -> None:
    """Parse the command line, then train and write the results, or segment pictures."""
    began = time.perf_counter()
    config, first_line = parse_run(SegmentConfig, sys.argv[1:], "run_segment.py", RECIPES, DEFAULT_RECIPE)
    device = set_up_run(config)
    demand_writable({"masks_out": config.masks_out and str(Path(config.masks_out, "mask.png"))})
    stored, start = segmentation.read_run(config.weights), load_initial_weights(config)
    if config.predict:
        predict(config, start, stored, device)
        return
    log.info(first_line)

    # ---- images and masks
    train, val = open_masks(config, start.transform.pixel_format)
    assert train.classes is not None
    if config.head == "upernet" and config.batch_size_per_gpu * distributed.world_size() < 2:
        raise InputError("upernet normalises over at least 2 images, but the batch has 1: raise --batch-size-per-gpu")
    head = config.head if config.head != "auto" else "linear" if config.frozen else "semantic-fpn"
    config = dataclasses.replace(
        config, arch=start.arch, head=head, classes=len(train.classes), output_dir=default_output_dir(config)
    )
    evaluator = MiouEvaluator(val, Predictor(config, start.transform, device))

    def build(config: SegmentConfig, _stored: object) -> Job[SegmentConfig]:
        torch.manual_seed(config.seed)  # the workers that checked the masks have drawn from the generator
        network = Segmenter(start.backbone, config)
        kept = "loaded" if network.load(stored, config) else "new"
        method = Segmentation(config, device, network, start.backbone, start.transform, train.classes or ())
        return Job(
            config=config,
            state=new_state(config, method, device),
            dataset=SegmentationDataset(train, config, start.transform),
            evaluators=[Evaluator("segmentation", config.evaluation_interval, evaluator)],
            schedules=build_schedules,
            transform=start.transform,
            title=f"segmentation into {config.classes} classes with {start.arch}",
            initialise=lambda: f"{start.description}; the head is {kept}",
            on_divergence=stop_diverged,
            report=Reporter(config.output_dir),
            recipe=RECIPES[config.recipe].settings if config.recipe else {},
        )

    state = loop.train(config, device, build)

    # ---- result
    if evaluator.confusion is None:  # the run was complete already
        evaluator(state.method)
    assert evaluator.confusion is not None
    ious = [None if np.isnan(iou) else float(iou) for iou in class_iou(evaluator.confusion)]  # JSON has no NaN
    found = {"miou": mean_iou(evaluator.confusion), "pixel_accuracy": pixel_accuracy(evaluator.confusion)}
    log.info(table(["class", "IoU %"], [[name, percent(iou)] for name, iou in zip(train.classes, ious, strict=True)]))
    log.info(f"mIoU {found['miou']:.1f} %, pixel accuracy {found['pixel_accuracy']:.1f} % on {val.url} ({config.test})")
    if distributed.is_main():
        overlays = Path(config.output_dir, "overlays.png")
        segmentation.save(segmentation.draw_overlays(val, evaluator), overlays)
        log.info(f"written: {overlays}")
        parts = {
            name: data_metadata(one, one.fingerprint()) | images_metadata(one)
            for name, one in (("train", train), ("val", val))
        }
        seconds = time.perf_counter() - began
        results = found | {"classes": train.classes, "iou": ious, "test": config.test}
        metric = Metric("mIoU", {"metric": "miou", "test": config.test}, found["miou"], None)
        write_result("segment", config, start, state, results, parts, start.transform, seconds, [metric])


def predict(config: SegmentConfig, start: InitialWeights, stored: Mapping[str, Any], device: torch.device) -> None:
    """Segment pictures with the network in the checkpoint ``stored``; write masks and overlays.

    Raises:
        InputError: the weights are no segmentation network, or there are no pictures.
    """
    predictor, network = segmentation.open_segmenter(config, start, stored, device)
    out = Path(config.out or Path(config.weights).parent / "predictions")
    demand_writable({"out": str(out / "masks" / "00000.png")})
    source = open_files(config.predict)
    unreadable: list[str] = []
    for index in range(distributed.rank(), len(source), distributed.world_size()):
        path = source.name(index)
        try:
            image = read_image(source, index, start.transform.pixel_format)
        except UndecodableImage as error:
            unreadable.append(str(error))
            continue
        labels = predictor.labels(network, predictor.prepare(image), size_of(image))
        name = f"{index:05d}-{Path(path).stem}.png"
        segmentation.save(to_palette(labels, colours(256)), out / "masks" / name)
        picture = picture_of(image, start.transform.pixel_format)
        overlay = segmentation_sheet([(path, picture, {"prediction": labels})], stored["class_names"])
        segmentation.save(overlay, out / "overlays" / name)
    read = report_unreadable(unreadable, len(source))
    log.info(f"{counted(read, 'image')} segmented; written: {out}")


def command() -> None:
    """Run :func:`main` with the exit codes of docs/reliability.md."""
    less_memory = (
        "lower --batch-size-per-gpu (and raise --accumulation-steps) or --crop-size, or use --activation-checkpointing "
        "or --test slide"
    )
    distributed.run_command(main, less_memory)


if __name__ == "__main__":
    command()
