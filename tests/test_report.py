"""Reports: what they say, their size, and the page in a browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import CPU, build_state, tiny_config, tiny_source

import run_pretrain
from dino_xcit.errors import InputError
from dino_xcit.metrics import read_metrics
from eval.report.contents import (
    BUCKETS,
    CHARTS,
    changed_settings,
    charts_of,
    points_of,
    read_run,
    results_of,
    unlike_settings,
)
from eval.report.html import write_report
from eval.report.pictures import SHOWN, Pictures, grid

Row = dict[str, Any]


def write_run(folder: Path, rows: list[Row], **settings: Any) -> Path:
    """Write the metrics of a run."""
    start = {"kind": "run", "step": 0, "settings": settings, "total_steps": 100, "arch": "xcit_pico_4_p8"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [start, *rows]))
    return folder


def steps(count: int, **metrics: Any) -> list[Row]:
    return [{"kind": "step", "step": step, "loss": 5 / step, **metrics} for step in range(1, count + 1)]


COLLAPSE = {"kind": "verdict", "step": 60, "state": "uniform", "reason": "</script>one reason", "remedy": "try --lr 1"}


def data_of(path: Path) -> Row:
    """Return the data in a page."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(found)


def test_page_has_verdict_curves_and_settings_and_no_address(tmp_path: Path) -> None:
    rows = [*steps(70), COLLAPSE, {"kind": "epoch", "step": 70, "knn_top1": 42.25}]
    folder = write_run(tmp_path / "run", rows, recipe="sample", lr=0.5, arch="xcit_pico_4_p8")
    path = tmp_path / "page.html"
    write_report([read_run(folder)], path)
    data = data_of(path)
    (run,) = data["runs"]
    assert (run["state"], run["remedy"], run["step"], run["total_steps"]) == ("uniform", "try --lr 1", 70, 100)
    assert run["reason"] == "Since step 60. </script>one reason"
    assert ["k-NN", "42.2 %"] in run["facts"]
    assert [chart["title"] for chart in data["charts"]] == ["Accuracy, %", "Loss"]
    tables = {table["title"]: table["rows"] for table in data["tables"]}
    assert ["lr", "0.003", "0.5"] in tables["Settings that differ from the recipe"]
    page = path.read_text()
    own = page.replace((Path(run_pretrain.__file__).parent / "eval/report/uPlot.iife.min.js").read_text(), "")
    assert set(re.findall(r"https?://[\w./]+", own)) <= {"https://github.com/leeoniya/uPlot"}
    assert "src=" not in own
    assert "Leon Sorokin" in page  # the licence of uPlot


def test_curve_is_buckets_with_minimum_and_maximum_of_finite_values() -> None:
    rows = [{"step": step, "loss": value} for step, value in ((1, "nan"), (2, 4.0), (3, 2.0), (5, "inf"))]
    assert points_of(rows, "loss") == {"step": [2, 3], "mean": [4, 2], "low": [4, 2], "high": [4, 2]}
    assert points_of(rows, "kl") is None
    values = np.random.default_rng(0).random(10 * BUCKETS)
    points = points_of([{"step": step, "loss": value} for step, value in enumerate(values)], "loss")
    assert points is not None
    assert {len(column) for column in points.values()} == {BUCKETS}
    assert points["low"][3] == pytest.approx(values[30:40].min(), rel=1e-4)
    assert points["high"][3] == pytest.approx(values[30:40].max(), rel=1e-4)
    assert points["mean"][3] == pytest.approx(values[30:40].mean(), rel=1e-4)


def test_report_of_a_long_run_stays_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [name for chart in CHARTS.values() for name in chart]
    rows = [{"kind": "step", "step": 50 * row, **dict(zip(names, rng.random(len(names)), strict=True))}
            for row in range(1, 20_001)]  # fmt: skip
    folder = write_run(tmp_path / "run", rows)
    for kind in ("attention", "pca", "neighbours"):
        for epoch in range(6):
            (folder / "report").mkdir(exist_ok=True)
            noise = rng.integers(0, 256, (112, 924, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / "report" / f"{kind}-{epoch:04d}.jpg", quality=20)
    write_report([read_run(folder)], tmp_path / "page.html")
    assert 500_000 < (tmp_path / "page.html").stat().st_size < 3_000_000


def test_overlay_has_a_chart_per_metric_and_the_settings_that_differ(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / name, steps(9, kl=1.0), lr=lr, epochs=3)) for name, lr in (("a", 1), ("b", 2))
    ]
    assert unlike_settings(runs) == [("lr", "1", "2")]
    charts = charts_of(runs)
    assert [chart["title"] for chart in charts] == ["loss", "kl"]
    assert [one["label"] for one in charts[0]["series"]] == ["a", "b"]


def test_settings_are_compared_with_the_recipe_and_with_defaults(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", steps(2), recipe="sample", out_dim=4096, seed=3, flip=0.5))
    found = {name: values for name, *values in changed_settings(run)}
    assert found["seed"] == ["0", "3"]
    assert "out_dim" not in found  # as in the recipe
    assert found["koleo_weight"] == ["0.1", "0"]  # the run has the default, the recipe has not


def test_folder_without_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"metrics\.jsonl"):
        read_run(tmp_path)


