"""Train an object detector on a pretrained backbone, evaluate it, or apply it to pictures.

    torchrun --nproc-per-node 8 run_detect.py --weights ckpt.pth --drop-path-rate 0.05 --data-path /data/coco
    python run_detect.py --recipe own-data --weights ckpt.pth --data-path my_coco/
    python run_detect.py --weights runs/detector/checkpoint.pth --predict photos/ --out found/

The loop is in dino_xcit/loop.py; the network and its scores are in supervised/detection.py, the data set is in
supervised/coco.py.
"""

from __future__ import annotations

from dino_xcit.cli import check_flags  # before torch: dino_xcit configures the idle behaviour of OpenMP threads
from dino_xcit.recipes import parse_run
from supervised.detect_config import DEFAULT_RECIPE, RECIPES, DetectConfig

if __name__ == "__main__":
    check_flags(DetectConfig, "run_detect.py")

import dataclasses
import json
import sys
import time
from pathlib import Path

import torch

from dino_xcit import loop
from dino_xcit.data import UndecodableImage
from dino_xcit.data.decode import read_picture
from dino_xcit.data.folder import open_files
from dino_xcit.loop import Job
from dino_xcit.observers import Evaluator
from dino_xcit.runtime import atomic, distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import counted
from dino_xcit.train import new_state
from eval.palette import SIDE
from eval.report.reporter import Reporter
from eval.results import Metric, data_metadata, images_metadata
from eval.setup import demand_writable
from eval.sheet import Cell
from supervised.coco import JsonObject, find_split, mask_library, open_coco
from supervised.detection import CocoEvaluator, Detection, DetectionDataset, build_detector, open_detector
from supervised.drawing import above, cell_of, draw, write_image, write_sheet
from supervised.method import (
    build_schedules,
    default_output_dir,
    load_initial_weights,
    report_unreadable,
    set_up_run,
    stop_diverged,
)
from supervised.results import write_result

SHOWN = 12
"""Images in a sheet."""
DRAWN = 1024
"""Longer side of a drawn picture of --predict, in pixels."""


def main() -> None:
    """Parse the command line; train and measure a detector, or apply one."""
    config, first_line = parse_run(DetectConfig, sys.argv[1:], "run_detect.py", RECIPES, DEFAULT_RECIPE)
    device = set_up_run(config)
    mask_library()  # refuse before work if it is missing
    if config.predict:
        predict(config, device)
    else:
        log.info(first_line)
        train_and_measure(config, device)


