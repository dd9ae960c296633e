"""A transform that no file says is a guess: told as one on the screen and in the card, and never stored as said."""

from __future__ import annotations

import json
from pathlib import Path

import foreign_checkpoints as files
import pytest
import safetensors
import torch
from export_fixtures import export

from dino_xcit.cli import parse
from dino_xcit.transform import EvalTransform
from dino_xcit.weights import load_backbone
from dino_xcit.weights.files import ASSUMED
from eval.config import KnnConfig
from eval.setup import open_backbone

OF_POSITIONS = "ImageNet's way for 64 pixels, as its positions"


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A transformer of 64 pixels, by itself."""
    torch.save(files.vit().state_dict(), tmp_path / "bare.pth")
    return tmp_path / "bare.pth"


def test_the_side_of_a_vits_positions_is_a_guess(bare: Path) -> None:
    read = load_backbone(bare)
    assert (read.transform, read.transform_from) == (EvalTransform(resize=73, crop=64), "")
    assert read.transform_guess == OF_POSITIONS


def test_an_export_does_not_store_it_as_the_checkpoints(
    bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(bare, "safetensors", tmp_path / "out.safetensors")
    said = capsys.readouterr().out
    assert f"warning: the file does not say how images are prepared; assumed: {OF_POSITIONS}, EvalTransform(" in said
    with safetensors.safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert "eval_transform" not in metadata
    assert json.loads(metadata[ASSUMED])["crop"] == 64
    again = load_backbone(tmp_path / "out.safetensors")
    assert (again.transform_from, again.transform_guess) == ("", OF_POSITIONS)
    assert again.transform == load_backbone(bare).transform


@pytest.mark.parametrize("kind", ["positions", "dinov2", "xcit"])
def test_an_evaluator_tells_the_guess(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    state, guess = {
        "positions": (files.vit().state_dict(), OF_POSITIONS),
        "dinov2": (files.dinov2_vit()[1], "ImageNet's way, as in DINOv2's evaluations"),
        "xcit": (files.xcit().state_dict(), "ImageNet's way"),
    }[kind]
    torch.save(state, tmp_path / "bare.pth")
    words = ["--weights", str(tmp_path / "bare.pth"), "--device", "cpu"]
    open_backbone(parse(KnnConfig, words, "run_knn.py"))
    said = capsys.readouterr().out
    assert (
        f"warning: bare.pth does not say how its images are prepared, this is a guess: {guess} (--eval-resize" in said
    )
    open_backbone(parse(KnnConfig, [*words, "--eval-crop", "56"], "run_knn.py"))
    assert "guess" not in capsys.readouterr().out


def test_what_a_checkpoint_says_is_no_guess(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = EvalTransform(resize=64, crop=64)
    torch.save({"teacher": files.prefixed("backbone.", files.vit().state_dict()), "eval_transform": said.to_dict()},
               tmp_path / "ckpt.pth")  # fmt: skip
    read, _ = open_backbone(parse(KnnConfig, ["--weights", str(tmp_path / "ckpt.pth"), "--device", "cpu"], "x"))
    assert (read.transform, read.transform_from, read.transform_guess) == (said, "the checkpoint's", "")
    assert "guess" not in capsys.readouterr().out
