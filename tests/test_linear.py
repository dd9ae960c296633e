"""The linear probe against torch's own SGD and schedule, torchvision's crops, and what holding out must mean."""

from __future__ import annotations

import itertools
import math
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from eval_fixtures import SMALL, MeanColours, image_tree, noise_source
from PIL import Image
from tiny_run import CPU, differing_bits
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF

from dino_xcit.data import UndecodableImage, open_source
from dino_xcit.data.loader import StepSampler
from dino_xcit.errors import InputError
from dino_xcit.models import BackboneOutput
from eval.linear.pooled import Rows
from eval.linear.probe import FORMAT, read_probe
from eval.linear.sgd import LinearHeads, cosine_factor, final_results, linear, scaled
from eval.linear.views import Views, draw_crop, hold_out, live_features, probe_batches, random_view

CLASSES, DIM = 4, 6


def batches(count: int, size: int = 16, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Features whose class can be told from them, and labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(9))
    out = []
    for _ in range(count):
        labels = torch.randint(CLASSES, (size,), generator=generator)
        out.append((centres[labels] + 0.5 * torch.randn(size, DIM, generator=generator), labels))
    return out


def rows(features: Any) -> Rows:
    return Rows(np.asarray(features, dtype=np.float32))


def heads_of(lrs: Sequence[float], seed: int = 0) -> LinearHeads:
    return LinearHeads(lrs, CLASSES, DIM, seed, CPU)


def test_each_classifier_ends_where_torchs_sgd_would_have_taken_it_alone() -> None:
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


def test_classifiers_start_alike_with_deviation_a_hundredth_and_no_bias() -> None:
    state = LinearHeads([0.1, 0.2], 1000, 384, seed=3, device=CPU).state_dict()
    assert (state["weight"][0] == state["weight"][1]).all()
    assert float(state["weight"].std()) == pytest.approx(0.01, rel=0.01)
    assert (state["bias"] == 0).all()


def test_images_that_are_held_out_teach_nothing() -> None:
    taken = torch.tensor([1.0, 0.0] * 8)
    masked, only, fresh = (heads_of([0.1]) for _ in range(3))
    for features, labels in batches(4):
        loss = masked.step(features, labels, taken, 1.0)
        assert loss == pytest.approx(only.step(features[::2], labels[::2], torch.ones(8), 1.0), rel=1e-5)
    assert torch.allclose(masked.state_dict()["weight"], only.state_dict()["weight"], atol=1e-6)
    fresh.step(features, labels, torch.zeros(16), 1.0)
    assert torch.equal(fresh.folded(0)[0], heads_of([0.1]).folded(0)[0])


def test_standardising_is_folded_into_a_classifier_of_the_raw_features() -> None:
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
    """Two classifiers of seven features: the identity, and its opposite."""
    heads = LinearHeads([0.1, 1.0], 7, 7, 0, CPU)
    state = heads.state_dict()
    state["weight"][0], state["weight"][1] = torch.eye(7), -torch.eye(7)
    heads.load_state_dict(state)
    return heads


def test_guesses_are_the_first_five_best_first() -> None:
    features = np.array([[7, 6, 5, 4, 3, 2, 1]])
    assert opposites().guesses(rows(features), [0, 1]).tolist() == [[[0, 1, 2, 3, 4]], [[6, 5, 4, 3, 2]]]
    assert opposites().guesses(rows(features[:0]), [1]).shape == (1, 0, 5)


def test_learning_rates_scale_with_the_batch_and_fall_by_a_cosine() -> None:
    assert scaled(0.001, 1024) == pytest.approx(0.004)
    assert [cosine_factor(epoch, 4) for epoch in range(4)] == pytest.approx(
        [1.0, 0.5 + 0.5 / math.sqrt(2), 0.5, 0.5 - 0.5 / math.sqrt(2)]
    )


def test_a_probe_goes_on_exactly_where_it_stopped() -> None:
    data = batches(8)
    whole, first, second = (heads_of([0.1, 1.0], seed) for seed in (0, 0, 1))
    for features, labels in data:
        whole.step(features, labels, torch.ones(16), 0.7)
    for features, labels in data[:3]:
        first.step(features, labels, torch.ones(16), 0.7)
    second.load_state_dict(first.state_dict())
    for features, labels in data[3:]:
        second.step(features, labels, torch.ones(16), 0.7)
    assert differing_bits(whole.state_dict(), second.state_dict()) == []


