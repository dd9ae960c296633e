"""The whole product on the embedded sample: pretrain, k-NN, linear probe, extraction; a table, curves and figures.

    python benchmarks/demo.py [--output-dir runs/demo]      (make demo)

Runs the commands that a user would type, one after the other, and prints each. Leaves results.json, curves.png and the
files of each command in the output directory. The last line is results.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
K = 10
"""Neighbours of the figure in the table; knn.json has the others."""


def run(script: str, *arguments: str | Path) -> None:
    """Type a command; end as it ends if it fails."""
    words = [script, *map(str, arguments)]
    print(f"\n$ python {shlex.join(words)}", flush=True)
    status = subprocess.run([sys.executable, str(ROOT / script), *words[1:]], cwd=ROOT, check=False).returncode
    if status:
        sys.exit(status)


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"))
    folder: Path = parser.parse_args().output_dir
    weights = folder / "checkpoint.pth"
    started = time.perf_counter()
    run("run_pretrain.py", "--output-dir", folder, "--resume", "never")
    trained_after = time.perf_counter() - started
    run("run_knn.py", "--weights", weights, "--baselines", "--json", folder / "knn.json")
    run("run_linear.py", "--weights", weights, "--resume", "never", "--json", folder / "linear.json")
    run("run_extract.py", "--weights", weights, "--output-dir", folder / "vectors", "--overwrite")
    seconds = time.perf_counter() - started

    votes = {row["model"]: row for row in json.loads((folder / "knn.json").read_text())["results"] if row["k"] == K}
    linear: dict[str, Any] = json.loads((folder / "linear.json").read_text())["results"]
    names = {
        "trained": "this model",
        "untrained": "the same network, untrained",
        "pixels": "raw pixels",
        "pixels_normalised": "raw pixels, normalised",
    }
    print(f"\n{'features':30} {'k-NN top-1 (k=10)':>26} {'linear top-1':>14}")
    for model, name in names.items():
        low, high = votes[model]["top1_interval"]
        accuracy = f"{votes[model]['top1']:.1f} [{low:.1f}, {high:.1f}]"
        print(f"{name:30} {accuracy:>26} {f'{linear_top1(linear):.1f}' if model == 'trained' else '':>14}")
    print(f"curves: {folder / 'curves.png'}; {seconds:.0f} s in all, {trained_after:.0f} s of them pretraining\n")
    results = {
        "knn_top1": {model: round(votes[model]["top1"], 2) for model in names},
        "linear_top1": round(linear_top1(linear), 2),
        "k": K,
        "seconds": round(seconds, 1),
        "pretraining_seconds": round(trained_after, 1),
    }
    (folder / "results.json").write_text(json.dumps(results) + "\n")
    print(json.dumps(results))


def linear_top1(results: dict[str, Any]) -> float:
    """The honest figure of the linear probe: learning rate chosen on held-out training images, last epoch."""
    return float(results["grid"]["top1"])


if __name__ == "__main__":
    main()