def test_result_files_of_the_folder_are_listed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps(2))
    (folder / "wandb.json").write_text("{}")
    assert results_of(read_run(folder)) == []


# ---- pictures


def test_pictures_show_fixed_images_attention_patches_and_neighbours() -> None:
    config = tiny_config()
    pictures = Pictures(tiny_source(), config.eval_transform(), CPU)
    backbone = build_state(config, CPU).method.eval_backbone
    drawn = pictures.draw(backbone, main=True)
    assert drawn.keys() == {"pca", "attention", "neighbours"}
    assert drawn["attention"].size == drawn["pca"].size == (SHOWN * 116 - 4, 112)
    assert backbone.training
    again = pictures.draw(backbone, main=True)
    assert all(np.array_equal(np.asarray(drawn[kind]), np.asarray(again[kind])) for kind in drawn)
    assert pictures.draw(backbone, main=False) == {}


def test_grid_places_images_in_rows() -> None:
    colours = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255)]]
    sheet = np.asarray(grid([[Image.new("RGB", (9, 5), colour) for colour in row] for row in colours], 8, margin=2))
    assert sheet.shape == (8 + 4 + 8, 8 + 4 + 8 + 2, 3)
    assert sheet[0, 0].tolist() == [255, 0, 0]
    assert sheet[0, -1].tolist() == [0, 255, 0]
    assert sheet[-1, 0].tolist() == [0, 0, 255]
    assert sheet[-1, -1].tolist() == [255, 255, 255]


def pretrain(folder: Path, **changes: Any) -> Path:
    config = tiny_config(output_dir=str(folder), num_workers=0, log_every=1, max_steps=3, **changes)
    run_pretrain.train(config, CPU)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return pretrain(tmp_path_factory.mktemp("report") / "run")


def test_run_writes_report_with_pictures_and_its_start(run: Path) -> None:
    assert {path.stem for path in (run / "report").iterdir()} == {
        "views", "attention-0001", "pca-0001", "neighbours-0001",
    }  # fmt: skip
    data = data_of(run / "report.html")
    assert data["pictures"][0]["title"] == "Views"
    (start,) = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "run"]
    assert (start["total_steps"], start["processes"], start["arch"]) == (3, 1, "xcit_pico_4_p4")
    assert start["settings"]["out_dim"] == 48
    assert "koleo_weight" not in start["settings"]


def test_report_without_pictures_and_failures_do_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "run" / "report.html").mkdir(parents=True)  # cannot be replaced by a file
    folder = pretrain(tmp_path / "run", report_pictures=False)
    assert (folder / "checkpoint.pth").exists()
    assert not (folder / "report").exists()


# ---- the page in a browser


@pytest.fixture
def page() -> Iterator[Any]:
    """A page of Debian's Chromium; ``page.problems`` collects errors and messages of the console."""
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("needs Chromium: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        found = browser.new_page(viewport={"width": 1280, "height": 900})
        found.problems = []
        found.on("console", lambda message: found.problems.append(message.text))
        found.on("pageerror", lambda error: found.problems.append(str(error)))
        yield found
        browser.close()


@pytest.mark.browser
def test_page_draws_curves_and_hover_shows_a_value(run: Path, page: Any) -> None:
    page.goto(f"file://{(run / 'report.html').absolute()}")
    charts = page.locator(".chart")
    assert charts.count() == len(data_of(run / "report.html")["charts"]) > 8
    inked = page.evaluate(
        """() => [...document.querySelectorAll(".chart canvas")].map(canvas =>
             canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.some(value => value > 0))"""
    )
    assert len(inked) == charts.count()
    assert all(inked)
    loss = page.locator(".chart", has_text="Loss").first
    loss.locator(".u-over").hover(position={"x": 150, "y": 60})
    step, value = loss.locator(".u-legend .u-value").all_inner_texts()[:2]
    assert int(step) in (1, 2, 3)
    rows = [row["loss"] for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "step"]
    assert float(value) == pytest.approx(rows[int(step) - 1], rel=1e-3)
    assert all(page.evaluate("[...document.images].map(image => image.naturalWidth > 0)"))
    assert page.problems == []


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_the_window(tmp_path: Path, page: Any, width: int, scheme: str) -> None:
    folder = write_run(tmp_path / "run", [*steps(70), COLLAPSE], recipe="sample")
    write_report([read_run(folder)], tmp_path / "page.html")
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    page.goto(f"file://{tmp_path / 'page.html'}")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".badge").inner_text() == "uniform"
    assert "</script>one reason" in page.locator(".run").inner_text()
    red, green, blue = (int(part) for part in re.findall(r"\d+", page.evaluate(
        "getComputedStyle(document.body).backgroundColor")))  # fmt: skip
    assert (red + green + blue < 200) == (scheme == "dark")
    assert page.problems == []
