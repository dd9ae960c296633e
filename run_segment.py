"""Train a backbone to segment images, measure its mIoU, and segment pictures.

    python run_segment.py --recipe own-data --weights runs/.../checkpoint.pth --data-path street/
    torchrun --nproc-per-node 8 run_segment.py --weights ckpt.pth --data-path /data/ADEChallengeData2016 \\
        --batch-size-per-gpu 2
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
from pathlib import Path

import numpy as np
import torch

from dino_xcit import loop
from dino_xcit.data.masks import open_masks
from dino_xcit.loop import Job
from dino_xcit.observers import Evaluator
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.train import new_state
from eval.miou import class_iou, mean_iou, pixel_accuracy
from eval.results import data_metadata, images_metadata
from eval.setup import demand_writable
from eval.table import percent, table
from supervised import segmentation
from supervised.method import build_schedules, open_start, output_folder, set_up, stop_diverged
from supervised.results import write_result
from supervised.segmentation import Predictor, Score, Segmentation, Segmenter, TrainingImages


def main() -> None:
    """Parse the command line, then train and write the results, or segment pictures."""
    began = time.perf_counter()
    config, first_line = parse_run(SegmentConfig, sys.argv[1:], "run_segment.py", RECIPES, DEFAULT_RECIPE)
    device = set_up(config)
    demand_writable({"predictions": config.predictions and str(Path(config.predictions, "mask.png"))})
    stored, start = segmentation.read_run(config.weights), open_start(config)
    if config.predict:
        segmentation.predict(config, start, stored, device)
        return
    log.info(first_line)

    # ---- images and masks
    train, val = open_masks(config)
    assert train.classes is not None
    config = dataclasses.replace(config, arch=start.arch, classes=len(train.classes), output_dir=output_folder(config))
    score = Score(val, Predictor(config, start.transform, device))

    def build(config: SegmentConfig) -> Job[SegmentConfig]:
        torch.manual_seed(config.seed)  # the workers that checked the masks have drawn from the generator
        network = Segmenter(start.backbone, config)
        kept = "loaded" if network.load(stored, config) else "new"
        method = Segmentation(config, device, network, start.backbone, start.transform, train.classes or ())
        return Job(
            config=config,
            state=new_state(config, method, device),
            dataset=TrainingImages(train, config, start.transform),
            evaluators=[Evaluator("segmentation", config.eval_every or sys.maxsize, score)],
            schedules=build_schedules,
            transform=start.transform,
            title=f"segmentation into {config.classes} classes with {start.arch}",
            initialise=lambda: f"{start.sentence}; the head is {kept}",
            on_divergence=stop_diverged,
        )

    state = loop.train(config, device, build)

    # ---- result
    if score.matrix is None:  # the run was complete already
        score(state.method)
    assert score.matrix is not None
    ious = [None if np.isnan(iou) else float(iou) for iou in class_iou(score.matrix)]  # JSON has no NaN
    found = {"miou": mean_iou(score.matrix), "pixel_accuracy": pixel_accuracy(score.matrix)}
    log.info(table(["class", "IoU %"], [[name, percent(iou)] for name, iou in zip(train.classes, ious, strict=True)]))
    log.info(f"mIoU {found['miou']:.1f} %, pixel accuracy {found['pixel_accuracy']:.1f} % on {val.url} ({config.test})")
    if distributed.is_main():
        segmentation.save(segmentation.draw_overlays(val, score), Path(config.output_dir, "overlays.png"))
        parts = {
            name: data_metadata(one, one.fingerprint()) | images_metadata(one)
            for name, one in (("train", train), ("val", val))
        }
        seconds = time.perf_counter() - began
        results = found | {"classes": train.classes, "iou": ious, "test": config.test}
        write_result("segment", config, start, state, results, parts, start.transform, seconds, [])


def command() -> None:
    """Run :func:`main` with the exit codes of docs/reliability.md."""
    less_memory = (
        "lower --batch-size-per-gpu (and raise --accumulation-steps) or --crop-size, or use --activation-checkpointing "
        "or --test slide"
    )
    distributed.run_command(main, less_memory)


if __name__ == "__main__":
    command()
