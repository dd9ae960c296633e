"""Extension points: each component registered from outside trains for three steps without changes to other files."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import SMALL
from run_here import Here
from torch import Tensor, nn

import run_knn
import run_pretrain
from dino_xcit import recipes
from dino_xcit.config import PretrainConfig
from dino_xcit.data import register_source
from dino_xcit.data.loader import Batch
from dino_xcit.errors import InputError
from dino_xcit.methods import Method, Stats, register_method
from dino_xcit.metrics import read_metrics
from dino_xcit.models import BackboneOutput, register_backbone
from dino_xcit.optim import Rates
from dino_xcit.recipes import Recipe, parse_pretrain
from dino_xcit.train import StepResult
from dino_xcit.weights import load_backbone

CPU = torch.device("cpu")


def train(folder: Path, *flags: str, steps: int = 3, **seams: Any) -> list[dict[str, Any]]:
    """Train a small run for ``steps`` steps and return its metrics."""
    words = [*SMALL, "--data-path", "sample:fashion-mnist", "--batch-size-per-gpu", "4", "--max-steps", str(steps)]
    words = [*words, *flags, "--output-dir", str(folder)]
    run_pretrain.train(parse_pretrain(words).config, CPU, **seams)
    return read_metrics(folder / "metrics.jsonl")


# ---- backbone


class MeanColour(nn.Module):
    """Backbone: features of the mean colour of each quarter, and their mean."""

    embed_dim = 8

    def __init__(self) -> None:
        super().__init__()
        self.colour = nn.Linear(3, self.embed_dim)

    def forward(self, images: Tensor, layers: tuple[int, ...] = ()) -> BackboneOutput:
        """Map images [B, 3, H, W] to features."""
        tokens = self.colour(nn.functional.adaptive_avg_pool2d(images, 2).flatten(2).mT)
        return BackboneOutput(tokens.mean(dim=1), tokens, (2, 2), tuple(tokens for _ in layers))


register_backbone("mean-colour", MeanColour)


def test_registered_backbone_trains_and_is_evaluated(tmp_path: Path, here: Here) -> None:
    metrics = train(tmp_path, "--arch", "mean-colour", "--drop-path-rate", "0", "--data-path", "squares:24")
    assert [row["step"] for row in metrics if row["kind"] == "step"] == [1, 2, 3]
    words = ["--weights", tmp_path / "checkpoint.pth", "--ks", "5", "--json", tmp_path / "knn.json", "--device", "cpu"]
    assert here(run_knn, *words).code == 0
    assert 0 < json.loads((tmp_path / "knn.json").read_text())["results"][0]["top1"] <= 100


def test_drop_path_rate_is_refused_for_backbone_without_drop_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="drop-path-rate 0"):
        train(tmp_path, "--arch", "mean-colour", "--drop-path-rate", "0.1")


# ---- data source


class Squares:
    """Data source: grey squares, encoded as PNG."""

    def __init__(self, count: str, part: str | None) -> None:
        self.count = int(count) if part == "train" else 4
        self.labels = [index % 2 for index in range(self.count)]

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> tuple[bytes, int | None]:
        file = io.BytesIO()
        Image.fromarray(np.full((20, 20), 100 * (index % 2) + index, dtype=np.uint8)).save(file, "png")
        return file.getvalue(), index % 2

    def name(self, index: int) -> str:
        return f"square {index}"


register_source("squares", Squares)


def test_registered_data_source_with_labels_trains(tmp_path: Path) -> None:
    metrics = train(tmp_path, "--data-path", "squares:24", "--knn-every", "1")
    assert 0 <= metrics[-1]["knn_top1"] <= 100


# ---- evaluator


def test_evaluators_run_at_their_interval_and_select_best_checkpoint(tmp_path: Path) -> None:
    def spread(method: Method) -> Mapping[str, float]:
        assert (tmp_path / "checkpoint.pth").exists()  # the evaluated step is saved first
        return {"spread": float(sum(p.std() for p in method.eval_backbone.parameters() if p.numel() > 1))}

    free = iter([2.0, 1.0])
    labelfree = ("labelfree", 1, lambda method: {PretrainConfig.labelfree_metric: next(free)})
    evaluators = [
        ("spread", 1, spread),
        labelfree,
        ("seldom", 5, lambda method: {"last": 1.0}),
        ("never", 0, lambda method: {}),
    ]
    flags = ["--data-path", "squares:8", "--best-metric", "spread", "--epochs", "2"]
    metrics = train(tmp_path, *flags, steps=4, evaluators=evaluators)
    epochs = [row for row in metrics if row["kind"] == "epoch"]
    assert [row["step"] for row in epochs] == [2, 4]
    assert ["last" in row for row in epochs] == [False, True]
    best = max(epochs, key=lambda row: row["spread"])
    assert torch.load(tmp_path / "best.pth", weights_only=True)["step"] == best["step"]
    assert torch.load(tmp_path / "best-labelfree.pth", weights_only=True)["step"] == 2


def test_unknown_best_metric_gives_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, "--best-metric", "spraed", evaluators=[("spread", 1, lambda method: {"spread": 1.0})])
    assert "warning: no best.pth: no evaluator returns --best-metric spraed (found spread)" in capsys.readouterr().out
    assert not (tmp_path / "best.pth").exists()


# ---- observer


class Labels:
    """Observer: counts the images of each label."""

    def __init__(self) -> None:
        self.seen = torch.zeros(10, dtype=torch.int64)

    def on_step(self, result: StepResult, batch: Batch) -> None:
        assert batch.labels is not None
        assert result.features is not None
        self.seen += torch.bincount(batch.labels, minlength=10)

    def metrics(self) -> Mapping[str, float]:
        return {"labels_seen": float(self.seen.sum())}

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = state["seen"].clone()


def test_observer_state_is_saved_and_resumed(tmp_path: Path) -> None:
    train(tmp_path, steps=1, observers=[Labels()])
    resumed, whole = Labels(), Labels()
    metrics = train(tmp_path, steps=3, observers=[resumed])
    assert [row["labels_seen"] for row in metrics if row["kind"] == "step"] == [4, 8, 12]
    train(tmp_path / "whole", steps=3, observers=[whole])
    assert torch.equal(resumed.seen, whole.seen)


# ---- method


class Autoencoder(Method):
    """Method: predicts the mean grey of each quarter of the first view from its features."""

    def __init__(self, config: Any, device: torch.device) -> None:
        self.eval_backbone = MeanColour().to(device)
        self.decoder = nn.Linear(MeanColour.embed_dim, 4).to(device)
        self.trained = nn.ModuleDict({"backbone": self.eval_backbone, "decoder": self.decoder})
        self.steps = torch.zeros((), dtype=torch.int64)

    def forward_backward(self, batch: Batch, rates: Rates) -> tuple[Tensor, Stats]:
        images = batch.crops[0][: len(batch.indices)].float() / 255
        wanted = nn.functional.adaptive_avg_pool2d(images, 2).mean(dim=1).flatten(1)
        error = (self.decoder(self.eval_backbone(images).cls_token) - wanted).square()
        (error.mean() * rates.loss_scale).backward()
        return error.mean().detach(), {"error": error.detach().sum(), "count": torch.tensor(float(error.numel()))}

    def after_step(self, stats: Stats, rates: Rates, accepted: Tensor) -> None:
        self.steps += accepted

    def metrics(self, stats: Stats) -> dict[str, Tensor | float]:
        return {"squared_error": stats["error"] / stats["count"]}

    def state_dict(self) -> dict[str, Any]:
        return {"trained": self.trained.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.trained.load_state_dict(state["trained"])
        self.steps.copy_(state["steps"])


register_method("autoencoder", Autoencoder)


def test_registered_method_trains_resumes_and_saves_backbone(tmp_path: Path) -> None:
    flags = ["--method", "autoencoder", "--arch", "mean-colour", "--data-path", "squares:4", "--lr", "2"]
    flags += ["--epochs", "9"]
    train(tmp_path, *flags, steps=1)
    train(tmp_path, *flags, steps=3)
    rows = [row for row in train(tmp_path / "whole", *flags) if row["kind"] == "step"]
    assert rows[-1]["loss"] == rows[-1]["squared_error"] < rows[0]["loss"]
    files = (tmp_path / "checkpoint.pth", tmp_path / "whole" / "checkpoint.pth")
    resumed, whole = (torch.load(file, weights_only=True) for file in files)
    assert int(resumed["steps"]) == 3
    assert all(torch.equal(value, resumed["trained"][name]) for name, value in whole["trained"].items())
    loaded = load_backbone(tmp_path / "checkpoint.pth")
    assert loaded.arch == "mean-colour"
    stored = torch.load(tmp_path / "backbone.pth", weights_only=True)
    assert all(torch.equal(value, stored[name]) for name, value in loaded.backbone.state_dict().items())


# ---- recipe


def test_registered_recipe_applies_and_bad_setting_is_refused(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(lambda: recipes.RECIPES.pop("tiny", None))  # other tests iterate over all recipes
    recipes.register(Recipe("tiny", "a test", "--recipe tiny", "not measured", {"koleo_weight": 0.5}))
    assert parse_pretrain(["--recipe", "tiny", "--data-path", "sample:fashion-mnist"]).config.koleo_weight == 0.5
    train(tmp_path, "--recipe", "tiny")
    with pytest.raises(ValueError, match="no_such_setting"):
        recipes.register(Recipe("other", "a test", "", "", {"no_such_setting": 1}))


# ---- duplicate names


@pytest.mark.parametrize(
    ("register", "words"),
    [
        (register_backbone, ("xcit_small_12_p16", MeanColour)),
        (register_method, ("dino", Autoencoder)),
        (register_source, ("tar", Squares)),
        (recipes.register, (Recipe("dino", "", "", ""),)),
    ],
)
def test_duplicate_name_is_refused_at_registration(register: Callable[..., None], words: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"taken|registered"):
        register(*words)