def train_and_measure(config: DetectConfig, device: torch.device) -> None:
    """Train a detector, and write its scores, its detections and a sheet."""
    began = time.perf_counter()
    start = load_initial_weights(config)
    masks, root = config.model == "mask-rcnn", config.data_path
    train_files = find_split(root, "train", config.train_annotations, config.train_images)
    val_files = find_split(root, "val", config.val_annotations, config.val_images)
    train = open_coco(*train_files, masks, format=start.transform.pixel_format)
    val = open_coco(*val_files, masks, train, start.transform.pixel_format)
    config = dataclasses.replace(config, arch=start.arch, output_dir=default_output_dir(config))
    evaluator = CocoEvaluator(val, config, start.transform.pixel_format)

    def build(config: DetectConfig, _stored: object) -> Job[DetectConfig]:
        network = build_detector(config, start.backbone, len(train.categories), start.transform)
        return Job(
            config=config,
            state=new_state(config, Detection(config, device, network, train), device),
            dataset=DetectionDataset(train, config, start.transform.pixel_format),
            evaluators=[Evaluator("detection", config.evaluation_interval, evaluator)],
            schedules=build_schedules,
            transform=start.transform,
            title=f"{config.model} with {start.arch}, {counted(len(train.categories), 'class')}",
            initialise=lambda: start.description,
            on_divergence=stop_diverged,
            report=Reporter(config.output_dir),
            recipe=RECIPES[config.recipe].settings if config.recipe else {},
            next_command=f"python run_detect.py --weights {config.output_dir}/checkpoint.pth --predict PHOTOS",
        )

    state = loop.train(config, device, build)

    # ---- results
    if evaluator.results is None:  # the run was complete already
        evaluator(state.method)
    shown = ", ".join(f"{name} {value:.1f}" for name, value in evaluator.scores.items())
    log.info(f"{shown} on {counted(len(val), 'image')} of {val.url}")
    if not distributed.is_main():
        return
    folder, found = Path(config.output_dir), evaluator.results or []
    atomic.write(folder / "predictions.json", lambda file: file.write(json.dumps(found).encode()))
    cells = []
    for index in range(min(SHOWN, len(val))):
        path = val.name(index)
        image = read_picture(val, index, start.transform.pixel_format)
        annotated = val.annotations(index, crowds=False)
        cells.append(Cell(draw(image, annotated, val.categories, SIDE), Path(path).name, f"{len(annotated)} annotated"))
        own = [one for one in found if one["image_id"] == val.image_ids[index]]
        cells.append(cell_of(image, own, val.categories, config.draw_score))
    write_sheet(folder / "detections.png", cells)
    log.info(f"written: {folder / 'predictions.json'} and {folder / 'detections.png'}")
    parts = {
        name: data_metadata(one, one.fingerprint()) | images_metadata(one)
        for name, one in (("train", train), ("val", val))
    }
    results = evaluator.scores | {"classes": evaluator.classes}
    kinds = ("box", "mask")[: 1 + masks]
    metrics = [Metric(f"{kind} AP", {"metric": f"{kind}_ap"}, evaluator.scores[f"{kind}_ap"], None) for kind in kinds]
    write_result("detect", config, start, state, results, parts, start.transform, time.perf_counter() - began, metrics)


def predict(config: DetectConfig, device: torch.device) -> None:
    """Detect objects on pictures with a detector of this command; write predictions.json and drawings.

    Raises:
        InputError: the weights are no detector, or there are no pictures.
    """
    detector = open_detector(config, device)
    out = Path(config.out or Path(config.weights).parent / "predictions")
    demand_writable({"out": str(out / "predictions.json")})
    (out / "drawn").mkdir(exist_ok=True)
    source = open_files(config.predict)
    results: list[JsonObject] = []
    cells: list[Cell] = []
    unreadable: list[str] = []
    for index, found in detector(source):
        path = source.name(index)
        if isinstance(found, UndecodableImage):
            unreadable.append(str(found))
            continue
        results += [
            {"image_id": index, "file_name": path, "category": detector.categories[one["category_id"]]} | one
            for one in found
        ]
        image = read_picture(source, index, detector.format)
        drawing = draw(image, above(found, config.draw_score), detector.categories, DRAWN)
        write_image(out / "drawn" / f"{index:05d}-{Path(path).stem}.png", drawing)
        if len(cells) < SHOWN:
            cells.append(cell_of(image, found, detector.categories, config.draw_score, Path(path).name))
    read = report_unreadable(unreadable, len(source))
    gathered = distributed.gather_objects(results)
    if distributed.is_main():
        results = sorted((one for rows in gathered for one in rows), key=lambda one: int(one["image_id"]))
        atomic.write(out / "predictions.json", lambda file: file.write(json.dumps(results).encode()))
        if cells:
            write_sheet(out / "detections.png", cells)
        log.info(
            f"{counted(len(results), 'detection')} on {counted(read, 'image')}, of which "
            f"{len(above(results, config.draw_score))} with a score of {config.draw_score:g} or more; written: {out}"
        )


def command() -> None:
    """Run :func:`main` with the exit codes of docs/reliability.md."""
    less_memory = (
        "lower --batch-size-per-gpu (and raise --accumulation-steps), --long-side and --short-sides, or use "
        "--activation-checkpointing"
    )
    distributed.run_command(main, less_memory)


if __name__ == "__main__":
    command()
