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
from ranks import Start
from result_fixtures import hits, knn_metric, write_result
from tiny_run import CPU, build_state, sampler_of, tiny_config

import run_pretrain
from dino_xcit.data import open_source
from dino_xcit.errors import InputError
from dino_xcit.loop import Job, describe_start
from dino_xcit.metrics import read_metrics
from eval.report.contents import (
    BUCKETS,
    CHARTS,
    RunRecord,
    charts_of,
    differing_settings,
    finite_values,
    points_of,
    read_run,
    results_of,
)
from eval.report.html import write_report
from eval.report.pictures import SHOWN, Pictures, grid

Row = dict[str, Any]


def write_run(folder: Path, rows: list[Row], **settings: Any) -> Path:
    """Write the metrics of a run; the recipe has 1 for each setting."""
    changed = {name: [1, value] for name, value in settings.items()}
    start = {"kind": "run", "step": 0, "settings": settings, "changed": changed, "total_steps": 100}
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
    folder = write_run(tmp_path / "run", rows, lr=0.5)
    path = tmp_path / "page.html"
    write_report([read_run(folder)], path)
    data = data_of(path)
    (run,) = data["runs"]
    assert (run["state"], run["remedy"], run["step"], run["total_steps"]) == ("uniform", "try --lr 1", 70, 100)
    assert run["reason"] == "Since step 60. </script>one reason"
    assert ["k-NN", "42.2 %"] in run["facts"]
    assert [chart["title"] for chart in data["charts"]] == ["Accuracy, %", "Loss"]
    tables = {table["title"]: table["rows"] for table in data["tables"]}
    assert ["lr", "1", "0.5"] in tables["Settings that differ from the recipe"]
    page = path.read_text()
    own = page.replace((Path(run_pretrain.__file__).parent / "eval/report/uPlot.iife.min.js").read_text(), "")
    assert set(re.findall(r"https?://[\w./]+", own)) <= {"https://github.com/leeoniya/uPlot"}
    assert "src=" not in own
    assert "Leon Sorokin" in page  # the licence of uPlot


def test_curve_is_buckets_with_minimum_and_maximum_of_finite_values() -> None:
    rows = [{"step": step, "loss": value} for step, value in ((1, "nan"), (2, 4.0), (3, 2.0), (5, "inf"))]
    assert finite_values(rows, "loss") == [(2, 4.0), (3, 2.0)]
    assert points_of([(2, 4.0), (3, 2.0)]) == {"step": [2, 3], "mean": [4, 2], "low": [4, 2], "high": [4, 2]}
    values = np.random.default_rng(0).random(10 * BUCKETS)
    points = points_of(list(enumerate(values)))
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
    assert differing_settings(runs) == [("lr", "1", "2")]
    charts = charts_of(runs)
    assert [chart["title"] for chart in charts] == ["loss", "kl"]
    assert [one["label"] for one in charts[0]["series"]] == ["a", "b"]


def test_last_value_is_not_the_mean_of_a_bucket(tmp_path: Path) -> None:
    rows = [{"kind": "step", "step": step, "images_per_s": float(step)} for step in range(1, 3 * BUCKETS)]
    assert read_run(write_run(tmp_path / "run", rows)).latest["images_per_s"] == 3 * BUCKETS - 1


def test_start_of_a_run_has_the_settings_that_differ_from_its_recipe() -> None:
    config = tiny_config(lr=0.5, out_dim=48, epochs=3, data_path="elsewhere")
    job = Job(
        config=config, state=None, dataset=None, schedules=None, transform=None, title="", on_divergence=None,
        recipe={"out_dim": 48, "flip": 0.25},
    )  # fmt: skip
    start = describe_start(job, sampler_of(config), 60, CPU)
    changed = start["changed"]
    assert (changed["lr"], changed["flip"]) == ((5e-4, 0.5), (0.25, 0.5))
    assert changed.keys().isdisjoint({"out_dim", "data_path", "koleo_weight"})
    assert (start["settings"]["out_dim"], start["total_steps"]) == (48, 60)


def test_folder_without_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"metrics\.jsonl"):
        read_run(tmp_path)


def test_result_files_of_the_folder_are_listed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps(2))
    (folder / "wandb.json").write_text("{}")
    write_result(folder / "knn.json", knn_metric(20, hits(300)))
    assert [(file, value) for file, _, value in results_of(read_run(folder))] == [("knn.json", "75.0")]


# ---- pictures


def test_pictures_show_readable_images_attention_patches_and_neighbours(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(12):
        noise = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(photos / f"{number:02d}.png")
    (photos / "00.png").write_bytes(b"no image")  # the first of the fixed images
    config = tiny_config(output_dir=str(tmp_path / "run"), epochs=20)
    pictures = Pictures(config, open_source(str(photos), "train"), CPU)
    assert [epoch for epoch in range(20) if pictures.due(epoch)] == [0, 4, 8, 11, 15, 19]
    backbone = build_state(config, CPU).method.eval_backbone
    folder = tmp_path / "run" / "report"
    folder.mkdir(parents=True)
    (folder / "pca-0300.jpg").touch()  # of a run that is overwritten
    found = pictures.extract(backbone)
    assert found.unreadable.tolist() == [0]
    pictures.write(backbone, found, 4)
    assert {path.stem for path in folder.iterdir()} == {"views", "attention-0005", "pca-0005", "neighbours-0005"}
    with Image.open(folder / "attention-0005.jpg") as strip, Image.open(folder / "pca-0005.jpg") as patches:
        assert strip.size == patches.size == (SHOWN * 116 - 4, 112)
    assert backbone.training


@pytest.mark.process
def test_two_ranks_draw_pictures_and_an_unreadable_image_does_not_matter(start: Start, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(16):
        noise = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(photos / f"{number:02d}.png")
    (photos / "00.png").write_bytes(b"no image")
    flags = ("--report-pictures", "--data-path", photos, "--max-steps", "2", "--batch-size-per-gpu", "2")
    run = start(*flags, "--max-unreadable", "1")
    assert run.wait() == [0, 0], run.err()
    titles = [one["title"] for one in data_of(tmp_path / "run" / "report.html")["pictures"]]
    assert titles == ["Views", "Attention of the class token", "Patch features", "Nearest neighbours"]


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
    assert (start["total_steps"], start["processes"], start["arch"]) == (6000, 1, "xcit_pico_4_p4")
    assert start["changed"]["out_dim"] == [65536, 48]


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


def test_judged_run_without_a_verdict_is_too_early_to_say(tmp_path: Path) -> None:
    pretraining = RunRecord(tmp_path, "a", [], [], {}, {}, 3, {"on_collapse": "warn"})
    assert pretraining.state == "too early to say"
    assert RunRecord(tmp_path, "b", [], [], {}, {}, 3, {"epochs": 2}).state == ""
