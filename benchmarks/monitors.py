"""Share of the training time that monitors, verdict and epoch-end metrics take, and that of the online probe.

    python benchmarks/monitors.py [--device cpu|cuda] [--only sample s12] [--steps 20] [--batch 4]

Trains some steps and times the step and everything that observes it in the same loop; logged steps are every tenth. The
metrics of an epoch end are timed on some images and scaled to the number of images that the run would use, for an epoch
of the sample, and of ImageNet for XCiT-S12/16. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import run_pretrain  # noqa: E402
from dino_xcit.data import Subset  # noqa: E402
from dino_xcit.data.loader import Loader, StepSampler  # noqa: E402
from dino_xcit.recipes import parse_pretrain  # noqa: E402
from dino_xcit.representation import build_evaluator, count_images, epochs_between  # noqa: E402
from dino_xcit.train import set_numerics, train_step  # noqa: E402
from dino_xcit.verdict import Judge  # noqa: E402
from eval.table import table  # noqa: E402

RUNS = {
    "sample": (["--recipe", "sample"], 10_000, 512),
    "s12": (["--recipe", "dino", "--data-path", "sample:fashion-mnist", "--arch", "xcit_small_12_p16"], 1_281_167, 32),
}
"""Flags, images of an epoch, and images on which the metrics of an epoch end are timed."""
EVERY = 10
"""Steps between logged steps."""


def shares(name: str, device: torch.device, given: argparse.Namespace) -> dict[str, Any]:
    """Return seconds of a step, and of each observation per step."""
    flags, images, probed = RUNS[name]
    if name != "sample":
        flags = [*flags, "--batch-size-per-gpu", str(given.batch)]
    config = parse_pretrain([*flags, "--device", device.type, "--knn-every", "1", "--knn-holdout", "100"]).config
    set_numerics(config, device)
    job = run_pretrain.build_job(config, {}, device)
    sampler = StepSampler(len(job.dataset.source), config.batch_size_per_gpu, seed=config.seed)
    sampler.stop_step = given.steps + 2
    schedules = job.schedules(config, sampler.steps_per_epoch, sampler.global_batch)
    monitors, probe = job.observers
    judge = Judge(config)
    spent = {"step": 0.0, "monitors": 0.0, "verdict": 0.0, "probe": 0.0}

    def timed(part: str, work: Callable[..., Any], *arguments: Any) -> Any:
        began = time.perf_counter()
        found = work(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent[part] += time.perf_counter() - began
        return found

    for number, batches in enumerate(Loader(job.dataset, sampler, 0, device).steps(1), start=-1):
        if number == 1:  # the first two steps allocate memory and compile
            spent = dict.fromkeys(spent, 0.0)
        result = timed("step", train_step, job.state, batches, schedules, config)
        timed("monitors", monitors.on_step, result, batches[0])
        timed("probe", probe.on_step, result, batches[0])
        if number % EVERY == 0:
            metrics = result.metrics(job.state.method)  # as without monitors
            metrics |= timed("monitors", monitors.metrics)
            timed("verdict", judge.add, number, metrics)
    per_step = {part: seconds / given.steps for part, seconds in spent.items()}

    few = Subset(job.dataset.source, np.arange(probed))
    evaluator = build_evaluator(config, few, device)
    evaluator.measure(job.state.method)
    began = time.perf_counter()
    evaluator.measure(job.state.method)
    per_image = (time.perf_counter() - began) / probed
    steps = images / config.batch_size_per_gpu * epochs_between(config, images)
    epoch = per_image * count_images(config, images) / steps
    per_step["epoch end"] = epoch
    observed = sum(per_step[part] for part in ("monitors", "verdict", "epoch end"))
    return {
        "run": name,
        **per_step,
        "share": observed / per_step["step"],
        "probe share": per_step["probe"] / per_step["step"],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4, help="images of a step of s12")
    given = parser.parse_args()
    rows = [shares(name, torch.device(given.device), given) for name in given.only]
    parts = ["step", "monitors", "verdict", "epoch end", "probe"]
    cells = [
        [
            row["run"],
            *(f"{1e3 * row[part]:.2f}" for part in parts),
            *(f"{100 * row[one]:.2f} %" for one in ("share", "probe share")),
        ]
        for row in rows
    ]
    print(table(["run", *(f"{part}, ms / step" for part in parts), "share", "of the probe"], cells))
    print(json.dumps({"device": given.device, "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
