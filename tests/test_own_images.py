"""Recipe ``auto``, and the commands of docs/own_images.md on a small stand-in for published weights."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrain_fixtures import pretrain_here
from run_here import Here

from dino_xcit import auto
from dino_xcit.config import PretrainConfig
from dino_xcit.data import open_source
from dino_xcit.data.__main__ import main as data_command
from dino_xcit.dry_run import doubtful_settings
from dino_xcit.metrics import read_metrics
from dino_xcit.models import build_backbone

PAGE = Path(__file__).parent.parent / "docs" / "own_images.md"
SMALL = shlex.split(
    "--arch xcit_pico_4_p4 --epochs 2 --batch-size-per-gpu 4 --head-hidden-dim 16 --head-bottleneck-dim 8 "
    "--global-crops-size 16 --local-crops-size 8 --num-workers 0 --device cpu --no-report-pictures"
)


def commands() -> list[list[str]]:
    """Return the words of the commands of the page, in order."""
    lines = "".join(re.findall(r"```\n(.*?)```", PAGE.read_text(), re.DOTALL)).splitlines()
    return [shlex.split(line)[1:] for line in lines if line.strip().startswith("python ")]


def test_commands_of_the_page_work_in_order(
    here: Here, labelled_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("run_pretrain.set_numerics", lambda *_: None)
    monkeypatch.setattr("dino_xcit.dry_run.SECONDS", 0.01)
    shutil.copytree(labelled_photos, "labelled")
    Path("photos").mkdir()
    for number, photo in enumerate(sorted(labelled_photos.glob("train/*/*.png"))):
        shutil.copy(photo, f"photos/{number:04d}.jpg")
    torch.save(build_backbone("xcit_pico_4_p4").state_dict(), "dino_xcit_small_12_p16_pretrain.pth")
    for words in commands():
        if words[:2] == ["-m", "dino_xcit.data"]:
            assert data_command(words[2:]) == 0
            continue
        name, *flags = words[1:] if words[0] == "-m" else words
        if name == "run_pretrain.py":
            flags += SMALL
        elif name in ("run_extract.py", "run_knn.py"):
            flags += [] if "--query" in flags else ["--eval-resize", "18", "--eval-crop", "16", "--num-workers", "0"]
        outcome = here(importlib.import_module(name.removesuffix(".py")), *flags)
        assert outcome.code == 0, outcome.out + outcome.err
    assert {"published.json", "continued.json", "runs", "vectors"} <= {path.name for path in tmp_path.iterdir()}


# ---- the rule


def rule(images: int, side: int = 300, batch: int = 64, given: tuple[str, ...] = (), **settings: Any) -> dict[str, Any]:
    config = PretrainConfig(**settings)
    found = auto.choices(config, images, side, batch, given)
    return {name: value for choice in found for name, value in choice.settings.items()}


def test_a_million_images_keep_dinos_settings() -> None:
    assert replace(PretrainConfig(), **rule(1_281_167, batch=1024)) == PretrainConfig()


@pytest.mark.parametrize("method", ["dino", "simdino"])
@pytest.mark.parametrize("weights", ["", "published.pth"])
def test_every_size_has_valid_settings(method: str, weights: str) -> None:
    for images in (2, 7, 100, 5000, 999_999, 5_000_000):
        for side in (8, 28, 32, 100, 223, 4000):
            for batch in (1, 64, 4096):
                settings: dict[str, Any] = {"method": method, "init_weights": weights, "batch_size_per_gpu": batch}
                run = replace(PretrainConfig(**settings), **rule(images, side, batch, **settings))
                assert run.local_crops_size <= run.global_crops_size
                assert run.epochs // run.saveckp_freq <= 5
                assert doubtful_settings(run, images, run.epochs * max(1, images // batch)) == []


def test_rule_follows_number_of_images_and_length() -> None:
    rules = [rule(images) for images in (1000, 10_000, 60_000, 300_000, 999_999)]
    for name in ("out_dim", "momentum_teacher"):
        values = [one[name] for one in rules]
        assert all(less <= more for less, more in pairwise(values))
        assert values[0] < values[-1] == getattr(PretrainConfig, name)
    assert [one["epochs"] for one in rules] == [1000, 100, 100, 100, 100]
    assert rule(1000, given=("epochs",), epochs=20)["warmup_epochs"] == 2
    assert rule(1000, side=100)["global_crops_size"] == 96
    assert rule(1000, given=("global_crops_size",), global_crops_size=64)["local_crops_size"] == 32


def test_run_with_weights_is_shorter() -> None:
    fresh, continued = rule(5000), rule(5000, init_weights="published.pth")
    assert (fresh["epochs"], continued["epochs"]) == (200, 50)
    assert continued["warmup_epochs"] < fresh["warmup_epochs"]


def test_given_settings_win_even_with_their_default_values(labelled_photos: Path) -> None:
    source = open_source(str(labelled_photos), "train")
    config = PretrainConfig(data_path="photos")
    run, rule = auto.adapt(config, source, auto.ADAPTED, {})
    assert run == config
    assert set(rule) == set(auto.ADAPTED)
    for name in auto.ADAPTED:
        run, rule = auto.adapt(config, source, set(auto.ADAPTED) - {name}, {})
        assert run == replace(config, **{name: rule[name]})


def test_run_is_adapted_in_five_lines_and_resumes_with_another_batch_size(
    labelled_photos: Path, tmp_path: Path
) -> None:
    flags = [
        "--data-path", labelled_photos, "--arch", "xcit_pico_4_p4", "--epochs", "4", "--head-hidden-dim", "16",
        "--head-bottleneck-dim", "8", "--local-crops-number", "1", "--num-workers", "0", "--device", "cpu",
        "--no-report-pictures", "--output-dir", tmp_path / "run",
    ]  # fmt: skip
    first = pretrain_here(*flags, "--batch-size-per-gpu", "4", "--max-steps", "2")
    assert first.code == 0, first.err
    told = first.out.splitlines()
    assert "recipe auto (--data-path is given)" in told[0]
    assert [line.split()[0] for line in told[1:6]] == ["crops", "length", "prototypes", "teacher", "rate"]
    assert "epochs 4 as given" in told[2]
    again = pretrain_here(*flags, "--batch-size-per-gpu", "2", "--accumulation-steps", "2")
    assert again.code == 0, again.err
    starts = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "run"]
    assert [row["settings"]["out_dim"] for row in starts] == [16, 16]
    assert starts[0]["settings"]["global_crops_size"] == 20
    assert "centering" not in starts[0]["changed"]
