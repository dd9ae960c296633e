"""What a run says about itself: a progress bar, JSON lines (the truth), TensorBoard beside them, and curves."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

Record = Mapping[str, float | int | str]


class MetricsWriter:
    """Appends records to ``metrics.jsonl`` and mirrors their numbers to TensorBoard."""

    def __init__(self, folder: Path, from_step: int) -> None:
        """Records of steps after ``from_step`` are dropped: a resumed run writes them anew."""
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        kept = [record for record in read_metrics(self.path) if int(record["step"]) <= from_step]
        aside = self.path.with_name(".metrics.jsonl.tmp")
        aside.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(aside, self.path)
        self._file = open(self.path, "a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=from_step + 1)

    def write(self, kind: str, step: int, values: Record) -> None:
        """One record: ``kind`` is ``step`` or ``epoch``."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


class Progress:
    """A bar with images/s, the share of time spent waiting for data, and the time left.

    On a terminal it redraws; into a file it writes a line every 15 s.
    """

    def __init__(self, total_steps: int, done: int, images_a_step: int, shown: bool) -> None:
        self._images_a_step = images_a_step
        self._bar = tqdm(
            total=total_steps,
            initial=done,
            unit="step",
            disable=not shown,
            file=sys.stderr,
            dynamic_ncols=sys.stderr.isatty(),
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
            ascii=not sys.stderr.isatty(),
            bar_format="{desc}{percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} [{elapsed} < ETA {remaining}{postfix}]",
        )
        self._since, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def step(self, waited: float) -> None:
        """One step is done, ``waited`` seconds of it for data."""
        self._steps += 1
        self._waited += waited
        self._bar.update()

    def rates(self) -> dict[str, float]:
        """images/s and data-wait share since the last call."""
        now = time.perf_counter()
        span = max(now - self._since, 1e-9)
        rates = {"images_per_s": self._steps * self._images_a_step / span, "data_wait": self._waited / span}
        self._since, self._steps, self._waited = now, 0, 0.0
        return rates

    def show(self, epoch: int, values: Mapping[str, float]) -> None:
        """Put figures on the bar."""
        self._bar.set_description_str(f"epoch {epoch} ", refresh=False)
        self._bar.set_postfix_str(
            f"{values['images_per_s']:.0f} img/s, data wait {100 * values['data_wait']:.0f}%, loss {values['loss']:.3f}",
            refresh=False,
        )

    def pause(self) -> None:
        """Leave the time until the next step out of the rates (a checkpoint, a measurement)."""
        self._since, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


def draw_curves(metrics: Path, picture: Path) -> None:
    """Loss, entropy and KL, feature spread, learning rate and k-NN of a run, as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read_metrics(metrics)
    steps = [record for record in records if record["kind"] == "step"]
    epochs = [record for record in records if record["kind"] == "epoch"]
    panels = [
        ("Cross-entropy = entropy + KL (nats)", steps, ["loss", "teacher_entropy", "kl"]),
        ("Feature spread (1: even, 0: collapsed)", steps, ["feature_std"]),
        ("k-NN top-1 while training (%)", epochs, ["knn_top1"]),
        ("Images a second", steps, ["images_per_s"]),
    ]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axis, (title, rows, names) in zip(axes.flat, panels, strict=True):
        drawn = False
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=name.replace("_", " "), marker="." if len(points) < 60 else "")
                drawn = True
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if drawn and len(names) > 1:
            axis.legend()
        if not drawn:
            axis.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axis.transAxes, color="gray")
        if names == ["feature_std"] or names == ["images_per_s"]:
            axis.set_ylim(bottom=0)
    aside = picture.with_name(f".{picture.name}")
    figure.savefig(aside, dpi=110, format="png")
    plt.close(figure)
    os.replace(aside, picture)
