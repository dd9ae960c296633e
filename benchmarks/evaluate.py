"""Time of extraction, k-NN and linear probe of one checkpoint with the user commands.

    python benchmarks/evaluate.py --weights runs/demo/checkpoint.pth [--limit 120]

The three runners use their defaults on the checkpoint's own data, and share an initially empty feature cache. CPU time
of all processes is listed next to wall time, because it varies less with other load. The last line is one JSON object.
Exit code 1: the total exceeds the limit.
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

COMMANDS = {
    "extract": ["run_extract.py", "--output-dir", "{folder}/vectors"],
    "knn": ["run_knn.py"],
    "linear": ["run_linear.py", "--output-dir", "{folder}/linear"],
}


def processor_seconds() -> float:
    """Return the CPU seconds of all finished child processes."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="checkpoint trained on labelled data")
    parser.add_argument("--limit", type=float, default=120.0, help="maximum wall time in seconds")
    given = parser.parse_args()
    seconds: dict[str, tuple[float, float]] = {}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        shared = ["--weights", str(given.weights.absolute()), "--cache-dir", f"{folder}/features"]
        for name, command in COMMANDS.items():
            script, *flags = [word.format(folder=folder) for word in command]
            words = [*shared, *flags, "--json", f"{folder}/{name}.json"]
            print(f"\n$ python {script} {shlex.join(words)}", flush=True)
            clock, processor = time.perf_counter(), processor_seconds()
            status = subprocess.run([sys.executable, str(ROOT / script), *words], cwd=ROOT, check=False).returncode
            if status:
                sys.exit(status)
            seconds[name] = time.perf_counter() - clock, processor_seconds() - processor
            results[name] = json.loads(Path(folder, f"{name}.json").read_text())
    total = sum(clock for clock, _ in seconds.values())
    seconds["all"] = total, sum(processor for _, processor in seconds.values())
    rows = [[name, f"{clock:.1f}", f"{processor:.1f}"] for name, (clock, processor) in seconds.items()]
    print(f"\n{table(['command', 'seconds', 'CPU seconds'], rows)}\n")
    if total > given.limit:
        print(f"too slow: {total:.1f} s, expected at most {given.limit:g} s", file=sys.stderr, flush=True)
    figures = {
        "seconds": {name: clock for name, (clock, _) in seconds.items()},
        "processor_seconds": {name: processor for name, (_, processor) in seconds.items()},
        "total": total,
        "limit": given.limit,
        "knn_top1": next(row["top1"] for row in results["knn"]["results"] if row["k"] == 10),
        "linear_top1": results["linear"]["results"]["grid"]["top1"],
    }
    print(json.dumps(figures))
    sys.exit(int(total > given.limit))


if __name__ == "__main__":
    main()
