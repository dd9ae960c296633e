"""Demo of the downstream tasks on scenes of Fashion-MNIST objects: segmentation, detection, fine-tuning.

    python benchmarks/demo_dense.py [--output-dir runs/demo-dense] [--seed 0]      (make demo-dense)

Pretrains a small XCiT on scenes without labels. Evaluates it, and the same architecture with random weights, with the
same commands. Prints each command. Writes results.json and the pictures of each task. The last line is results.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from against import exit_on_sigterm
from demo import run

from dino_xcit import safe_load
from dino_xcit.models import build_backbone
from dino_xcit.runtime import atomic
from eval.table import table

ROWS = {
    "knn_segmentation": ("k-NN segmentation, frozen, mIoU", "miou", "knn.json"),
    "linear_segmentation": ("linear segmentation, frozen, mIoU", "miou", "segment/results.json"),
    "detection": ("Faster R-CNN, 300 steps, box AP50", "box_ap50", "detect/results.json"),
    "finetune_10pct": ("fine-tuning on 10% of the labels, top-1", "top1", "finetune/results.json"),
}
"""Title, key and file of each row."""
# Small enough for 2 CPU cores; docs/downstream.md has the settings for real data. At 96 and 64 pixels, objects have the
# size that they have in the crops of pretraining.
KNN = "--size 96 --memory 20000"
SEGMENT = (
    "--recipe linear-40k --short-side 96 --crop-size 96 --steps 200 --warmup-steps 20 --batch-size-per-gpu 16 "
    "--eval-every 0"
)
DETECT = (
    "--recipe mask-rcnn-1x --model faster-rcnn --fpn-width 64 --box-head-width 256 --rois 64 --proposals 200 "
    "--short-sides 96 --long-side 96 --test-side 96 --crop-probability 0 --batch-size-per-gpu 4 --steps 300 "
    "--warmup-steps 30 --lr 1e-3 --lr-reference-batch 0 --eval-every 0 --draw-score 0.25"
)
FINETUNE = (
    "--recipe own-data --data-path sample:scene-objects --train-share 0.1 --image-size 64 --eval-crop-ratio 1 "
    "--crop-scale 0.5 1 --auto-augment= --erasing 0 --epochs 10 --warmup-epochs 1 --batch-size-per-gpu 8 --lr 3e-4 "
    "--lr-reference-batch 0 --layer-decay 1 --eval-every 0"
)


def main() -> None:
    """Run the demo and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo-dense"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder, seed = options.output_dir, ("--seed", str(options.seed))
    exit_on_sigterm()  # so that subprocess.run kills the running command
    started = time.perf_counter()
    scenes = folder / "scenes"
    run("-m", "dino_xcit.data", "scenes", scenes)
    run("run_pretrain.py", "--recipe", "scenes", "--data-path", scenes / "images" / "train", *seed,
        "--output-dir", folder, "--resume", "never")  # fmt: skip
    pretraining = time.perf_counter() - started
    write_untrained(folder / "checkpoint.pth", folder / "untrained.pth", options.seed)

    models = {"pretrained": folder / "checkpoint.pth", "untrained": folder / "untrained.pth"}
    rows: dict[str, dict[str, float]] = {name: {} for name in ROWS}
    for model, weights in models.items():
        out = folder / model
        given = ("--weights", weights, "--data-path", scenes)
        trained = (*seed, "--resume", "never", "--output-dir")
        pictures = ("--json", out / "knn.json", "--out", out / "knn.png")
        run("-m", "eval.dense", "knn", *KNN.split(), *given, *pictures)
        run("run_segment.py", *SEGMENT.split(), *given, *trained, out / "segment")
        run("run_detect.py", *DETECT.split(), *given, *trained, out / "detect")
        run("run_finetune.py", *FINETUNE.split(), *given[:2], *trained, out / "finetune")
        for row, (_, key, file) in ROWS.items():
            found = json.loads((out / file).read_text())["results"]
            rows[row][model] = round(float(found[key]), 2)
    seconds = time.perf_counter() - started

    lines = [[title, *(f"{rows[row][model]:.1f}" for model in models)] for row, (title, *_) in ROWS.items()]
    print("\n" + table(["%", *models], lines))
    print(f"{seconds:.0f} s in total, {pretraining:.0f} s for scenes and pretraining; pictures: {folder}\n")
    results = {"rows": rows, "seed": options.seed, "seconds": round(seconds, 1)}
    (folder / "results.json").write_text(json.dumps(results) + "\n")
    print(json.dumps(results))


def write_untrained(checkpoint: Path, file: Path, seed: int) -> None:
    """Write a checkpoint of the same architecture and transform with random weights."""
    stored = safe_load.read(checkpoint)
    torch.manual_seed(seed)
    content = {name: stored[name] for name in ("args", "eval_transform")}
    atomic.write_torch(file, content | {"backbone": build_backbone(stored["args"]["arch"]).state_dict()})


if __name__ == "__main__":
    main()
