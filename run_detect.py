"""Train an object detector on a pretrained backbone, measure it, and detect objects on your own pictures.

    torchrun --nproc-per-node 8 run_detect.py --weights ckpt.pth --drop-path-rate 0.05 --data-path /data/coco
    python run_detect.py --recipe own-data --weights ckpt.pth --data-path my_coco/
    python run_detect.py --weights runs/detector/checkpoint.pth --predict photos/ --out found/

The loop is in dino_xcit/loop.py; the network and its scores are in downstream/detection.py, the data set is in
downstream/coco.py.
"""

from __future__ import annotations

from dino_xcit.cli import check_flags  # before torch: dino_xcit configures the idle behaviour of OpenMP threads
from dino_xcit.recipes import parse_run
from downstream.detect_config import DEFAULT_RECIPE, RECIPES, DetectConfig

if __name__ == "__main__":
    check_flags(DetectConfig, "run_detect.py")

import dataclasses
import itertools
import sys
import time
from pathlib import Path

import torch

from dino_xcit import loop, safe_load
from dino_xcit.data import UndecodableImage, decode
from dino_xcit.data.folder import open_files
from dino_xcit.errors import InputError, one_line
from dino_xcit.loop import Job
from dino_xcit.models import build_backbone
from dino_xcit.observers import Evaluator
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.runtime.logging import counted
from dino_xcit.train import new_state
from dino_xcit.transform import EvalTransform
from downstream.coco import find_part, mask_library, open_coco
from downstream.detection import CocoScores, Detection, DetectionImages, Detector, build_detector, write_predictions
from downstream.drawing import CELL, draw, write_image, write_sheet
from downstream.results import write_result
from downstream.supervised import autocast, build_schedules, open_start, output_folder, set_up, stop_diverged
from eval.results import data_metadata, images_metadata
from eval.setup import demand_writable
from eval.sheet import Cell

SHOWN = 12
"""Images in a sheet."""
DRAWN = 1024
"""Longer side of a drawn picture of --predict, in pixels."""


def main() -> None:
    """Parse the command line; train and measure a detector, or apply one."""
    config, first_line = parse_run(DetectConfig, sys.argv[1:], "run_detect.py", RECIPES, DEFAULT_RECIPE)
    device = set_up(config)
    mask_library()  # refuse before work if it is missing
    if config.predict:
        predict(config, device)
    else:
        log.info(first_line)
        train_and_measure(config, device)


def train_and_measure(config: DetectConfig, device: torch.device) -> None:
    """Train a detector, and write its scores, its detections and a sheet."""
    began = time.perf_counter()
    start = open_start(config)
    masks, root = config.model == "mask-rcnn", config.data_path
    train_files = find_part(root, "train", config.train_annotations, config.train_images)
    val_files = find_part(root, "val", config.val_annotations, config.val_images)
    train = open_coco(*train_files, masks)
    val = open_coco(*val_files, masks, like=train)
    config = dataclasses.replace(config, arch=start.arch, output_dir=output_folder(config))
    scores = CocoScores(val, config, start.transform.white_level)

    def build(config: DetectConfig) -> Job[DetectConfig]:
        network = build_detector(config, start.backbone, len(train.categories), start.transform)
        return Job(
            config=config,
            state=new_state(config, Detection(config, device, network, train), device),
            dataset=DetectionImages(train, config, start.transform.white_level),
            evaluators=[Evaluator("detection", config.eval_every or config.epochs, scores)],
            schedules=build_schedules,
            transform=start.transform,
            title=f"{config.model} with {start.arch}, {counted(len(train.categories), 'class')}",
            initialise=lambda: start.sentence,
            on_divergence=stop_diverged,
            next_command=f"python run_detect.py --weights {config.output_dir}/checkpoint.pth --predict PHOTOS",
        )

    state = loop.train(config, device, build)

    # ---- results
    if scores.results is None:  # the run was complete already
        scores(state.method)
    log.info(
        f"{', '.join(f'{name} {value:.1f}' for name, value in scores.scores.items())} on {counted(len(val), 'image')}"
    )
    if not distributed.is_main():
        return
    folder, found = Path(config.output_dir), scores.results or []
    write_predictions(folder / "predictions.json", found)
    cells = []
    for index in range(min(SHOWN, len(val))):
        image, name = (
            decode(val.read(index)[0], val.name(index), start.transform.white_level),
            Path(val.name(index)).name,
        )
        own = [one for one in found if one["image_id"] == val.image_ids[index] and one["score"] >= config.draw_score]
        annotated = [one for one in val.annotations(index) if not one["iscrowd"]]
        cells.append(Cell(draw(image, annotated, val.categories, CELL), Path(name).name, f"{len(annotated)} annotated"))
        note = f"{len(own)} detected, score {config.draw_score:g} or more"
        cells.append(Cell(draw(image, own, val.categories, CELL), "", note))
    write_sheet(folder / "detections.png", cells, columns=4)
    log.info(f"written: {folder / 'predictions.json'} and {folder / 'detections.png'}")
    parts = {
        name: data_metadata(one, one.fingerprint()) | images_metadata(one)
        for name, one in (("train", train), ("val", val))
    }
    results = scores.scores | {"classes": scores.classes}
    write_result("detect", config, start, results, parts, start.transform, device, time.perf_counter() - began, [])


