"""Draw docs/flow.png: one training step and what follows it.   python docs/draw_flow.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK = "#22303c"
COLOURS = {"data": "#dcecf7", "student": "#fde9c9", "teacher": "#dff0d8", "loss": "#f6d8d8", "after": "#e8e2f3"}


def box(axis: Axes, x: float, y: float, width: float, height: float, kind: str, title: str, text: str) -> None:
    """A rounded box with its lower left corner at (x, y)."""
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.12", fc=COLOURS[kind], ec=INK
    )
    axis.add_patch(shape)
    axis.text(
        x + width / 2, y + height - 0.27, title, ha="center", va="center", fontsize=10.5, weight="bold", color=INK
    )
    axis.text(x + width / 2, y + (height - 0.42) / 2, text, ha="center", va="center", fontsize=8.6, color=INK)


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], label: str = "", bend: float = 0.0) -> None:
    """An arrow with a label beside its middle."""
    style = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=13, color=INK, lw=1.2, connectionstyle=f"arc3,rad={bend}"
    )
    axis.add_patch(style)
    if label:
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
        axis.text(middle[0], middle[1] + 0.13, label, ha="center", fontsize=8, color=INK, style="italic")


def main() -> None:
    """Draw the picture beside this file."""
    figure, axis = plt.subplots(figsize=(13, 6.2))
    axis.set_xlim(0, 13.4)
    axis.set_ylim(0, 6.4)
    axis.axis("off")
    box(axis, 0.1, 3.3, 2.1, 1.6, "data", "Source", "folder, list, sample,\ntorchvision\nread(i) -> bytes")
    box(
        axis,
        2.8,
        3.3,
        2.4,
        1.6,
        "data",
        "Multi-crop",
        "2 global + N local views\nfrom (seed, epoch, image)\nuint8, one tensor a size",
    )
    box(axis, 5.9, 4.6, 3.0, 1.5, "student", "Student", "backbone a crop size,\nhead over all views\n[V*B, K] logits")
    box(
        axis,
        5.9,
        2.0,
        3.0,
        1.5,
        "teacher",
        "Teacher (no gradient)",
        "global views only,\ntrain mode, own BatchNorm\n[2*B, K] logits",
    )
    box(
        axis,
        9.7,
        3.3,
        3.4,
        1.6,
        "loss",
        "DINO loss",
        "-sum q log p over pairs of views\nq = softmax((t - centre) / T)\np = softmax(s / 0.1)",
    )
    arrow(axis, (2.25, 4.1), (2.75, 4.1))
    arrow(axis, (5.25, 4.4), (5.85, 5.2))
    arrow(axis, (5.25, 3.8), (5.85, 2.9))
    arrow(axis, (8.95, 5.2), (9.65, 4.5))
    arrow(axis, (8.95, 2.8), (9.65, 3.7))
    arrow(axis, (6.6, 4.55), (6.6, 3.55))
    axis.text(6.7, 4.03, "EMA of the parameters", fontsize=8, style="italic", color=INK, va="center")
    arrow(axis, (11.4, 4.95), (8.2, 6.13), bend=0.22)
    axis.text(10.6, 5.95, "finite? clip, AdamW", fontsize=8, style="italic", color=INK)
    arrow(axis, (8.95, 2.2), (11.4, 3.25), bend=0.28)
    axis.text(10.35, 2.15, "centre <- 0.9 centre + 0.1 mean", fontsize=8, style="italic", color=INK)
    box(
        axis,
        0.1,
        0.2,
        3.0,
        1.3,
        "after",
        "Checkpoint",
        "student, teacher, optimizer,\ncentre, step, settings, transform",
    )
    box(axis, 3.7, 0.2, 3.0, 1.3, "after", "Features", "frozen teacher backbone, cached\nby weights, data, transform")
    box(axis, 7.3, 0.2, 1.75, 1.3, "after", "k-NN", "exact faiss,\nrun_knn.py")
    box(axis, 9.3, 0.2, 1.75, 1.3, "after", "Linear probe", "grid on one pass,\nrun_linear.py")
    box(axis, 11.3, 0.2, 1.85, 1.3, "after", "Retrieval", "vectors + index,\nrun_extract.py")
    arrow(axis, (5.85, 2.5), (1.6, 1.55), bend=0.16)
    arrow(axis, (3.15, 0.85), (3.65, 0.85))
    arrow(axis, (6.75, 0.85), (7.25, 0.85))
    arrow(axis, (6.3, 1.53), (9.9, 1.53), bend=-0.13)
    arrow(axis, (5.6, 1.53), (12.0, 1.53), bend=-0.1)
    figure.savefig(Path(__file__).with_name("flow.png"), dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
