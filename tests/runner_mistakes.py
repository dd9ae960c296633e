"""What a user gets wrong: the runner, the words, and the part of the sentence that must be said.

``{weights}``, ``{backbone}``, ``{data}``, ``{image}`` and ``{tmp}`` are filled in by test_runners.py.
"""

from __future__ import annotations

from types import ModuleType

import run_extract
import run_knn
import run_linear

W = ["--weights", "{weights}"]
WRONG: dict[str, tuple[ModuleType, list[str], str]] = {
    "no weights": (run_knn, [], "no weights given: use --weights FILE"),
    "no such weights": (run_linear, ["--weights", "{tmp}/none.pth"], "there is no file"),
    "weights are a folder": (run_extract, ["--weights", "{tmp}", "--output-dir", "{tmp}/v"], "is a folder"),
    "weights are no checkpoint": (run_knn, ["--weights", "{image}"], "is no checkpoint that can be read safely"),
    "weights lack keys": (run_knn, ["--weights", "{tmp}/cut.pth"], "not fit xcit_pico_4_p4: it lacks norm.weight"),
    "unknown arch": (run_knn, [*W, "--arch", "xcit_smal_12_p16"], "did you mean xcit_small_12_p16"),
    "unknown flag": (run_linear, [*W, "--epoch", "3"], "did you mean --epochs"),
    "k of zero": (run_knn, [*W, "--ks", "0", "10"], "ks is 0 10"),
    "no k": (run_knn, [*W, "--ks"], "ks is empty"),
    "temperature twice": (run_knn, [*W, "--temperatures", "0.07", "0.0700000001"], "temperatures is 0.07 0.07"),
    "seed of nothing": (run_knn, [*W, "--seed", "3"], "seed is 3"),
    "draws of nothing": (run_knn, [*W, "--draws", "9"], "draws is 9"),
    "a table that is no table": (run_knn, [*W, "--per-class", "classes.png"], "per_class is classes.png"),
    "too few to approximate": (run_knn, [*W, "--approximate", "ivf"], "are searched exactly in no time: leave"),
    "nowhere for the table": (run_knn, [*W, "--per-class", "{image}/classes.csv"], "its path is no folder; choose"),
    "holdout of one": (run_linear, ["--holdout", "1"], "holdout is 1"),
    "crops the wrong way": (run_linear, ["--crop-scale", "0.5", "0.2"], "crop_scale is 0.5 0.2"),
    "no such data": (run_extract, [*W, "--data-path", "{tmp}/none", "--output-dir", "{tmp}/v"], "no data at"),
    "empty folder": (run_extract, [*W, "--data-path", "{tmp}/empty", "--output-dir", "{tmp}/v"], "no image in"),
    "data without parts": (run_knn, [*W, "--data-path", "{tmp}/empty"], "holds no folder 'train'"),
    "data without labels": (
        run_knn,
        [*W, "--train-data", "{data}/train/dots", "--val-data", "{data}/val"],
        "has no labels, which measuring needs",
    ),
    "damaged image": (
        run_extract,
        [*W, "--data-path", "{tmp}/bad", "--output-dir", "{tmp}/v"],
        "bad.png cannot be read: not an image",
    ),
    "damaged training image": (
        run_linear,
        [*W, "--train-data", "{tmp}/train", "--val-data", "{data}/val", "--epochs", "1", "--batch-size", "2",
         "--holdout", "0"],
        "broken.jpg cannot be read",
    ),
    "data unknown to the file": (run_knn, ["--weights", "{backbone}"], "does not say what it was trained on"),
    "fewer images than a batch": (run_linear, W, "fewer than one global batch of 128"),
    "holdout of no image": (run_linear, [*W, "--batch-size", "4", "--holdout", "0.01"], "less than one image of any"),
    "nowhere to write": (run_extract, W, "no output_dir given"),
    "output is a file": (run_extract, [*W, "--output-dir", "{image}"], "no folder to write to"),
    "output cannot be made": (run_extract, [*W, "--output-dir", "/proc/none/vectors"], "cannot create /proc/none"),
    "query without index": (run_extract, ["--query", "{image}"], "no index given"),
    "index is none": (run_extract, ["--query", "{image}", "--index", "{tmp}/empty"], "is no complete collection"),
    "cache is a file": (run_knn, [*W, "--cache-dir", "{image}"], "which cannot be written to"),
    "json is a folder": (run_knn, [*W, "--json", "{tmp}"], "which cannot be written: it is a folder; choose another"),
    "json is a device": (run_linear, [*W, "--json", "/dev/null"], "cannot be written: it is no regular file; choose"),
    "json's name is too long": (run_linear, [*W, "--json", f"{'x' * 251}"], "cannot be written: its name is too long;"),
}  # fmt: skip