def _half_of_each_batch(rank: int, meeting: str, queue: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    heads = heads_of([0.05, 0.5])
    taken = torch.tensor([1.0] * 9 + [0.0] * 7)  # the two halves count differently
    for features, labels in batches(4):
        half = slice(8 * rank, 8 * rank + 8)
        loss = heads.step(features[half], labels[half], taken[half], 1.0)
    queue.put((rank, heads.state_dict()["weight"].tolist(), loss.tolist()))
    dist.destroy_process_group()


def test_two_processes_with_half_the_images_each_learn_the_same(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue: Any = context.SimpleQueue()
    processes = [
        context.Process(target=_half_of_each_batch, args=(rank, str(tmp_path / "meeting"), queue)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    results = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    alone = heads_of([0.05, 0.5])
    for features, labels in batches(4):
        loss = alone.step(features, labels, torch.tensor([1.0] * 9 + [0.0] * 7), 1.0)
    for _, weight, losses in results:
        assert torch.allclose(torch.tensor(weight), alone.state_dict()["weight"], atol=1e-5)
        assert losses == pytest.approx(loss.tolist(), rel=1e-5)


# ---- images


def test_crops_have_the_areas_ratios_and_places_of_torchvisions() -> None:
    rng = np.random.default_rng(0)
    scale = (0.08, 1.0)
    ours = np.array([draw_crop(60, 40, scale, rng.random(23).tolist()) for _ in range(4000)])
    left, top, right, bottom = ours.T
    assert left.min() == 0
    assert top.min() == 0
    assert right.max() == 60
    assert bottom.max() == 40
    picture = Image.new("RGB", (60, 40))
    theirs = np.array([RandomResizedCrop.get_params(picture, list(scale), [3 / 4, 4 / 3]) for _ in range(4000)])
    pairs = {
        "area": ((right - left) * (bottom - top), theirs[:, 2] * theirs[:, 3]),
        "ratio": ((right - left) / (bottom - top), theirs[:, 3] / theirs[:, 2]),
        "top": (top, theirs[:, 0]),
        "left": (left, theirs[:, 1]),
    }
    for name, (mine, peer) in pairs.items():
        for share in (10, 25, 50, 75, 90):
            spread = peer.max() - peer.min()
            assert np.percentile(mine, share) == pytest.approx(np.percentile(peer, share), abs=0.06 * spread), name


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (10, 1000), (1, 1), (3, 1)])
def test_pictures_that_no_crop_fits_give_the_largest_allowed_centre(width: int, height: int) -> None:
    left, top, right, bottom = draw_crop(width, height, (0.99, 1.0), [0.999] * 23)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert abs(left - (width - right)) <= 1
    if max(width, height) == 1000:
        assert (right - left) / (bottom - top) == pytest.approx(4 / 3 if width > height else 3 / 4, abs=0.05)


def test_a_view_is_torchvisions_resized_crop_and_flip(photo: Image.Image) -> None:
    flipped = 0
    for index in range(20):
        view = np.asarray(random_view(photo, 24, (0.08, 1.0), seed=1, epoch=2, index=index))
        numbers = np.random.Generator(np.random.Philox(key=[1, (2 << 40) | index])).random(23).tolist()
        left, top, right, bottom = draw_crop(photo.width, photo.height, (0.08, 1.0), numbers)
        peer = TF.resized_crop(photo, top, left, bottom - top, right - left, [24, 24], InterpolationMode.BILINEAR)
        as_it_is = np.array_equal(view, np.asarray(peer))
        mirrored = np.array_equal(view, np.asarray(TF.hflip(peer)))
        assert as_it_is or mirrored
        flipped += mirrored
    assert 4 <= flipped <= 16


def test_a_view_depends_on_seed_epoch_and_image_alone(photo: Image.Image) -> None:
    def view(seed: int, epoch: int, index: int) -> bytes:
        return random_view(photo, 16, (0.08, 1.0), seed, epoch, index).tobytes()

    assert view(0, 0, 0) == view(0, 0, 0)
    assert len({view(0, 0, 0), view(1, 0, 0), view(0, 1, 0), view(0, 0, 1)}) == 4


def _probe_batches(workers: int, rank: int = 0, world: int = 1) -> list[tuple[Tensor, Tensor]]:
    sampler = StepSampler(20, 6 // world, rank=rank, world_size=world, seed=5, start_step=1, stop_step=6)
    views = Views(noise_source(20), SMALL, (0.3, 1.0), 5)
    return [tuple(batch) for batch in probe_batches(views, sampler, workers, CPU)]


def test_batches_are_the_same_with_any_number_of_loaders_and_processes() -> None:
    alone, helped = _probe_batches(0), _probe_batches(2)
    halves = [_probe_batches(0, rank, 2) for rank in (0, 1)]
    assert len(alone) == 5
    for step, batch in enumerate(alone):
        assert (batch[0].shape, batch[0].dtype) == ((6, 3, 8, 8), torch.uint8)
        for one, other, first, second in zip(batch, helped[step], halves[0][step], halves[1][step], strict=True):
            assert torch.equal(one, other)
            assert torch.equal(one, torch.cat([first, second]))


def test_a_damaged_training_image_is_named_and_one_whose_features_are_not_finite(tmp_path: Path) -> None:
    tree = image_tree(tmp_path / "data")
    (tree / "train" / "bars" / "bars 03.png").write_bytes(b"")
    source = open_source(str(tree / "train"))
    for workers in (0, 1):
        views, sampler = Views(source, SMALL, (0.3, 1.0), 0), StepSampler(len(source), 8, stop_step=3)
        with pytest.raises(UndecodableImage, match=r"bars 03\.png cannot be read: empty file"):
            list(probe_batches(views, sampler, workers, CPU))

    class Diverged(MeanColours):
        def forward(self, images: Tensor) -> BackboneOutput:
            out = super().forward(images)
            out.cls_token[2] = float("nan")
            return out

    views, sampler = Views(noise_source(20), SMALL, (0.3, 1.0), 0), StepSampler(20, 8, stop_step=1)
    (third,) = [keys[2][1] for keys in sampler]
    with pytest.raises(InputError, match=f"{third} are not finite"):
        list(live_features(Diverged().eval(), views, sampler, 0, CPU))


def test_the_held_out_part_is_a_share_of_every_class_and_repeatable() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [100, 50, 10]))
    held = hold_out(labels, 0.1, seed=0)
    assert np.bincount(labels[held]).tolist() == [10, 5, 1]
    assert (np.diff(held) > 0).all()
    assert (held == hold_out(labels, 0.1, seed=0)).all()
    assert (held != hold_out(labels, 0.1, seed=1)).any()
    assert len(hold_out(labels, 0.0, seed=0)) == 0
    assert len(hold_out(np.array([0, 1, 1]), 0.9, seed=0)) == 1, "a class keeps an image to learn from"


# ---- figures and file


def test_the_grid_is_chosen_on_held_out_images_and_only_then_measured() -> None:
    """Of two classifiers, one is right on the held-out images and the other on the validation images."""
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


def test_a_probe_file_is_refused_to_another_probe(tmp_path: Path) -> None:
    file, settings = tmp_path / "linear.pth", {"lr": 0.001, "lrs": [0.1, 1.0], "weights": "a" * 64}
    assert read_probe(file, settings) is None
    torch.save({"format": FORMAT, "settings": settings, "epoch": 1}, file)
    found = read_probe(file, settings)
    assert found is not None
    assert found["epoch"] == 1
    with pytest.raises(InputError, match=r"another probe \(lr 0.001 -> 0.1; weights a+ -> b+\)"):
        read_probe(file, {**settings, "lr": 0.1, "weights": "b" * 64})
    torch.save({"weight": torch.zeros(1)}, file)
    with pytest.raises(InputError, match="is no linear probe"):
        read_probe(file, settings)
    file.write_bytes(b"cut short")
    with pytest.raises(InputError, match="--resume never"):
        read_probe(file, settings)
