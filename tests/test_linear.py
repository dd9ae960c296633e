"""The linear probe: SGD and schedule against torch, crops against torchvision, held-out images and cached epochs."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from eval_fixtures import SMALL, MeanColours, image_tree, noise_source
from PIL import Image
from tiny_run import CPU
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF

from dino_xcit.data import ArraySource, Source, UndecodableImage, open_source
from dino_xcit.data.loader import StepSampler
from dino_xcit.errors import InputError
from dino_xcit.models import BackboneOutput
from eval.features import cached
from eval.linear.pooled import Rows
from eval.linear.probe import FORMAT, read_probe
from eval.linear.sgd import LinearHeads, cosine_factor, final_results, linear
from eval.linear.views import AugmentedEpoch, Views, draw_crop, hold_out, kept_features, live_features, random_view

CLASSES, DIM = 4, 6
COUNT = 22


def batches(count: int, size: int = 16, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Make features clustered by class, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(CLASSES, (count, size), generator=generator)
    return [(centres[some] + 0.5 * torch.randn(size, DIM, generator=generator), some) for some in labels]


def rows(features: Any) -> Rows:
    return Rows(np.asarray(features, dtype=np.float32))


def heads_of(lrs: Sequence[float], seed: int = 0) -> LinearHeads:
    return LinearHeads(lrs, CLASSES, DIM, seed, CPU)


def test_linear_heads_match_independent_torch_sgd() -> None:
    lrs, epochs, data = [0.001, 0.05, 1.0], 3, batches(5)
    heads = heads_of(lrs)
    start = heads.state_dict()
    for epoch, (features, labels) in itertools.product(range(epochs), data):
        heads.step(features, labels, torch.ones(16), cosine_factor(epoch, epochs))
    for head, lr in enumerate(lrs):
        peer = nn.Linear(DIM, CLASSES)
        peer.load_state_dict({"weight": start["weight"][head], "bias": start["bias"][head]})
        optimizer = torch.optim.SGD(peer.parameters(), lr, momentum=0.9, weight_decay=0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=0)
        for _ in range(epochs):
            for features, labels in data:
                optimizer.zero_grad()
                nn.functional.cross_entropy(peer(features), labels).backward()
                optimizer.step()
            schedule.step()
        weight, bias = heads.folded(head)
        assert torch.allclose(weight, peer.weight, atol=1e-5)
        assert torch.allclose(bias, peer.bias, atol=1e-5)


def test_held_out_images_do_not_affect_training() -> None:
    taken = torch.tensor([1.0, 0.0] * 8)
    masked, only, fresh = (heads_of([0.1]) for _ in range(3))
    for features, labels in batches(4):
        loss = masked.step(features, labels, taken, 1.0)
        assert loss == pytest.approx(only.step(features[::2], labels[::2], torch.ones(8), 1.0), rel=1e-5)
    assert torch.allclose(masked.state_dict()["weight"], only.state_dict()["weight"], atol=1e-6)
    before = fresh.folded(0)[0].clone()
    fresh.step(features, labels, torch.zeros(16), 1.0)
    assert torch.equal(fresh.folded(0)[0], before)


def test_standardisation_is_folded_into_raw_feature_classifier() -> None:
    raw = 5 + 0.01 * torch.cat([features for features, _ in batches(10)])
    heads, plain = LinearHeads([0.5], CLASSES, DIM, 0, CPU, standardise=rows(raw)), heads_of([0.5])
    for features, labels in batches(20):
        for each in (heads, plain):
            each.step(5 + 0.01 * features, labels, torch.ones(16), 1.0)
    weight, bias = heads.folded(0)
    features, labels = batches(1, 200, seed=4)[0]
    found = linear((5 + 0.01 * features).double(), weight[None].double(), bias[None].double())[0].argmax(dim=1)
    first, second = (each.guesses(rows(5 + 0.01 * features), [0])[0, :, 0] for each in (heads, plain))
    assert (found.numpy() == first).all()
    assert (first == labels.numpy()).mean() > 0.8 > (second == labels.numpy()).mean()


def opposites() -> LinearHeads:
    """Make two classifiers of seven features: the identity and its negation."""
    heads = LinearHeads([0.1, 1.0], 7, 7, 0, CPU)
    state = heads.state_dict()
    state["weight"][0], state["weight"][1] = torch.eye(7), -torch.eye(7)
    heads.load_state_dict(state)
    return heads


def test_guesses_are_the_top_five_classes_in_order() -> None:
    features = np.array([[7, 6, 5, 4, 3, 2, 1]])
    assert opposites().guesses(rows(features), [0, 1]).tolist() == [[[0, 1, 2, 3, 4]], [[6, 5, 4, 3, 2]]]
    assert opposites().guesses(rows(features[:0]), [1]).shape == (1, 0, 5)


# ---- views


def test_crop_distribution_matches_torchvision() -> None:
    rng, scale, picture = np.random.default_rng(0), (0.08, 1.0), Image.new("RGB", (60, 40))
    boxes = np.array([draw_crop(60, 40, scale, rng.random(23).tolist()) for _ in range(2500)])
    ours = np.stack([boxes[:, 1], boxes[:, 0], boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]])
    draws = [RandomResizedCrop.get_params(picture, list(scale), [3 / 4, 4 / 3]) for _ in range(2500)]
    theirs = np.array(draws).T  # top, left, height, width
    assert (boxes.min(), boxes[:, 2].max(), boxes[:, 3].max()) == (0, 60, 40)
    for mine, peer in [*zip(ours, theirs, strict=True), (ours[2] * ours[3], theirs[2] * theirs[3])]:
        quantiles = [np.percentile(one, [10, 25, 50, 75, 90]) for one in (mine, peer)]
        assert quantiles[0] == pytest.approx(quantiles[1], abs=0.06 * (peer.max() - peer.min()))


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (10, 1000), (1, 1), (3, 1)])
def test_largest_centred_crop_is_used_if_no_random_crop_fits(width: int, height: int) -> None:
    left, top, right, bottom = draw_crop(width, height, (0.99, 1.0), [0.999] * 23)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert abs(left - (width - right)) <= 1
    if max(width, height) == 1000:
        assert (right - left) / (bottom - top) == pytest.approx(4 / 3 if width > height else 3 / 4, abs=0.05)


def test_view_matches_torchvision_resized_crop_and_flip(photo: Image.Image) -> None:
    flipped = 0
    for index in range(12):
        view = np.asarray(random_view(photo, 24, (0.08, 1.0), seed=1, epoch=2, index=index))
        numbers = np.random.Generator(np.random.Philox(key=[1, (2 << 40) | index])).random(23).tolist()
        left, top, right, bottom = draw_crop(photo.width, photo.height, (0.08, 1.0), numbers)
        peer = TF.resized_crop(photo, top, left, bottom - top, right - left, [24, 24], InterpolationMode.BILINEAR)
        as_it_is = np.array_equal(view, np.asarray(peer))
        mirrored = np.array_equal(view, np.asarray(TF.hflip(peer)))
        assert as_it_is or mirrored
        flipped += mirrored
    assert 1 <= flipped <= 11


class Diverged(MeanColours):
    """Backbone with non-finite features for the third image of each batch."""

    def forward(self, images: Tensor) -> BackboneOutput:
        out = super().forward(images)
        out.cls_token[2] = float("nan")
        return out


def steps_of(
    source: Source, workers: int = 0, rank: int = 0, world: int = 1, kind: type[MeanColours] = MeanColours
) -> list[tuple[Tensor, Tensor]]:
    sampler = StepSampler(len(source), 6 // world, rank=rank, world_size=world, seed=5, start_step=1, stop_step=9)
    return list(live_features(kind().eval(), Views(source, SMALL, (0.3, 1.0), 5), sampler, workers, CPU))


class SignalsIgnored(ArraySource):
    """Source that asserts that SIGINT is ignored, as in all loader workers."""

    def read(self, index: int) -> Any:
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        return super().read(index)


def test_live_features_are_independent_of_workers_and_ranks() -> None:
    alone, helped = steps_of(noise_source(20)), steps_of(noise_source(20, kind=SignalsIgnored), 2)
    halves = [steps_of(noise_source(20), 0, rank, 2) for rank in (0, 1)]
    assert [features.shape for features, _ in alone] == [(6, 5)] * 8
    for step, batch in enumerate(alone):
        for one, other, first, second in zip(batch, helped[step], halves[0][step], halves[1][step], strict=True):
            assert torch.equal(one, other)
            assert torch.allclose(one, torch.cat([first, second]))


def test_unreadable_image_and_non_finite_features_name_the_image(tmp_path: Path) -> None:
    tree = image_tree(tmp_path / "data")
    (tree / "train" / "bars" / "bars 03.png").write_bytes(b"")
    with pytest.raises(UndecodableImage, match=r"bars 03\.png cannot be read: empty file"):
        steps_of(open_source(str(tree / "train")), workers=1)
    _, third = steps_of(noise_source(20))[0]
    with pytest.raises(InputError, match=f"{third[2]} are not finite"):
        steps_of(noise_source(20), kind=Diverged)


def test_hold_out_is_stratified_and_deterministic() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [100, 50, 10]))
    held = hold_out(labels, 0.1, seed=0)
    assert np.bincount(labels[held]).tolist() == [10, 5, 1]
    assert (np.diff(held) > 0).all()
    assert (held == hold_out(labels, 0.1, seed=0)).all()
    assert (held != hold_out(labels, 0.1, seed=1)).any()
    assert len(hold_out(labels, 0.0, seed=0)) == 0
    assert len(hold_out(np.array([0, 1, 1]), 0.9, seed=0)) == 1, "a class has no training image left"


# ---- cached augmented epochs


def views(scale: tuple[float, float] = (0.3, 1.0), seed: int = 5) -> Views:
    return Views(noise_source(COUNT), SMALL, scale, seed)


def kept(folder: Path, epoch: int, backbone: torch.nn.Module, half: bool = False) -> Any:
    return cached(backbone, "w", AugmentedEpoch(views(), epoch, "f"), SMALL, CPU, folder, 4, 0, half=half).features


def test_cached_epoch_equals_live_features(tmp_path: Path) -> None:
    backbone = MeanColours().eval()
    epochs = [kept(tmp_path, epoch, backbone) for epoch in range(2)]
    assert [rows.shape for rows in epochs] == [(COUNT, 5)] * 2
    assert not np.allclose(*epochs), "two epochs have equal crops"
    samplers = [StepSampler(COUNT, 4, seed=5, stop_step=20) for _ in range(2)]
    live = list(live_features(backbone, views(), samplers[0], 0, CPU))
    stored = list(kept_features(epochs, samplers[1], CPU))
    assert len(live) == len(stored) == 20
    for step, ((ours, indices), (theirs, same)) in enumerate(zip(stored, live, strict=True)):
        assert torch.equal(indices, same), "the order differs from the full protocol"
        if step < 10:
            assert torch.allclose(ours, theirs, atol=1e-6)
        else:
            assert torch.allclose(ours, torch.from_numpy(epochs[step // 5 % 2][indices.numpy()])), (
                "the epochs do not repeat"
            )


def test_augmented_epoch_fingerprint_depends_on_every_setting() -> None:
    others = [(views(), 1, "f"), (views(), 0, "g"), (views(seed=6), 0, "f"), (views((0.2, 1)), 0, "f")]
    decided = [(views(), 0, "f"), *others]
    assert len({AugmentedEpoch(*one).fingerprint() for one in decided}) == len(decided)


class Huge(MeanColours):
    def forward(self, images: Tensor) -> BackboneOutput:
        out = super().forward(images)
        return BackboneOutput(out.cls_token * 1e6, out.patch_tokens, out.grid)


def test_float16_cache_is_separate_and_refuses_overflow_and_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, half = (kept(tmp_path, 0, MeanColours().eval(), half) for half in (False, True))
    assert half.dtype == np.float16
    assert half.astype(np.float32) == pytest.approx(np.array(whole), rel=1e-3, abs=1e-6)
    with pytest.raises(InputError, match="too large for float16"):
        kept(tmp_path / "huge", 0, Huge().eval(), half=True)
    assert not list((tmp_path / "huge").iterdir()), "a partial cache is left behind"
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(InputError, match="GiB free"):
        kept(tmp_path / "full", 0, MeanColours().eval())


# ---- results and probe file


def test_grid_is_selected_on_held_out_images() -> None:
    """One of two classifiers is correct on the held-out images, the other on the validation images."""
    eye, numbers = rows(np.eye(7)), np.arange(7)
    probe: Any = SimpleNamespace(
        config=SimpleNamespace(lr=0.001), lrs=[0.1, 1.0], labels=numbers, held=numbers, held_source="held",
        val=SimpleNamespace(labels=numbers), rows=lambda source: {"cls": eye if source == "held" else rows(-np.eye(7))},
    )  # fmt: skip
    history = [{"epoch": epoch, "loss": 1.0, "top1": top1, "top5": 90.0} for epoch, top1 in enumerate((50, 70, 50), 1)]
    content = {"history": history, "best_hits": None}
    found = final_results(probe, content, LinearHeads([0.1], 7, 7, 0, CPU), {"cls": opposites()})
    grid = found["results"]["grid"]
    assert (grid["lr"], grid["held_out_top1"], grid["top1"]) == (0.1, 100.0, 0.0)
    assert found["results"]["paper"]["best_epoch"]["epoch"] == 2
    assert torch.equal(found["classifier"]["weight"], torch.eye(7))


def test_probe_file_of_another_probe_or_damaged_file_is_refused(tmp_path: Path) -> None:
    file, settings = tmp_path / "linear.pth", {"lr": 0.001, "lrs": [0.1, 1.0], "weights": "a" * 64}
    assert read_probe(file, settings) is None
    torch.save({"format": FORMAT, "settings": settings, "epoch": 1}, file)
    assert (read_probe(file, settings) or {})["epoch"] == 1
    with pytest.raises(InputError, match=r"another probe \(lr 0.001 -> 0.1; weights a+ -> b+\)"):
        read_probe(file, {**settings, "lr": 0.1, "weights": "b" * 64})
    torch.save({"weight": torch.zeros(1)}, file)
    with pytest.raises(InputError, match="is no linear probe"):
        read_probe(file, settings)
    file.write_bytes(b"cut short")
    with pytest.raises(InputError, match="--resume never"):
        read_probe(file, settings)
