"""Runs that are made to fail, and healthy runs: when does the verdict name each state?

    python benchmarks/collapse.py OUT [--only NAME ...] [--steps 400] [--jobs 2]

Each run pretrains on the embedded sample (or all of Fashion-MNIST, the scenes, or squares of scikit-image's
photographs) in a process with one thread and keeps its folder in OUT; runs that are there are not repeated.
The verdict is computed from their metrics.jsonl, so that another rule can be judged without training again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dino_xcit.cli import flags_of  # noqa: E402
from dino_xcit.config import PretrainConfig  # noqa: E402
from dino_xcit.metrics import read_metrics  # noqa: E402
from dino_xcit.verdict import Judge, Verdict  # noqa: E402
from eval.table import table  # noqa: E402

QUIET: dict[str, object] = {
    "arch": "xcit_pico_4_p8", "num_workers": 0, "knn_every": 0, "knn_holdout": 0, "save_every": 0,
}  # fmt: skip
"""Settings of all runs that do not set them."""
PLAIN: dict[str, object] = {"centering": "centering", "koleo_weight": 0}
"""DINO's own means against collapse instead of the recipe's."""
FAILING: dict[str, dict[str, object]] = {
    "no centring": PLAIN | {"center_momentum": 1},
    "no sharpening": PLAIN | {"warmup_teacher_temp": 0.1, "teacher_temp": 0.1},
    "teacher temperature 1": PLAIN | {"warmup_teacher_temp": 1, "teacher_temp": 1},
    "momentum 0": PLAIN | {"momentum_teacher": 0},
    "learning rate x100": PLAIN | {"lr": 0.3},
    "learning rate x100, Sinkhorn-Knopp": {"lr": 0.3},
    "no coding rate": PLAIN | {"method": "simdino", "coding_rate_weight": 0},
    "no clipping, learning rate x30": PLAIN | {"lr": 0.1, "clip_grad": 0},
    "sgd, learning rate x1000": PLAIN | {"optimizer": "sgd", "lr": 3},
    "no learning rate": {"lr": 1e-9, "min_lr": 0},
}
PHOTOGRAPHS: dict[str, object] = {
    "data_path": "photographs", "arch": "xcit_pico_4_p8", "global_crops_size": 64, "local_crops_size": 32,
    "local_crops_number": 2, "batch_size_per_gpu": 32,
}  # fmt: skip
"""Recipe auto on squares of photographs, which :func:`write_photographs` writes into OUT."""
HEALTHY: dict[str, dict[str, object]] = {
    **{f"sample, seed {seed}": {"seed": seed} for seed in range(5)},
    **{f"centring, seed {seed}": PLAIN | {"seed": seed} for seed in range(3)},
    **{f"simdino, seed {seed}": PLAIN | {"method": "simdino", "seed": seed} for seed in range(2)},
    **{f"whole run, seed {seed}": {"seed": seed, "max_steps": 0} for seed in range(5, 7)},
    "sample-long": {"recipe": "sample-long", "arch": "xcit_micro_4_p16"},
    **{f"photographs, seed {seed}": PHOTOGRAPHS | {"seed": seed} for seed in range(2)},
    **{f"scenes, seed {seed}": {"recipe": "scenes", "seed": seed} for seed in range(3)},
}


def write_photographs(folder: Path, count: int = 2000) -> None:
    """Write random squares of the photographs that scikit-learn and scikit-image ship."""
    import numpy as np
    from PIL import Image
    from skimage import data
    from sklearn.datasets import load_sample_images

    whole = [*load_sample_images().images, data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        photograph = whole[number % len(whole)]
        side = int(generator.integers(96, 192))
        top, left = (int(generator.integers(length - side)) for length in photograph.shape[:2])
        square = Image.fromarray(photograph[top : top + side, left : left + side])
        square.resize((96, 96), Image.Resampling.BICUBIC).save(folder / f"{number:04d}.png")


def train(name: str, folder: Path, steps: int) -> None:
    """Run one scenario in a process; a run that stops early is an outcome."""
    if (folder / "done").exists():
        return
    own = {"max_steps": steps, "output_dir": folder.resolve(), "resume": "never"} | (FAILING | HEALTHY)[name]
    command = [sys.executable, str(ROOT / "run_pretrain.py"), *flags_of(QUIET | own)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "w") as output:
        ended = subprocess.run(
            command, env=environment, cwd=folder.parent, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    (folder / "done").write_text(str(ended.returncode))
    print(f"{name}: code {ended.returncode}", file=sys.stderr, flush=True)


def judge(folder: Path) -> list[tuple[int, Verdict]]:
    """Return the verdicts on a run and their steps."""
    rows, verdicts = read_metrics(folder / "metrics.jsonl"), []
    stored = next(row["settings"] for row in rows if row["kind"] == "run")
    settings: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()
    }
    one = Judge(PretrainConfig(**settings))
    for row in rows:
        if row["kind"] == "step" and one.add(row["step"], row):
            verdicts.append((row["step"], one.verdict))
    return verdicts


def main() -> None:
    """Train what is missing and print the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=[*FAILING, *HEALTHY], default=[*FAILING, *HEALTHY])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    folders = {name: given.out / name.replace(" ", "-").replace(",", "") for name in given.only}
    if any(name.startswith("photographs") for name in given.only) and not (given.out / "photographs").exists():
        write_photographs(given.out / "photographs")
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda name: train(name, folders[name], given.steps), given.only))
    rows = []
    for name in given.only:
        verdicts = judge(folders[name])
        told = "; ".join(f"{verdict.state} at step {step}" for step, verdict in verdicts)
        remedy = next((verdict.remedy for _, verdict in verdicts if verdict.remedy), "-")
        rows.append([name, "made to fail" if name in FAILING else "healthy", told or "-", remedy])
    print(table(["run", "kind", "verdicts", "remedy"], rows))
    alarms = sum(row[1] == "healthy" and row[3] != "-" for row in rows)
    missed = sum(row[1] != "healthy" and row[3] == "-" for row in rows)
    print(json.dumps({"runs": len(rows), "false_alarms": alarms, "missed": missed}))


if __name__ == "__main__":
    main()
