"""Write reports: one HTML file that needs no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dino_xcit.runtime import atomic
from dino_xcit.runtime.logging import counted
from dino_xcit.verdict import FIRST_STEP, TOO_EARLY
from eval.report.contents import (
    RunRecord,
    changed_settings,
    charts_of,
    differing_settings,
    pictures_of,
    results_of,
    unreadable_images,
)

FILES = Path(__file__).parent
STARTS = 3
"""Newest starts of the run that are shown."""
PICTURE_TITLES = {
    "views": ("Views", "Some images with their crop boxes, and the crops that the networks see."),
    "attention": ("Attention of the class token", "Mean over heads; fixed images."),
    "pca": ("Patch features", "Their first three principal components as colours; fixed images."),
    "neighbours": ("Nearest neighbours", "Fixed queries on the left, then their nearest training images."),
}
"""Title and note by kind of picture."""


def write_report(runs: Sequence[RunRecord], path: Path) -> None:
    """Write a report on one run, or an overlay of several.

    Raises:
        OSError: the file cannot be written.
    """
    page = (FILES / "template.html").read_text(encoding="utf-8")
    data = json.dumps(contents(runs), separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "/*UPLOT_CSS*/": (FILES / "uPlot.min.css").read_text(encoding="utf-8"),
        "/*UPLOT_JS*/": _licence() + (FILES / "uPlot.iife.min.js").read_text(encoding="utf-8"),
        "/*DATA*/": data,  # last: file names in the data may contain another placeholder
    }
    for place, part in parts.items():
        page = page.replace(place, part, 1)
    atomic.write(path, lambda file: file.write(page.encode()))


def contents(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Return what the page shows, as plain values."""
    if len(runs) > 1:
        names = [run.name for run in runs]
        unlike = [list(row) for row in differing_settings(runs)]
        tables = [{"title": "Settings that differ", "head": ["setting", *names], "rows": unlike}]
        return {"runs": list(map(_card, runs)), "charts": charts_of(runs), "pictures": [], "tables": tables}
    (run,) = runs
    found = pictures_of(run)
    pictures = [
        {"title": title, "note": note, "pictures": found[kind]}
        for kind, (title, note) in PICTURE_TITLES.items()
        if kind in found
    ]
    return {"runs": [_card(run)], "charts": charts_of(runs), "pictures": pictures, "tables": _tables(run)}


def _card(run: RunRecord) -> dict[str, Any]:
    verdict = run.verdicts[-1] if run.verdicts else {}
    start = run.starts[-1] if run.starts else {}
    facts = [["step", f"{run.step:,} of {run.total_steps:,}" if run.total_steps else f"{run.step:,}"]]
    for metric, name, form in (
        ("knn_top1", "k-NN", "{:.1f} %"), ("probe_top1", "linear probe", "{:.1f} %"), ("top1", "top-1", "{:.1f} %"),
        ("loss", "loss", "{:.4g}"), ("images_per_s", "images/s", "{:,.0f}"),
    ):  # fmt: skip
        value = run.latest.get(metric)
        if value is not None:
            facts.append([name, form.format(value)])
    facts += [[name, str(start[name])] for name in ("arch", "images", "started") if start.get(name)]
    since = f"Since step {verdict['step']:,}. " if verdict else ""
    reason = str(verdict.get("reason", "")) or (
        f"Verdicts begin at step {FIRST_STEP}." if run.state == TOO_EARLY else ""
    )
    return {
        "name": run.name, "state": run.state, "reason": since + reason[:1].upper() + reason[1:],
        "remedy": str(verdict.get("remedy", "")), "facts": facts, "step": run.step, "total_steps": run.total_steps,
    }  # fmt: skip


def _tables(run: RunRecord) -> list[dict[str, Any]]:
    unreadable, named = unreadable_images(run)
    verdicts = [[row["step"], row["state"], row.get("reason", ""), row.get("remedy", "")] for row in run.verdicts]
    machine = ("started", "step", "host", "device", "processes", "torch", "dino_xcit", "command")
    starts = run.starts[-STARTS:]
    machines = [[name, *(str(start.get(name, "")) for start in starts)] for name in machine if starts]
    more = [[f"and {unreadable - len(named):,} more", ""]] if unreadable > len(named) else []
    tables: list[tuple[str, list[str], list[list[Any]]]] = [
        ("Results", ["file", "metric", "value"], [list(row) for row in results_of(run)]),
        ("Verdicts", ["from step", "state", "reason", "try"], verdicts),
        ("Settings that differ from the recipe", ["setting", "recipe", "run"], list(map(list, changed_settings(run)))),
        (f"Last {len(starts)} of {counted(len(run.starts), 'start')}", ["", *[""] * len(starts)], machines),
        (f"Unreadable images: {unreadable:,}", ["image", "cause"], [*map(list, named), *more]),
    ]
    return [{"title": title, "head": head, "rows": rows} for title, head, rows in tables if rows]


def _licence() -> str:
    text = (FILES / "uPlot.LICENSE").read_text(encoding="utf-8").strip()
    return f"/* uPlot (https://github.com/leeoniya/uPlot)\n{text}\n*/\n"
