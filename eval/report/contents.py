"""What a report says about a run, from the files in its folder."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dino_xcit.bounds import shown
from dino_xcit.errors import InputError, one_line
from dino_xcit.health import UNREADABLE_FILE, read_unreadable
from dino_xcit.metrics import METRICS_FILE, read_metrics
from dino_xcit.verdict import TOO_EARLY
from eval.results import read_result

PICTURE_FOLDER = "report"
"""Folder in the output directory with the pictures of :mod:`eval.report.pictures`."""
BUCKETS = 400
"""Maximum number of points of a curve; a point is the mean of a bucket of logged steps, with minimum and maximum."""
UNREADABLE_SHOWN = 10
CHARTS: dict[str, tuple[str, ...]] = {
    "Accuracy, %": ("knn_top1", "probe_top1", "top1", "top5", "miou", "box_ap", "box_ap50", "mask_ap"),
    "Loss": ("loss", "teacher_entropy", "kl", "cosine", "coding_rate"),
    "Mutual information, nats": ("mutual_information",),
    "Prototypes in use": ("prototype_perplexity", "distinct_prototypes"),
    "Feature spread, agreement of views": ("feature_std", "view_agreement"),
    "Feature dimensions": ("feature_dimensions", "rankme", "rankme_centred", "lidar", "stable_rank"),
    "Gradient norms": ("gradient_norm", "gradient_norm_stem", "gradient_norm_blocks", "gradient_norm_head"),
    "Distance of teacher and student": ("teacher_distance",),
    "Norm of the center": ("center_norm",),
    "Online probe, loss": ("probe_loss",),
    "Self-clustering": ("self_clustering",),
    "Learning rate": ("lr",),
    "Weight decay, temperature": ("weight_decay", "teacher_temp"),
    "Teacher momentum": ("momentum",),
    "Images per second": ("images_per_s",),
    "Share of time waiting for images": ("data_wait",),
    "Loader, ms per image": ("read_ms", "decode_ms", "augment_ms"),
    "Peak memory, GB": ("memory_gb",),
    "Skipped steps": ("skipped_steps",),
}
"""Metrics of each chart, by title."""
LOGARITHMIC = {*CHARTS["Gradient norms"], *CHARTS["Prototypes in use"]}

Points = dict[str, list[float]]
"""Equally long lists: ``step``, ``mean``, ``low`` and ``high``."""


@dataclass
class RunRecord:
    """A run as read from its folder."""

    folder: Path
    name: str
    starts: list[dict[str, Any]]
    """Rows of kind ``run``: one for each start or resumption."""
    verdicts: list[dict[str, Any]]
    """Rows of kind ``verdict``."""
    curves: dict[str, Points]
    """By metric."""
    latest: dict[str, float]
    """Last value of each metric."""
    step: int
    """Last logged step."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the last start."""

    @property
    def total_steps(self) -> int:
        """Steps of the whole run; 0: unknown."""
        return int(self.starts[-1].get("total_steps", 0)) if self.starts else 0

    @property
    def state(self) -> str:
        """The last verdict's state; empty for a run that is not judged, as supervised runs."""
        if self.verdicts:
            return str(self.verdicts[-1]["state"])
        return TOO_EARLY if "on_collapse" in self.settings else ""


def read_run(folder: Path) -> RunRecord:
    """Read ``metrics.jsonl`` of a run.

    Raises:
        InputError: there is none, or its rows are not those of a run.
    """
    path = folder / METRICS_FILE
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}: give the --output-dir of a run")
    rows = read_metrics(path)
    if not rows:
        found = "has no rows" if path.exists() else "does not exist"
        raise InputError(f"{path} {found}: give the --output-dir of a run (python -m eval.runs {folder} lists runs)")
    try:
        return _record_of(folder, rows)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is damaged ({type(error).__name__}: {one_line(error)}): restore it, or give another folder"
        ) from error


