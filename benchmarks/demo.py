"""Demo on the embedded sample: pretraining, k-NN, linear probe and extraction.

    python benchmarks/demo.py [--output-dir runs/demo]      (make demo)

Prints and runs the user commands. Writes results.json, report.html and the files of each command to the output
directory. The last line is results.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from against import exit_on_sigterm

ROOT = Path(__file__).resolve().parent.parent
K = 10
"""Number of neighbours in the table; knn.json has the others."""
MODELS = {
    "trained": "this model",
    "untrained": "the same network, untrained",
    "pixels": "raw pixels",
    "pixels_normalised": "raw pixels, normalised",
}


def run(*arguments: str | Path) -> None:
    """Print and run a command of Python; exit with its status if it fails."""
    words = list(map(str, arguments))
    print(f"\n$ python {shlex.join(words)}", flush=True)
    status = subprocess.run([sys.executable, *words], cwd=ROOT, check=False).returncode
    if status:
        sys.exit(status)


def main() -> None:
    """Run the demo and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"))
    folder: Path = parser.parse_args().output_dir
    exit_on_sigterm()  # so that subprocess.run kills the running command
    weights = folder / "checkpoint.pth"
    started = time.perf_counter()
    run("run_pretrain.py", "--output-dir", folder, "--resume", "never")
    pretraining = time.perf_counter() - started
    run("run_knn.py", "--weights", weights, "--baselines", "--json", folder / "knn.json")
    run("run_linear.py", "--weights", weights, "--resume", "never", "--json", folder / "linear.json")
    run("run_extract.py", "--weights", weights, "--output-dir", folder / "vectors", "--overwrite")
    seconds = time.perf_counter() - started

    votes = {row["model"]: row for row in json.loads((folder / "knn.json").read_text())["results"] if row["k"] == K}
    # The learning rate of the grid probe is chosen on held-out training images.
    linear = float(json.loads((folder / "linear.json").read_text())["results"]["grid"]["top1"])
    print(f"\n{'features':30} {'k-NN top-1 (k=10)':>26} {'linear top-1':>14}")
    for model, name in MODELS.items():
        low, high = votes[model]["top1_interval"]
        accuracy = f"{votes[model]['top1']:.1f} [{low:.1f}, {high:.1f}]"
        print(f"{name:30} {accuracy:>26} {f'{linear:.1f}' if model == 'trained' else '':>14}")
    print(f"report: {folder / 'report.html'}; {seconds:.0f} s in total, {pretraining:.0f} s for pretraining\n")
    results = {
        "knn_top1": {model: round(votes[model]["top1"], 2) for model in MODELS},
        "linear_top1": round(linear, 2),
        "k": K,
        "seconds": round(seconds, 1),
        "pretraining_seconds": round(pretraining, 1),
    }
    (folder / "results.json").write_text(json.dumps(results) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
