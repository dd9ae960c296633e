"""Extraction, k-NN and linear probe of one checkpoint, as a user types them: seconds of each and of all, and a bar.

    python benchmarks/evaluate.py --weights runs/demo/checkpoint.pth [--limit 120]

What they write goes to an empty folder, so that nothing was kept from before: the three runners, with their defaults on
the images that the checkpoint was trained on (the embedded sample of a demo: 12,000 and 3,000), share only what they
keep for each other. Seconds are of the clock; beside them those of the processor, of all processes, which other work
on the machine changes little. The last line is one JSON object. Exit code 1: all of it took longer than the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from eval.table import table  # noqa: E402

LIMIT = 120.0
"""Seconds of the clock on 2 cores that all of it may take."""
K = 10
"""Neighbours of the figure in the table, as in benchmarks/demo.py."""


def run(script: str, weights: Path, folder: Path, *flags: str) -> tuple[dict[str, Any], float, float]:
    """Type a command, and end as it ends if it fails.

    Returns:
        Its result file, seconds of the clock, seconds of the processor.
    """
    file = folder / f"{Path(script).stem}.json"
    words = [script, "--weights", str(weights.absolute()), "--cache-dir", str(folder / "features"), *flags]
    words += ["--json", str(file)]
    print(f"\n$ python {shlex.join(words)}", flush=True)
    clock, processor = time.perf_counter(), _processor_seconds()
    done = subprocess.run([sys.executable, str(ROOT / script), *words[1:]], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    card: dict[str, Any] = json.loads(file.read_text())
    return card, time.perf_counter() - clock, _processor_seconds() - processor


def _processor_seconds() -> float:
    """Of all commands that have ended, and their processes."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def main() -> None:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="a checkpoint that remembers labelled images")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of the clock that all of it may take")
    given = parser.parse_args()
    if not given.weights.is_file():
        parser.error(f"{given.weights} is no file: make demo leaves one in runs/demo/checkpoint.pth")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        extract = run("run_extract.py", given.weights, folder, "--output-dir", str(folder / "vectors"))
        knn = run("run_knn.py", given.weights, folder)
        linear = run("run_linear.py", given.weights, folder, "--output-dir", str(folder / "linear"))

    votes = next(row for row in knn[0]["results"] if row["k"] == K)
    grid, epochs = linear[0]["results"]["grid"], linear[0]["protocol"]["epochs"]
    found = {
        "extract": f"{extract[0]['count']:,} vectors of {extract[0]['dimension']}",
        "knn": f"top-1 {votes['top1']:.1f} (k = {K})",
        "linear": f"top-1 {grid['top1']:.1f} (grid, {epochs} epochs)",
    }
    seconds = {name: (clock, used) for name, (_, clock, used) in zip(found, (extract, knn, linear), strict=True)}
    total, processor = (sum(column) for column in zip(*seconds.values(), strict=True))
    rows = [[name, f"{clock:.1f}", f"{used:.1f}", found[name]] for name, (clock, used) in seconds.items()]
    rows.append(["all", f"{total:.1f}", f"{processor:.1f}", f"at most {given.limit:g} s"])
    print(f"\n{table(['command', 'seconds', 'of the processor', 'found'], rows)}\n")
    figures = {
        "seconds": {name: round(clock, 1) for name, (clock, _) in seconds.items()},
        "processor_seconds": {name: round(used, 1) for name, (_, used) in seconds.items()},
        "total": round(total, 1),
        "limit": given.limit,
        "cores": len(os.sched_getaffinity(0)),
        "knn_top1": round(votes["top1"], 2),
        "linear_top1": round(grid["top1"], 2),
        "linear_epochs": epochs,
        "weights": linear[0]["weights"]["hash"],
        "versions": linear[0]["versions"],
    }
    within = total <= given.limit
    if not within:
        print(f"too slow: {total:.1f} s, expected at most {given.limit:g} s", file=sys.stderr, flush=True)
    print(json.dumps(figures))
    sys.exit(0 if within else 1)


if __name__ == "__main__":
    main()
