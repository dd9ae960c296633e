"""Extraction, k-NN and linear probe of one checkpoint, as a user types them: seconds of each and of all.

    python benchmarks/evaluate.py --weights runs/demo/checkpoint.pth [--limit 120]

The three runners have their defaults, on the images that the checkpoint was trained on, and share only a cache of
features that is empty at first. Beside the clock's seconds stand the processor's, of all processes: other work on the
machine changes them little. The last line is one JSON object. Exit code 1: all of it took longer than the limit.
"""

from __future__ import annotations

import argparse
import json
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

K = 10
"""Neighbours of the figure in the table, as in benchmarks/demo.py."""


def run(script: str, weights: Path, folder: Path, *flags: str) -> tuple[dict[str, Any], float, float]:
    """Type a command, and end as it ends if it fails.

    Returns:
        Its result file, seconds of the clock, seconds of the processor.
    """
    file = folder / f"{script}.json"
    words = ["--weights", str(weights.absolute()), "--cache-dir", str(folder / "features"), *flags, "--json", str(file)]
    print(f"\n$ python {script} {shlex.join(words)}", flush=True)
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    status = subprocess.run([sys.executable, str(ROOT / script), *words], cwd=ROOT, check=False).returncode
    if status:
        sys.exit(status)
    clock, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(file.read_text()), clock, processor


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="a checkpoint that remembers labelled images")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of the clock that all of it may take")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        extract = run("run_extract.py", given.weights, folder, "--output-dir", str(folder / "vectors"))
        knn = run("run_knn.py", given.weights, folder)
        linear = run("run_linear.py", given.weights, folder, "--output-dir", str(folder / "linear"))
    knn_top1 = next(row["top1"] for row in knn[0]["results"] if row["k"] == K)
    linear_top1 = linear[0]["results"]["grid"]["top1"]
    rows = {
        "extract": (*extract[1:], f"{extract[0]['count']:,} vectors"),
        "knn": (*knn[1:], f"top-1 {knn_top1:.1f} (k = {K})"),
        "linear": (*linear[1:], f"top-1 {linear_top1:.1f} (grid)"),
    }
    total, processor = (sum(row[column] for row in rows.values()) for column in (0, 1))
    shown = {**rows, "all": (total, processor, f"at most {given.limit:g} s")}
    lines = [[name, f"{clock:.1f}", f"{used:.1f}", found] for name, (clock, used, found) in shown.items()]
    print(f"\n{table(['command', 'seconds', 'of the processor', 'found'], lines)}\n")
    if total > given.limit:
        print(f"too slow: {total:.1f} s, expected at most {given.limit:g} s", file=sys.stderr, flush=True)
    figures = {
        "seconds": {name: row[0] for name, row in rows.items()},
        "processor_seconds": {name: row[1] for name, row in rows.items()},
        "total": total,
        "limit": given.limit,
        "knn_top1": knn_top1,
        "linear_top1": linear_top1,
    }
    print(json.dumps(figures))
    sys.exit(int(total > given.limit))


if __name__ == "__main__":
    main()
