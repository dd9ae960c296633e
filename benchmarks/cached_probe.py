"""How far run_linear.py --cached is from the full protocol, on the same weights and images.

    python benchmarks/cached_probe.py --weights runs/demo/checkpoint.pth [--epochs 16] [--kept 1 4]

For crops as the settings choose them for these images, and for the published ones (0.08 to 1 of the area): the full
protocol, then --cached with each number of kept epochs. Differences are of the same validation images, in percentage
points, with 95% paired bootstrap intervals. Seconds are of processor time, of all processes. The last line is a JSON
object.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.results import unpack
from eval.stats import paired_interval
from eval.table import table

ROOT = Path(__file__).resolve().parent.parent


def probe(folder: Path, words: list[str]) -> dict[str, Any]:
    """A probe's result file, and the processor time that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    file = folder / "linear.json"
    command = [sys.executable, str(ROOT / "run_linear.py"), *words, "--output-dir", str(folder), "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(done.returncode)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    card: dict[str, Any] = json.loads(file.read_text())
    return {"figures": card["figures"], "seconds": round(seconds, 1), "crop_scale": card["protocol"]["crop_scale"]}


def hits(found: dict[str, Any], classifier: str) -> NDArray[np.bool_]:
    """Which validation images a classifier recognised after its last epoch."""
    wanted = {"classifier": classifier, "epoch": "last"}
    figure = next(one for one in found["figures"] if one["settings"] == wanted)
    return unpack(figure["hits"], figure["images"])


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--kept", type=int, nargs="+", default=[1, 4])
    arguments = parser.parse_args()
    rows: list[list[str]] = []
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        for crops in ([], ["--crop-scale", "0.08", "1"]):
            words = ["--weights", arguments.weights, "--epochs", str(arguments.epochs), *crops]
            full: dict[str, Any] | None = None
            for kept in (0, *arguments.kept):
                folder = Path(place) / f"{len(records)}"
                cached = ["--cached", "--cached-epochs", str(kept)] if kept else []
                found = probe(folder, [*words, *cached, "--cache-dir", str(folder / "features")])
                full = full or found
                name = f"crops {found['crop_scale'][0]:g}-{found['crop_scale'][1]:g}, "
                row = [name + (f"{kept} kept" if kept else "full protocol")]
                record: dict[str, Any] = {"crop_scale": found["crop_scale"], "kept": kept, "seconds": found["seconds"]}
                for classifier in ("paper", "grid"):
                    ours, theirs = hits(found, classifier), hits(full, classifier)
                    top1, difference = 100 * float(ours.mean()), 100 * float(ours.mean() - theirs.mean())
                    low, high = paired_interval(theirs, ours)
                    row += [f"{top1:.1f}", f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]" if kept else "-"]
                    record[classifier] = {"top1": top1, "difference": difference, "interval": [low, high]}
                rows.append([*row, f"{found['seconds']:.0f}"])
                records.append(record)
                print(" ".join(rows[-1]), flush=True)
    header = ["probe", "paper's lr", "difference", "grid", "difference", "processor s"]
    print(f"\n{table(header, rows)}\n")
    print(json.dumps({"epochs": arguments.epochs, "probes": records}))


if __name__ == "__main__":
    main()
