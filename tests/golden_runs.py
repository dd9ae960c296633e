"""Commands that create the golden files: ``python tests/golden_runs.py`` rewrites tests/golden/.

The files come from the code of 0.1; test_golden.py checks that later code computes the same numbers. Rewrite them only
when a number is meant to change. The commands use public interfaces: the runners' command lines, ``load_backbone`` and
``extract``.
"""

from __future__ import annotations

import dino_xcit  # noqa: F401  # isort: skip  # before torch

import contextlib
import itertools
import json
import runpy
import shutil
import signal
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dino_xcit.weights import load_backbone
from eval.features import extract

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"

# ---- commands; all paths are relative to the working directory

HERE = ("--device", "cpu", "--num-workers", "0")
TINY = (
    *HERE, "--recipe", "dino", "--arch", "xcit_pico_4_p4", "--out-dim", "32",
    "--head-hidden-dim", "16", "--head-bottleneck-dim", "8",
    "--global-crops-size", "16", "--local-crops-size", "8", "--local-crops-number", "2", "--batch-size-per-gpu", "4",
    "--epochs", "4", "--lr", "0.002", "--lr-reference-batch", "0", "--warmup-epochs", "0", "--log-every", "1",
)  # fmt: skip
"""Flags of a run with 12 steps per epoch on the 48 training images."""

LOSSES = tuple(
    flags.split()
    for flags in (
        "--precision fp32 --drop-path-rate 0.1 --warmup-epochs 1 --teacher-temp 0.07 --warmup-teacher-temp-epochs 2",
        "--precision fp32 --centering sinkhorn_knopp --koleo-weight 0.1 --norm-last-layer false",
        "--precision fp32 --accumulation-steps 2 --clip-mode global --clip-grad 0.5",
        "--precision fp32 --optimizer lars --use-bn-in-head true --clip-grad 0",
        "--precision fp32 --optimizer sgd --data-path sample:fashion-mnist --knn-every 0",
        "--precision bf16 --knn-every 0",
    )
)
"""Flags of the runs whose losses are stored. bf16 has no k-NN: a small error can change a neighbour."""

STEP_METRICS = ("loss", "gradient_norm", "teacher_entropy", "kl", "feature_std")

WEIGHTS = "run/checkpoint.pth"
MEASURE = ("--weights", WEIGHTS, *HERE, "--no-cache")
TWO_STEPS = ("run_pretrain.py", "--data-path", "photos", *TINY, "--max-steps", "2", "--precision", "fp32")
"""Callers append ``--output-dir FOLDER``."""
COMMANDS: dict[str, tuple[str, ...]] = {
    "knn": (
        "run_knn.py", *MEASURE, "--data-path", "photos", "--ks", "1", "3", "10", "--temperatures", "0.07", "0.5",
        "--few-shot", "2", "4", "--draws", "3", "--baselines",
    ),
    "linear": (
        "run_linear.py", *MEASURE, "--data-path", "photos", "--batch-size", "8", "--epochs", "3", "--lr", "3",
        "--lrs", "1", "10", "--holdout", "0.25", "--features", "cls", "last2",
        "--logreg", "--logreg-cs", "0.1", "10", "--output-dir", "probe",
    ),
    "extract": ("run_extract.py", *MEASURE, "--data-path", "photos/val", "--output-dir", "collection"),
    "query": (
        "run_extract.py", "--query", "photos/train/3/4.png", "--index", "collection", "--top", "5", "--weights",
        WEIGHTS, *HERE, "--sheet", "sheet.png",
    ),
    "retrieval": (
        "run_retrieval.py", "folder", *MEASURE, "--data-path", "photos/val", "--pooling", "gem",
        "--scales", "1", "0.7071",
    ),
}  # fmt: skip
"""Evaluation commands in order; each writes NAME.json."""
COLLECTION = ("vectors.npy", "paths.txt", "metadata.json", "index.faiss")
PROBE = ("linear.pth", "logreg.pth")


def run(script: str, *words: str) -> None:
    """Run ``python SCRIPT WORDS`` in this process and the working directory, and restore the global settings."""
    before = sys.argv, torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    sys.argv = [script, *words]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{script} ended with code {end.code}") from end
    finally:
        sys.argv, precision, torch.backends.cudnn.benchmark = before
        torch.set_float32_matmul_precision(precision)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def measure(name: str) -> dict[str, Any]:
    """Run one of :data:`COMMANDS` and return its result file."""
    run(*COMMANDS[name], "--json", f"{name}.json")
    return read_json(Path(f"{name}.json"))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


# ---- images