def predict(config: DetectConfig, device: torch.device) -> None:
    """Detect objects on pictures with a detector of this command; write predictions.json and drawings.

    Raises:
        InputError: the weights are no detector, or there are no pictures.
    """
    if not config.weights:
        raise InputError("no weights given: add --weights FILE, a checkpoint.pth of run_detect.py")
    weights = Path(config.weights)
    content = safe_load.read(weights)
    try:
        categories = {int(number): str(name) for number, name in content["categories"].items()}
        transform = EvalTransform.from_dict(content["eval_transform"])
        own = {name: getattr(config, name) for name in ("predict", "out", "draw_score", "num_workers", "precision")}
        stored = {name: tuple(value) if isinstance(value, list) else value for name, value in content["args"].items()}
        config = DetectConfig(**stored | own)
        network = build_detector(config, build_backbone(config.arch), len(categories), transform)
        network.load_state_dict(content.get("average", content["network"]))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{weights} is not a detector of run_detect.py ({type(error).__name__}: {one_line(error)}): train one with "
            f"--weights {weights} --data-path COCO_DIR, then give its checkpoint.pth"
        ) from error
    out = Path(config.out or weights.parent / "predictions")
    demand_writable({"out": str(out / "predictions.json")})
    source = open_files(config.predict)
    detector = Detector(
        network.to(device), tuple(categories), config, transform.white_level, device, autocast(config, device)
    )
    own, cells, unreadable = [], [], []
    for index, found in detector(source):
        path = source.name(index)
        if isinstance(found, UndecodableImage):
            unreadable.append(str(found))
            continue
        own += [{"image_id": index, "file_name": path} | one for one in found]
        shown = [one for one in found if one["score"] >= config.draw_score]
        image = decode(source.read(index)[0], path, transform.white_level)
        write_image(out / "drawn" / f"{index:05d}-{Path(path).stem}.png", draw(image, shown, categories, DRAWN))
        if len(cells) < SHOWN:
            cells.append(Cell(draw(image, shown, categories, CELL), Path(path).name, f"{len(shown)} detected"))
    gathered = distributed.gather_objects((own, unreadable))
    for line in itertools.chain.from_iterable(lines for _, lines in gathered):
        log.warning(line)
    if distributed.is_main():
        results = sorted(itertools.chain.from_iterable(found for found, _ in gathered), key=lambda one: one["image_id"])
        write_predictions(out / "predictions.json", results)
        if cells:
            write_sheet(out / "detections.png", cells, columns=4)
        log.info(f"{counted(len(results), 'detection')} on {counted(len(source), 'image')}; written: {out}")


def command() -> None:
    """Run :func:`main` with the exit codes of docs/reliability.md."""
    less_memory = (
        "lower --batch-size-per-gpu (and raise --accumulation-steps), --long-side and --short-sides, or use "
        "--activation-checkpointing"
    )
    distributed.run_command(main, less_memory)


if __name__ == "__main__":
    command()
