"""Logistic regression by L-BFGS against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_run import CPU

from eval.linear.logistic import TOLERANCE, LogisticRegression, Solution, classify
from eval.linear.pooled import Rows

CLASSES = 4


def problem(images: int = 300, dim: int = 12, noise: float = 2.0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return overlapping classes. As in a backbone, feature means are far from 0 and scales differ."""
    rng = np.random.default_rng(0)
    labels = np.arange(images) % CLASSES
    centres = np.random.default_rng(5).normal(size=(CLASSES, dim))
    features = (centres[labels] + noise * rng.normal(size=(images, dim))) * np.logspace(-1.5, 0.5, dim) + 3
    return features.astype(np.float32), labels


def solve(features: NDArray[np.float32], labels: NDArray[np.int64], c: float, patience: int = 1000) -> Solution:
    return LogisticRegression(Rows(features), labels, CLASSES, CPU).solve(c, patience)


@pytest.mark.parametrize("c", [1e-4, 1.0, 100.0])
def test_solution_matches_scikit_learn(c: float) -> None:
    sklearn = pytest.importorskip("sklearn.linear_model")
    features, labels = problem()
    peer = sklearn.LogisticRegression(C=c, tol=1e-10, max_iter=100_000).fit(features.astype(np.float64), labels)
    found = solve(features, labels, c)
    assert found["converged"]
    logits = torch.from_numpy(features).double() @ found["weight"].t().double() + found["bias"]
    assert np.abs(logits.softmax(dim=1).numpy() - peer.predict_proba(features)).max() < 1e-3
    assert np.abs(found["weight"].numpy() - peer.coef_).max() < 1e-3 * np.abs(peer.coef_).max()


@pytest.mark.parametrize("c", [1.0, 1e5])
def test_separable_classes_reach_minimum_or_are_reported_unconverged(c: float) -> None:
    """A flat loss has small derivatives far from the minimum: C = 1e5 once "converged" at 220 times the minimum."""
    sklearn = pytest.importorskip("sklearn.linear_model")
    features, labels = problem(noise=0.1)
    features /= features.std(axis=0)
    whole = features.astype(np.float64)

    def objective(weight: NDArray[np.float64], bias: NDArray[np.float64]) -> float:
        logits = torch.from_numpy(whole @ weight.T + bias)
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels), reduction="sum")
        return c * float(loss) + float(np.square(weight).sum()) / 2

    peer = sklearn.LogisticRegression(C=c, tol=1e-9, max_iter=100_000, solver="newton-cholesky").fit(whole, labels)
    least = objective(peer.coef_, peer.intercept_)
    found = solve(features, labels, c)
    ours = objective(found["weight"].double().numpy(), found["bias"].double().numpy())
    assert not found["converged"] or ours < 1.01 * least
    assert ours < (1 + found["gap"]) * 1.0001 * least
    impatient = solve(features, labels, c, patience=3)
    assert (impatient["iterations"], impatient["converged"]) == (3, False)
    assert impatient["gradient"] > TOLERANCE


def test_features_with_constant_directions_converge() -> None:
    """Features after a LayerNorm sum to a constant; other features are always 0."""
    features, labels = problem()
    flat = np.concatenate([features, np.zeros((300, 2), np.float32), -features.sum(axis=1, keepdims=True)], axis=1)
    found = solve(flat, labels, 10.0)
    assert found["converged"]
    assert float(found["weight"][:, 12:14].abs().max()) < 1e-5


def test_warm_start_reaches_same_solution() -> None:
    features, labels = problem()
    regression = LogisticRegression(Rows(features), labels, CLASSES, CPU)
    fresh, before = regression.solve(1.0, 1000), regression.solve(0.1, 1000)
    warm = regression.solve(1.0, 1000, (before["weight"], before["bias"]))
    assert float((warm["weight"] - fresh["weight"]).abs().max()) < 1e-2 * float(fresh["weight"].abs().max())
    assert regression.solve(1.0, 1000, (fresh["weight"], fresh["bias"]))["iterations"] <= 2


def test_uncached_features_give_same_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = problem()
    kept = solve(features, labels, 1.0)
    monkeypatch.setattr("eval.linear.logistic._KEPT_BYTES", 0)
    assert torch.equal(solve(features, labels, 1.0)["weight"], kept["weight"])
    monkeypatch.setattr("eval.linear.logistic._ROWS_AT_ONCE", 64)
    assert torch.allclose(solve(features, labels, 1.0)["weight"], kept["weight"], atol=1e-3)


def test_classify_returns_top_five_classes_best_first() -> None:
    rows = Rows(np.array([[1, 5, 2, 4, 3, 0]], dtype=np.float32))
    assert classify(torch.eye(6), torch.zeros(6), rows, CPU).tolist() == [[1, 3, 4, 2, 0]]
