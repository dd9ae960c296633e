"""What a user gets wrong, and a part of the sentence that must be said.

``{weights}``, ``{backbone}``, ``{data}``, ``{image}`` and ``{tmp}`` are filled in by test_runners.py; W is
``--weights {weights}``.
"""

from __future__ import annotations

WRONG = {
    "knn": "no weights given: add --weights FILE",
    "linear --weights {tmp}/none.pth": "there is no file",
    "extract --weights {tmp} --output-dir {tmp}/v": "is a folder",
    "knn --weights {image}": "is not a checkpoint that can be read safely",
    "knn --weights {tmp}/a.json": "a.json is a JSON file: expected weights such as",
    "knn --weights {tmp}/cut.pth": "not fit xcit_pico_4_p4: it lacks norm.weight",
    "knn W --arch xcit_smal_12_p16": "did you mean xcit_small_12_p16",
    "linear W --epoch 3": "did you mean --epochs",
    "knn W --ks 0 10": "ks is 0 10",
    "knn W --ks": "ks is empty",
    "knn W --temperatures 0.07 0.0700000001": "temperatures is 0.07 0.07",
    "knn W --seed 3": "seed is 3",
    "knn W --draws 9": "draws is 9",
    "knn W --probes 9": "probes is 9",
    "knn W --per-class classes.png": "per_class is classes.png",
    "knn W --approximate ivf": "training images, expected 1,000 or more: omit --approximate",
    "knn W --per-class {image}/classes.csv": "which cannot be written",
    "linear --holdout 1": "holdout is 1",
    "linear --crop-scale 0.5 0.2": "crop_scale is 0.5 0.2",
    "extract W --data-path {tmp}/none --output-dir {tmp}/v": "no data at",
    "extract W --data-path {tmp}/empty --output-dir {tmp}/v": "no image in",
    "knn W --data-path {tmp}/empty": "has no folder 'train'",
    "knn W --train-data {data}/train/dots --val-data {data}/val": "evaluation expects one sub-folder per class",
    "extract W --data-path {tmp}/bad --output-dir {tmp}/v": "bad.png cannot be read: not an image",
    "linear W --train-data {tmp}/train --val-data {data}/val --epochs 1 --batch-size 2 --holdout 0":
        "broken.jpg cannot be read",
    "knn --weights {backbone}": "does not name its training data",
    "linear W": "less than one global batch of 128",
    "linear W --batch-size 4 --holdout 0.01": "less than one image of any",
    "extract W --output-dir {image}": "which is not a folder",
    "extract W --output-dir /proc/none/vectors": "cannot create /proc/none",
    "extract --query {image} --index {tmp}/empty": "is no collection: expected a folder written by",
    "knn W --cache-dir {image}": "which cannot be written to",
    "knn W --json {tmp}": "which cannot be written: it is a folder; give another path",
    "knn W --json .": "json is ., which cannot be written: it is a folder",
    "linear W --json /dev/null": "cannot be written: it is no regular file; give",
}  # fmt: skip
