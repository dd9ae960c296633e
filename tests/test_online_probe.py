"""The online linear probe: it learns, leaves the run unchanged and resumes exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import torch
from tiny_run import CPU, build_state, differing_bits, learnt, tensors_of, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

import run_pretrain
from dino_xcit.data import open_source
from dino_xcit.data.loader import StepSampler
from dino_xcit.metrics import read_metrics
from dino_xcit.train import TrainState
from eval.knn.online import _held_out, _hold_out, build_evaluators, build_probe
from eval.linear.online import OnlineProbe

ALL = np.ones(64, dtype=np.bool_)


def batch_of(labels: torch.Tensor) -> Mock:
    return Mock(labels=labels, indices=torch.arange(len(labels)))


def test_probe_does_not_learn_held_out_images() -> None:
    generator = torch.Generator().manual_seed(0)
    labels, features = torch.arange(64) % 2, torch.randn(64, 128, generator=generator)  # separable by heart
    trained_on = np.arange(64) < 32
    probe = OnlineProbe(128, 2, CPU, trained_on)
    for _ in range(200):
        probe.on_step(Mock(features=features), batch_of(labels))
    assert probe.top1(features[:32].numpy(), labels[:32].numpy()) == 100
    assert 25 < probe.top1(features[32:].numpy(), labels[32:].numpy()) < 75


def test_step_of_the_probe_never_waits_for_the_device() -> None:
    found: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            found.append(operation.name().split(".")[0])
            return operation(*args, **(kwargs or {}))

    probe = OnlineProbe(8, 2, CPU, ALL)
    with Recorder():
        probe.on_step(Mock(features=torch.randn(128, 8)), batch_of(torch.arange(64) % 2))
    assert "aten::mv" in found or "aten::dot" in found
    assert not {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"} & set(found)


def test_every_epoch_spreads_held_out_images_over_its_steps() -> None:
    held_out = _held_out(12_000, 2000, seed=0)
    sampler = StepSampler(12_000, 1000, stop_step=12 * 5)
    for batch in sampler:
        images = [index for _, index in batch]
        assert 100 < np.isin(images, held_out).sum() < 240  # 167 expected


def test_probe_with_other_classes_starts_anew() -> None:
    probe, other = OnlineProbe(8, 2, CPU, ALL), OnlineProbe(8, 3, CPU, ALL)
    other.load_state_dict(probe.state_dict())
    assert other.state_dict()["classifier"]["weight"].shape == (3, 8)


def test_probe_separates_two_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 2
    features = torch.randn(64, 8, generator=generator) + 4 * labels[:, None] - 2
    probe, losses = OnlineProbe(8, 2, CPU, ALL), []
    assert probe.metrics() == {}
    for _ in range(300):
        probe.on_step(Mock(features=features.repeat(2, 1)), batch_of(labels))  # two views of each image
        losses.append(probe.metrics()["probe_loss"])
    assert losses[0] > 0.69  # the classifier starts at zero
    assert losses[-1] < 0.4
    assert probe.top1(features.numpy(), labels.numpy()) > 95
    assert probe.top1(features.numpy(), 1 - labels.numpy()) < 5


def test_probe_without_labels_or_features_has_no_metrics() -> None:
    probe = OnlineProbe(8, 2, CPU, ALL)
    probe.on_step(Mock(features=torch.randn(4, 8)), Mock(labels=None))
    probe.on_step(Mock(features=None), batch_of(torch.zeros(4, dtype=torch.int64)))
    assert probe.metrics() == {}


def pretrain(folder: Path, steps: int, knn_every: int = 1) -> TrainState:
    """Train on the sample, with k-NN and probe at the end of the run."""
    config = tiny_config(
        output_dir=str(folder), max_steps=steps, knn_every=knn_every, knn_holdout=100, log_every=1, num_workers=0,
        save_every=1, batch_size_per_gpu=4, eval_crop=28, eval_resize=28,
    )  # fmt: skip
    return run_pretrain.train(config, CPU)


def test_probe_leaves_out_the_images_of_the_knn() -> None:
    config = tiny_config(knn_every=1, knn_holdout=100)
    source = open_source("sample:fashion-mnist", "train")
    (evaluator,) = build_evaluators(config, source, CPU)
    probe = build_probe(config, source, build_state(config, CPU).method, CPU)
    assert evaluator.name == "knn"
    assert probe is not None
    _, held_out = _hold_out(source, 100, config.seed)
    missing = [source.name(int(index)) for index in torch.nonzero(~probe._trained_on).flatten()]
    assert missing == [held_out.name(index) for index in range(100)]
    assert build_probe(tiny_config(knn_every=1, train_data="sample:fashion-mnist"), source, Mock(), CPU) is None


def test_probe_leaves_the_run_unchanged(tmp_path: Path) -> None:
    with_probe, without = (pretrain(tmp_path / str(every), 2, every) for every in (1, 0))
    assert differing_bits(learnt(with_probe), learnt(without)) == []


def test_resumed_probe_equals_uninterrupted_one(tmp_path: Path) -> None:
    for folder, steps in (("resumed", 1), ("resumed", 3), ("whole", 3)):
        pretrain(tmp_path / folder, steps)
    stored = [torch.load(tmp_path / name / "checkpoint.pth", weights_only=True) for name in ("resumed", "whole")]
    probes = [tensors_of(content["observers"]["OnlineProbe"]) for content in stored]
    assert len(probes[0]) > 4
    assert differing_bits(*probes) == []
    rows = [read_metrics(tmp_path / name / "metrics.jsonl")[-1] for name in ("resumed", "whole")]
    assert rows[0]["probe_top1"] == rows[1]["probe_top1"]
    assert np.isfinite(rows[0]["probe_loss"])
