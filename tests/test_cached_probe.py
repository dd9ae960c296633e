"""Augmented epochs that are kept: what they hold, when they are taken, when they are made anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_fixtures import SMALL, MeanColours, noise_source
from tiny_run import CPU
from torch import Tensor

from dino_xcit.data.loader import StepSampler
from dino_xcit.errors import InputError
from dino_xcit.models import BackboneOutput
from eval.features import cached
from eval.linear.views import AugmentedEpoch, Views, kept_features, live_features

COUNT = 22


def views(scale: tuple[float, float] = (0.3, 1.0), seed: int = 5) -> Views:
    return Views(noise_source(COUNT), SMALL, scale, seed)


def kept(folder: Path, epoch: int, backbone: torch.nn.Module, half: bool = False) -> Any:
    found = cached(
        backbone, "w", AugmentedEpoch(views(), epoch, "f"), SMALL, CPU, folder, 4, 0, half=half
    )  # fmt: skip
    return found.features


def test_a_kept_epoch_holds_the_views_that_the_probe_sees_in_that_epoch(tmp_path: Path) -> None:
    backbone = MeanColours().eval()
    epochs = [kept(tmp_path, epoch, backbone) for epoch in range(2)]
    assert [rows.shape for rows in epochs] == [(COUNT, 5)] * 2
    assert not np.allclose(*epochs), "each epoch has crops of its own"
    samplers = [StepSampler(COUNT, 4, seed=5, stop_step=20) for _ in range(2)]
    live = list(live_features(backbone, views(), samplers[0], 0, CPU))
    stored = list(kept_features(epochs, samplers[1], CPU))
    assert len(live) == len(stored) == 20
    for step, ((ours, indices), (theirs, same)) in enumerate(zip(stored, live, strict=True)):
        assert torch.equal(indices, same), "the order is the full protocol's in every epoch"
        if step < 10:
            assert torch.allclose(ours, theirs, atol=1e-6)
        else:
            assert torch.allclose(ours, torch.from_numpy(epochs[step // 5 % 2][indices.numpy()])), "they come again"


def test_what_is_whole_is_taken_and_what_is_damaged_is_made_anew(tmp_path: Path) -> None:
    backbone = MeanColours().eval()
    first = np.array(kept(tmp_path, 1, backbone))
    kept(tmp_path, 1, backbone)
    assert backbone.seen == COUNT
    (file,) = tmp_path.glob("*/features.npy")
    file.write_bytes(file.read_bytes()[:-8])
    assert (kept(tmp_path, 1, backbone) == first).all()
    assert backbone.seen == 2 * COUNT


def test_whatever_decides_the_views_gives_them_a_place_of_their_own() -> None:
    epochs = [
        (views(), 0, "f"),
        (views(), 1, "f"),
        (views(), 0, "g"),
        (views(seed=6), 0, "f"),
        (views((0.2, 1)), 0, "f"),
    ]
    assert len({AugmentedEpoch(*one).fingerprint() for one in epochs}) == len(epochs)


class Huge(MeanColours):
    def forward(self, images: Tensor) -> BackboneOutput:
        out = super().forward(images)
        return BackboneOutput(out.cls_token * 1e6, out.patch_tokens, out.grid)


def test_float16_is_kept_apart_and_refuses_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, half = (kept(tmp_path, 0, MeanColours().eval(), half) for half in (False, True))
    assert half.dtype == np.float16
    assert half.astype(np.float32) == pytest.approx(np.array(whole), rel=1e-3, abs=1e-6)
    with pytest.raises(InputError, match="does not fit float16"):
        kept(tmp_path / "huge", 0, Huge().eval(), half=True)
    assert not list((tmp_path / "huge").iterdir()), "whole or absent"
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(InputError, match="GiB free"):
        kept(tmp_path / "full", 0, MeanColours().eval())
