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
from eval.linear.cached import AugmentedEpochs, stored_features
from eval.linear.views import EachOnce, frozen_features, probe_batches

COUNT, SCALE = 22, (0.3, 1.0)


def epochs_in(folder: Path, **changes: Any) -> AugmentedEpochs:
    settings: dict[str, Any] = {
        "fingerprint": "f", "weights": "w", "transform": SMALL, "crop_scale": SCALE, "seed": 5, "width": 5,
        "precision": "float32",
    }  # fmt: skip
    return AugmentedEpochs(folder, noise_source(COUNT), **(settings | changes))


def made(epochs: AugmentedEpochs, count: int, backbone: torch.nn.Module | None = None) -> list[Any]:
    return epochs.make(count, backbone or MeanColours().eval(), CPU, 4, 0)


def test_a_kept_epoch_holds_the_views_that_the_probe_sees_in_that_epoch(tmp_path: Path) -> None:
    kept = made(epochs_in(tmp_path), 2)
    assert [rows.shape for rows in kept] == [(COUNT, 5)] * 2
    assert not np.allclose(kept[0], kept[1]), "each epoch has crops of its own"

    def sampler() -> StepSampler:
        sampler = StepSampler(COUNT, 4, seed=5)
        sampler.stop_step = 4 * sampler.steps_per_epoch
        return sampler

    views = probe_batches(noise_source(COUNT), SMALL.crop, SCALE, sampler(), 0, CPU)
    live = list(frozen_features(MeanColours().eval(), views, SMALL, CPU))
    stored = list(stored_features(kept, sampler(), CPU))
    assert len(live) == len(stored) == 20
    for step, ((ours, indices), (theirs, same)) in enumerate(zip(stored, live, strict=True)):
        assert torch.equal(indices, same), "the order is the full protocol's in every epoch"
        if step < 10:
            assert torch.allclose(ours, theirs, atol=1e-6)
        else:
            assert torch.allclose(ours, torch.from_numpy(kept[step // 5 % 2][indices.numpy()])), "they come again"


def test_what_is_whole_is_taken_and_what_is_damaged_is_made_anew(tmp_path: Path) -> None:
    epochs = epochs_in(tmp_path)
    first = [np.array(rows) for rows in made(epochs, 3)]
    backbone = MeanColours().eval()
    made(epochs, 3, backbone)
    assert backbone.seen == 0
    epochs.file(1).write_bytes(epochs.file(1).read_bytes()[:-8])
    epochs.file(2).unlink()
    again = made(epochs_in(tmp_path), 3, backbone)
    assert backbone.seen == 2 * COUNT
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    assert made(epochs, 1, backbone)[0].shape == (COUNT, 5)
    assert backbone.seen == 2 * COUNT, "fewer of them are there too"


def test_a_kept_epoch_that_was_overwritten_is_noticed_and_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The right shape is not enough: NaN in it would be blamed on the learning rate."""
    epochs = epochs_in(tmp_path)
    first = [np.array(rows) for rows in made(epochs, 3)]
    np.save(epochs.file(1), np.full_like(first[1], np.nan))
    content = bytearray(epochs.file(2).read_bytes())
    content[-40] ^= 1
    epochs.file(2).write_bytes(content)
    backbone = MeanColours().eval()
    capsys.readouterr()
    again = made(epochs_in(tmp_path), 3, backbone)
    said = capsys.readouterr().out
    assert [f"epoch-00{epoch}.npy is not what was written there" in said for epoch in range(3)] == [False, True, True]
    assert backbone.seen == 2 * COUNT
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize(
    "change",
    [{"fingerprint": "g"}, {"weights": "v"}, {"crop_scale": (0.2, 1.0)}, {"seed": 6}, {"precision": "float16"}],
)
def test_whatever_decides_the_features_gives_them_a_place_of_their_own(tmp_path: Path, change: dict[str, Any]) -> None:
    assert epochs_in(tmp_path, **change).folder != epochs_in(tmp_path).folder


class Huge(MeanColours):
    def forward(self, images: Tensor) -> BackboneOutput:
        out = super().forward(images)
        return BackboneOutput(out.cls_token * 1e6, out.patch_tokens, out.grid)


def test_float16_is_half_the_size_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    whole, half = made(epochs_in(tmp_path), 1)[0], made(epochs_in(tmp_path, precision="float16"), 1)[0]
    assert half.dtype == np.float16
    assert half.astype(np.float32) == pytest.approx(np.array(whole), rel=1e-3, abs=1e-6)
    with pytest.raises(InputError, match="does not fit float16, which ends at 65504: use --cached-precision float32"):
        made(epochs_in(tmp_path, precision="float16", weights="huge"), 1, Huge().eval())
    assert epochs_in(tmp_path, precision="float16", weights="huge").rows(0) is None, "whole or absent"


def test_a_disk_without_room_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.linear.cached._SPARE_BYTES", 1 << 60)
    with pytest.raises(InputError, match="lower --cached-epochs, or leave --cached out"):
        made(epochs_in(tmp_path), 1)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_image_comes_once_whoever_reads_it(world: int) -> None:
    samplers = [EachOnce(COUNT, 4, 7, 0, rank, world) for rank in range(world)]
    rounds = zip(*(sampler.batches for sampler in samplers), strict=True)
    assert [key for round_ in rounds for batch in round_ for key in batch] == [(7, index) for index in range(COUNT)]
    assert all(batch for sampler in samplers for batch in sampler), "a loader is not asked for an empty batch"
