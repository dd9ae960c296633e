"""The figure of resolution.json: time and memory against resolution, as in the XCiT paper.

    python benchmarks/resolution_figure.py [DIR]

draws DIR/resolution.png (benchmarks/) again from what benchmarks/resolution.py measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullLocator

STYLES = {
    "auto": ("-", "o", "this project"),
    "direct": (":", ".", "this project, direct path only"),
    "timm": ("--", "x", "timm"),
}
PANELS = [("fp32", "seconds"), ("bf16", "seconds"), ("fp32", "peak_MB"), ("bf16", "peak_MB")]


def draw(result: dict[str, Any], path: Path) -> None:
    """A row of panels for the forward pass, one for training; a colour a network, a line style a contender."""
    rows = result["networks"]
    figure, axes = plt.subplots(2, len(PANELS), figsize=(17, 8), sharex=True, layout="constrained")
    sides = sorted({row["side"] for row in rows})
    for line, training in enumerate((False, True)):
        for axis, (precision, quantity) in zip(axes[line], PANELS, strict=True):
            shown = [row for row in rows if row["precision"] == precision and row["training"] == training]
            for colour, name in enumerate(dict.fromkeys(row["network"] for row in rows)):
                for contender, (style, marker, who) in STYLES.items():
                    points = [
                        (row["side"], row[quantity])
                        for row in shown
                        if (row["network"], row["contender"]) == (name, contender) and quantity in row
                    ]
                    if points:
                        label = f"{name}, {who}"
                        axis.plot(*zip(*points, strict=True), style, marker=marker, color=f"C{colour}", label=label)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(sides, [str(side) for side in sides])
            axis.xaxis.set_minor_locator(NullLocator())
            axis.grid(alpha=0.3)
            what = "seconds" if quantity == "seconds" else "peak memory, MB"
            axis.set_title(f"{'training' if training else 'forward'}, {precision}: {what}")
            axis.set_xlabel("pixels a side")
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"{result['device_name']}, batch {result['batch']}")
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent
    draw(json.loads((folder / "resolution.json").read_text()), folder / "resolution.png")
