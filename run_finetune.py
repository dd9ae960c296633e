"""Train a backbone with labels and measure its accuracy.

    python run_finetune.py --recipe own-data --weights runs/sample-xcit_micro_4_p16/checkpoint.pth
    torchrun --nproc-per-node 8 run_finetune.py --weights ckpt.pth --data-path /data/imagenet
    torchrun --nproc-per-node 8 run_finetune.py --recipe xcit-supervised-400ep --weights none \\
        --arch xcit_small_12_p16 --data-path /data/imagenet

The loop is in dino_xcit/loop.py; the augmentation, the network and the loss are in supervised/classification.py.
"""

from __future__ import annotations

from dino_xcit.cli import check_flags  # before torch: dino_xcit configures the idle behaviour of OpenMP threads
from dino_xcit.recipes import parse_run
from supervised.finetune_config import DEFAULT_RECIPE, RECIPES, FinetuneConfig

if __name__ == "__main__":
    check_flags(FinetuneConfig, "run_finetune.py")

import dataclasses
import sys
import time

from dino_xcit import loop
from dino_xcit.data import open_parts
from dino_xcit.loop import Job
from dino_xcit.observers import Evaluator
from dino_xcit.runtime import distributed
from dino_xcit.runtime import logging as log
from dino_xcit.train import new_state
from eval.report.reporter import Reporter
from eval.results import data_metadata, images_metadata, metric
from eval.stats import correct, top_accuracies
from eval.table import percent
from supervised.classification import (
    AccuracyEvaluator,
    Classification,
    ClassificationDataset,
    Classifier,
    stratified_subset,
)
from supervised.method import build_schedules, default_output_dir, load_initial_weights, set_up_run, stop_diverged
from supervised.results import write_result


def main() -> None:
    """Parse the command line, train, and write the result file."""
    began = time.perf_counter()
    config, first_line = parse_run(FinetuneConfig, sys.argv[1:], "run_finetune.py", RECIPES, DEFAULT_RECIPE)
    device = set_up_run(config)
    log.info(first_line)

    # ---- backbone and images
    start = load_initial_weights(config)
    data = config.data_path or (start.data if not (config.train_data and config.val_data) else None)
    if data and not config.data_path:
        log.info(f"data: {data}, the training data of the checkpoint (--data-path overrides it)")
    train, val = open_parts(data, config.train_data or None, config.val_data or None)
    train = stratified_subset(train, config.train_share, config.seed)
    crop = config.image_size or start.transform.crop
    transform = dataclasses.replace(start.transform, crop=crop, resize=round(crop / config.eval_crop_ratio))
    config = dataclasses.replace(config, arch=start.arch, data_path=data or "", output_dir=default_output_dir(config))
    accuracy = AccuracyEvaluator(val, transform, device, config.num_workers)

    def build(config: FinetuneConfig, _stored: object) -> Job[FinetuneConfig]:
        assert train.classes is not None  # checked by open_parts
        network = Classifier(start.backbone, len(train.classes))
        kept = "loaded" if network.load_classifier(config.weights, train.classes) else "new"
        return Job(
            config=config,
            state=new_state(config, Classification(config, device, network, train.classes), device),
            dataset=ClassificationDataset(train, config, transform),
            evaluators=[Evaluator("accuracy", config.evaluation_interval, accuracy)],
            schedules=build_schedules,
            transform=transform,
            title=f"classification with {start.arch}",
            initialise=lambda: f"{start.description}; the classifier is {kept}",
            on_divergence=stop_diverged,
            report=Reporter(config.output_dir),
            recipe=RECIPES[config.recipe].settings if config.recipe else {},
            repeats=config.repeated_augmentation,
        )

    state = loop.train(config, device, build)

    # ---- result
    if accuracy.predictions is None:  # the run was complete already
        accuracy(state.method)
    assert accuracy.predictions is not None
    found = top_accuracies(accuracy.predictions, val.labels, five=len(train.classes or ()) > 5)
    log.info(f"top-1 {percent(found['top1'], found['top1_interval'])} % on {len(val):,} images of {val.url}")
    if distributed.is_main():
        parts = {
            name: data_metadata(one, one.fingerprint()) | images_metadata(one)
            for name, one in (("train", train), ("val", val))
        }
        top1 = metric("finetuned, top-1", {"classifier": "finetuned"}, correct(accuracy.predictions, val.labels, 1))
        seconds = time.perf_counter() - began
        write_result("finetune", config, start, state, found, parts, transform, seconds, [top1])


def command() -> None:
    """Run :func:`main` with the exit codes of docs/reliability.md."""
    less_memory = (
        "lower --batch-size-per-gpu (and raise --accumulation-steps) or --image-size, or use --activation-checkpointing"
    )
    distributed.run_command(main, less_memory)


if __name__ == "__main__":
    command()
