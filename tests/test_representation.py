"""Label-free metrics of a representation against oracles in NumPy and SciPy, and their evaluator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.linalg import fractional_matrix_power
from tiny_run import CPU, IMAGES, build_state, tiny_config, tiny_source

from dino_xcit import representation
from dino_xcit.config import PretrainConfig
from dino_xcit.representation import (
    Shard,
    build_evaluator,
    count_images,
    epochs_between,
    lidar,
    measures,
    self_clustering,
)

Rows = NDArray[np.float64]


def views(images: int = 200, views: int = 2, dim: int = 12) -> torch.Tensor:
    """Return features [images, views, dim] with noise around each image, and a mean."""
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "dtype": torch.float64}
    scales = torch.logspace(0, -2, dim, dtype=torch.float64)
    return torch.randn(images, 1, dim, **draw) * scales + 0.3 + 0.1 * torch.randn(images, views, dim, **draw)


def effective_rank(values: Rows) -> float:
    shares = values / values.sum()
    shares = shares[shares > 1e-12]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def test_metrics_equal_oracles() -> None:
    features = views()
    rows = features[:, 0].numpy()
    found = measures(features)
    singular = np.linalg.svd(rows, compute_uv=False)
    assert found["rankme"] == pytest.approx(effective_rank(singular), rel=1e-4)
    centred = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False)
    assert found["rankme_centred"] == pytest.approx(effective_rank(centred), rel=1e-4)
    assert found["stable_rank"] == pytest.approx((singular**2).sum() / singular.max() ** 2)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    uniform = len(rows) + len(rows) * (len(rows) - 1) / rows.shape[1]
    clustering = (((unit @ unit.T) ** 2).sum() - uniform) / (len(rows) ** 2 - uniform)
    assert found["self_clustering"] == pytest.approx(clustering)
    assert found["lidar"] == pytest.approx(lidar_oracle(features.numpy()), rel=1e-4)


def lidar_oracle(features: Rows) -> float:
    means = features.mean(axis=1)
    within = sum(np.outer(d, d) for d in (features - means[:, None]).reshape(-1, features.shape[-1]))
    within = within / (len(means) * (features.shape[1] - 1)) + 1e-4 * np.eye(features.shape[-1])
    root = np.real(fractional_matrix_power(within, -0.5))
    return effective_rank(np.linalg.eigvalsh(root @ np.cov(means.T) @ root))


def test_metrics_at_a_collapse() -> None:
    """All images have one feature: raw RankMe and stable rank fall to 1, and self-clustering rises to 1."""
    one = torch.ones(100, 8, dtype=torch.float64)
    found = measures(one[:, None].expand(-1, 2, -1))
    assert (found["rankme"], found["stable_rank"]) == (pytest.approx(1, abs=1e-4), pytest.approx(1))
    assert self_clustering(one) == pytest.approx(1)
    isotropic = torch.eye(8, dtype=torch.float64).repeat(50, 1)
    found = measures(isotropic[:, None].expand(-1, 2, -1))
    assert (found["rankme"], found["stable_rank"]) == (pytest.approx(8, rel=1e-4), pytest.approx(8))
    assert self_clustering(isotropic) == pytest.approx(0, abs=0.02)


def test_lidar_counts_directions_that_separate_images() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(500, 1, 3, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(500, 2, 10, generator=generator, dtype=torch.float64)
    features = torch.nn.functional.pad(images, (0, 7)).expand(-1, 2, -1) + noise
    assert 3 <= lidar(features) < 3.5


def test_features_that_are_not_finite_have_no_metrics() -> None:
    features = views()
    features[3, 1, 2] = torch.nan
    assert measures(features) == {}


@pytest.mark.parametrize(
    ("images", "changes", "expected", "every"),
    [
        (100, {}, 100, 33), (10_000, {}, 512, 2), (600_000, {}, 5000, 1),
        (64_000, {"local_crops_number": 0}, 1280, 1),
    ],
)  # fmt: skip
def test_subset_takes_half_a_percent_of_an_epoch(
    images: int, changes: dict[str, Any], expected: int, every: int
) -> None:
    config = PretrainConfig(**changes)
    assert (count_images(config, images), epochs_between(config, images)) == (expected, every)


def test_evaluator_measures_same_views_at_every_call_and_keeps_the_mode() -> None:
    config = tiny_config()
    method = build_state(config, CPU).method
    _, every, measure = build_evaluator(config, tiny_source(), CPU)
    found = measure(method)
    assert every == epochs_between(config, IMAGES) == 41
    assert found == measure(method)
    assert found.keys() == {"rankme", "rankme_centred", "stable_rank", "self_clustering", "lidar"}
    assert 1 < found["rankme"] <= IMAGES
    assert method.eval_backbone.training


def test_shard_drops_no_image() -> None:
    shard = Shard([[0, 2, 4], [6]])
    assert list(shard) == [[(0, 0), (0, 2), (0, 4)], [(0, 6)]]
    assert len(shard) == 2


def test_evaluator_passes_two_views_of_each_image(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(representation, "measures", lambda features: seen.append(features) or {})
    config = tiny_config()
    build_evaluator(config, tiny_source(), CPU).measure(build_state(config, CPU).method)
    (features,) = seen
    assert features.shape == (IMAGES, 2, 64)
    cosine = torch.nn.functional.normalize(features, dim=2)
    same = (cosine[:, 0] * cosine[:, 1]).sum(dim=1).mean()
    other = (cosine[:, 0] * cosine[:, 1].roll(1, dims=0)).sum(dim=1).mean()
    assert same > other