def picture(group: int, number: int) -> NDArray[np.uint8]:
    """Return an image of 24 x 20 pixels: a pattern per group, with random shift, brightness and noise."""
    pattern = np.random.default_rng(group).uniform(60, 200, (6, 5, 3)).repeat(4, axis=0).repeat(4, axis=1)
    rng = np.random.default_rng([group, number])
    pixels = np.roll(pattern, rng.integers(0, 6, 2), axis=(0, 1)) + rng.normal(rng.uniform(-40, 40), 50, (24, 20, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def write_photos(folder: Path) -> None:
    """Write ``folder``/train and ``folder``/val with six classes: 48 and 24 images."""
    for group, number in itertools.product(range(6), range(12)):
        place = folder / ("train" if number < 8 else "val") / str(group)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(group, number)).save(place / f"{number}.png")


class TenImages:
    """Image source of ten generated images, without files."""

    url, classes, labels = "ten images", None, None

    def __len__(self) -> int:
        return 10

    def read(self, index: int) -> tuple[NDArray[np.uint8], None]:
        return picture(index % 6, 100 + index), None

    def name(self, index: int) -> str:
        return str(index)

    def fingerprint(self) -> str:
        return self.url


def ten_features(weights: str | Path) -> NDArray[np.float32]:
    """Return features of the teacher [10, D]. The transform comes from checkpoint.pth: backbone.pth stores none."""
    backbone, transform, cpu = load_backbone(weights).backbone, load_backbone(WEIGHTS).transform, torch.device("cpu")
    return extract(backbone, TenImages(), transform, cpu, num_workers=0, progress=False).features


# ---- stored results of a run


def losses(flags: list[str], folder: str, count: int = 20) -> dict[str, list[float]]:
    """Train and return the metrics of ``count`` steps and the k-NN accuracy after each epoch."""
    words = ["--data-path", "photos", *TINY, "--knn-every", "1", *flags]
    run("run_pretrain.py", *words, "--max-steps", str(count), "--output-dir", folder)
    records = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    found = {name: [row[name] for row in records if row["kind"] == "step"] for name in STEP_METRICS}
    return found | {"knn_top1": [row["knn_top1"] for row in records if "knn_top1" in row]}


def parameters(path: Path) -> dict[str, list[float]]:
    """Return the L2 norm, mean, first and last value of each tensor in a checkpoint."""
    content = torch.load(path, weights_only=True)
    return {
        name: [float(tensor.norm()), float(tensor.mean()), float(tensor.flatten()[0]), float(tensor.flatten()[-1])]
        for part in ("student", "teacher", "optimizer", "dino_loss")
        for name, tensor in tensors(content[part], part)
        if tensor.numel()
    }


def tensors(value: object, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all tensors in nested mappings, lists and tuples, with their paths."""
    if isinstance(value, torch.Tensor):
        yield path, value.detach().double()
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from tensors(inner, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from tensors(inner, f"{path}/{number}")


def unpack_weights(folder: Path) -> None:
    """Extract the golden checkpoint.pth and backbone.pth to ``folder``."""
    with tarfile.open(GOLDEN / "weights.tar.xz") as archive:
        archive.extractall(folder, filter="data")


def pack_weights(folder: Path) -> None:
    """Pack both files into one archive, because checkpoint.pth repeats most of backbone.pth.

    Drops the student and the optimizer from checkpoint.pth (5 MB); parameters.json summarises their tensors.
    """
    content = torch.load(folder / "checkpoint.pth", weights_only=True)
    torch.save({key: content[key] for key in content if key not in ("student", "optimizer")}, folder / "checkpoint.pth")
    with tarfile.open(GOLDEN / "weights.tar.xz", "w:xz", preset=9) as archive:
        for name in ("checkpoint.pth", "backbone.pth"):
            archive.add(folder / name, name)


# ---- writing the golden files


def main() -> None:
    """Rewrite tests/golden/."""
    torch.set_num_threads(1)
    shutil.rmtree(GOLDEN, ignore_errors=True)
    GOLDEN.mkdir()
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        here = str(Path.cwd())
        write_photos(Path("photos"))
        run(*TWO_STEPS, "--output-dir", "run")
        _write_json("parameters.json", parameters(Path(WEIGHTS)))
        pack_weights(Path("run"))
        np.save(GOLDEN / "features.npy", ten_features(WEIGHTS))
        _write_json("losses.json", {" ".join(flags): losses(flags, f"run{n}") for n, flags in enumerate(LOSSES)})
        for name in COMMANDS:
            _write_json(f"{name}.json", measure(name), here)
        for folder, files in (("collection", COLLECTION), ("probe", PROBE)):
            (GOLDEN / folder).mkdir()
            for file in files:
                shutil.copyfile(Path(folder, file), GOLDEN / folder / file)
        _write_json("collection/metadata.json", read_json(Path("collection/metadata.json")), here)


def _write_json(name: str, content: object, here: str = "/nowhere") -> None:
    """Write JSON below tests/golden/, with the working directory ``here`` removed from paths."""
    text = json.dumps(content, indent=1)
    (GOLDEN / name).write_text(text.replace(f"{here}/", "").replace(here, ".") + "\n")


if __name__ == "__main__":
    main()