def _record_of(folder: Path, rows: Sequence[dict[str, Any]]) -> RunRecord:
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in ("run", "verdict", "step")}
    epochs = [row for row in rows if row["kind"] in ("epoch", "end")]
    curves: dict[str, Points] = {}
    latest: dict[str, float] = {}
    for name in (name for names in CHARTS.values() for name in names):
        values = finite_values(kinds["step"], name) or finite_values(epochs, name)
        if values:
            curves[name], latest[name] = points_of(values), values[-1][1]
    if not all(row["state"] for row in kinds["verdict"]):
        raise ValueError("a verdict has no state")
    settings = dict(kinds["run"][-1].get("settings", {})) if kinds["run"] else {}
    step = max(row["step"] for row in rows)
    return RunRecord(folder, folder.absolute().name, kinds["run"], kinds["verdict"], curves, latest, step, settings)


def finite_values(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """Return (step, value) of a metric where it is finite."""
    return [(row["step"], float(row[name])) for row in rows if name in row and math.isfinite(float(row[name]))]


def points_of(values: Sequence[tuple[int, float]]) -> Points:
    """Return a curve of at most :data:`BUCKETS` points."""
    parts = np.array_split(np.array(values), min(BUCKETS, len(values)))
    columns = {
        "step": [part[:, 0].mean() for part in parts],
        "mean": [part[:, 1].mean() for part in parts],
        "low": [part[:, 1].min() for part in parts],
        "high": [part[:, 1].max() for part in parts],
    }
    return {key: [float(f"{value:.5g}") for value in column] for key, column in columns.items()}


def changed_settings(run: RunRecord) -> list[tuple[str, str, str]]:
    """Return (setting, value of the recipe, value of the run) where they differ."""
    changed = run.starts[-1].get("changed", {}) if run.starts else {}
    return [(name, *map(format_setting, values)) for name, values in changed.items()]


def differing_settings(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """Return the settings that differ between runs, each with the value of every run."""
    names = sorted(set().union(*(run.settings for run in runs)) - {"output_dir", "resume"})
    rows = [(name, *(format_setting(run.settings.get(name, "")) for run in runs)) for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def format_setting(value: Any) -> str:
    """Format a setting; JSON has lists for tuples."""
    return shown(tuple(value) if isinstance(value, list) else value)


def unreadable_images(run: RunRecord) -> tuple[int, list[tuple[str, str]]]:
    """Return the number of unreadable images, and name and cause of the first ones."""
    rows = read_unreadable(run.folder / UNREADABLE_FILE)
    return len(rows), [(str(row.get("name")), str(row.get("cause"))) for row in rows[:UNREADABLE_SHOWN]]


def results_of(run: RunRecord) -> list[tuple[str, str, str]]:
    """Return (file, metric, value) of the result files in the folder of the run."""
    found = []
    for path in sorted(run.folder.glob("*.json")):
        try:
            result = read_result(str(path))
        except InputError:
            continue
        found += [(path.name, f"{result.measure} {one.name}", f"{one.percent:.1f}") for one in result.metrics]
    return found


def pictures_of(run: RunRecord) -> dict[str, list[tuple[str, str]]]:
    """Return (caption, data URI) of the pictures by kind, oldest first."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path in sorted((run.folder / PICTURE_FOLDER).glob("*.jpg")):
        kind, _, epoch = path.stem.partition("-")
        caption = f"after epoch {int(epoch)}" if epoch.isdecimal() else ""
        found.setdefault(kind, []).append((caption, data_uri(path.read_bytes(), "image/jpeg")))
    return found


def data_uri(content: bytes, kind: str) -> str:
    """Return bytes as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def charts_of(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return the charts: for one run its metrics by title, for several one chart for each metric of any."""
    if len(runs) == 1:
        groups: Iterable[tuple[str, tuple[str, ...]]] = CHARTS.items()
    else:
        groups = [(name.replace("_", " "), (name,)) for names in CHARTS.values() for name in names]
    charts = []
    for title, names in groups:
        series: list[dict[str, Any]] = [
            {"label": run.name if len(runs) > 1 else name.replace("_", " "), **run.curves[name]}
            for run in runs
            for name in names
            if name in run.curves
        ]
        if series and (names != ("skipped_steps",) or any(map(any, (one["high"] for one in series)))):
            logarithmic = set(names) <= LOGARITHMIC and all(min(one["low"]) > 0 for one in series)
            charts.append({"title": title, "log": logarithmic, "series": series})
    return charts
