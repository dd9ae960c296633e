"""Pretraining and searching from Python, and the example notebook."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image

from dino_xcit.data import open_source
from dino_xcit.errors import InputError
from dino_xcit.weights import load_backbone
from eval.features import extract
from run_pretrain import PretrainedRun, pretrain

NOTEBOOK = Path(__file__).parent.parent / "examples" / "own_photographs.ipynb"
SMALL: dict[str, Any] = {
    "arch": "xcit_pico_4_p4", "epochs": 2, "batch_size_per_gpu": 4, "out_dim": 16, "head_hidden_dim": 16,
    "head_bottleneck_dim": 8, "global_crops_size": 16, "local_crops_size": 8, "local_crops_number": 1,
    "warmup_epochs": 0, "num_workers": 0, "device": "cpu", "log_every": 1, "global_crops_scale": (0.5, 1.0),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _keep_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of kernels would affect all later tests."""
    monkeypatch.setattr("run_pretrain.set_numerics", lambda *_: None)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("pictures") / "photos", np.random.default_rng(0)
    folder.mkdir()
    for number in range(9):
        Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def test_run_returns_metrics_verdict_report_and_backbone_and_continues(pictures: Path, tmp_path: Path) -> None:
    settings = SMALL | {"output_dir": str(tmp_path / "run")}
    first = pretrain(pictures, **settings, max_steps=1)
    assert max(row["step"] for row in first.metrics) == 1
    done = pretrain(pictures, **settings)
    assert isinstance(done, PretrainedRun)
    assert max(row["step"] for row in done.metrics) == 4
    assert done.verdict.state == "too early to say"
    assert "uPlot" in done.report.read_text()
    again = pretrain(pictures, **settings)
    assert again.backbone.hash == done.backbone.hash


def test_wrong_settings_are_refused(pictures: Path) -> None:
    with pytest.raises(InputError, match="did you mean --arch"):
        pretrain(pictures, archh="xcit_pico_4_p4")
    with pytest.raises(InputError, match="epochs is 0"):
        pretrain(pictures, epochs=0)
    with pytest.raises(InputError, match="dry_run"):
        pretrain(pictures, dry_run=True)


def test_embed_equals_extraction_in_any_batch_size(pictures: Path, tmp_path: Path) -> None:
    run = pretrain(pictures, **SMALL, max_steps=1, output_dir=tmp_path / "run")
    loaded = load_backbone(str(tmp_path / "run" / "checkpoint.pth"))
    files = sorted(pictures.iterdir())
    rows = extract(
        loaded.backbone, open_source(str(pictures), "train"), loaded.transform, torch.device("cpu"), 0, progress=False
    ).features
    expected = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(loaded.embed(files), expected, atol=1e-6)
    mixed = loaded.embed([str(files[0]), Image.open(files[1]), files[2]], batch_size=2)
    np.testing.assert_allclose(mixed, expected[:3], atol=1e-6)
    assert run.backbone.embed([]).shape == (0, rows.shape[1])
    with pytest.raises(InputError, match=r"nowhere\.jpg"):
        loaded.embed([tmp_path / "nowhere.jpg"])


def test_notebook_runs_from_pictures_to_search(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mpl.use("svg")  # stands for a notebook's own
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    state: dict[str, Any] = {}
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        exec(compile("".join(cell["source"]), "cell", "exec"), state)
        if cell["metadata"].get("tags") == ["parameters"]:
            assert {"arch", "output_dir"} <= state["SETTINGS"].keys()
            state |= {"PHOTOS": str(pictures), "SETTINGS": SMALL | {"output_dir": "run"}}
    assert mpl.get_backend() == "svg"
    assert state["vectors"].shape == (9, 64)
    assert state["search"](state["files"][3])[0] == state["files"][3]
    assert all(not cell.get("outputs") for cell in cells)
