"""SimDINO: loss against the formulas in float64, gradients, two ranks, training. B batch, V views, p dimensions."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_run import CPU, differing_bits, learnt, run, tiny_config
from torch.nn.functional import normalize

from dino_xcit.methods.simdino import coding_rate, view_similarity
from dino_xcit.train import build_state

B, V, P = 5, 4, 7


def random_unit_rows(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(rows, P, generator=generator, dtype=torch.float64), dim=1)


def rate_of(z: NDArray[np.float64], eps: float) -> float:
    """Compute 1/2 logdet(I + p / (m eps) Z^T Z) from the eigenvalues."""
    rows, dim = z.shape
    return 0.5 * float(np.log1p(dim / (rows * eps) * np.linalg.eigvalsh(z.T @ z)).sum())


@pytest.mark.parametrize("eps", [0.5, 0.05])
def test_coding_rate_matches_formula(eps: float) -> None:
    views = [random_unit_rows(B, seed) for seed in (1, 2)]
    expected = np.mean([rate_of(view.numpy(), eps) for view in views])
    assert float(coding_rate(torch.stack(views), eps)) == pytest.approx(expected, rel=1e-12)
    assert float(coding_rate(torch.stack(views).float(), eps)) == pytest.approx(expected, rel=1e-5)


def test_view_similarity_is_mean_cosine_over_pairs_of_different_views() -> None:
    student, teacher = random_unit_rows(V * B, 1), random_unit_rows(2 * B, 2)
    views = [(s, t) for g, t in enumerate(teacher.chunk(2)) for v, s in enumerate(student.chunk(V)) if g != v]
    pairs = [float((s * t).sum(dim=1).mean()) for s, t in views]
    assert float(view_similarity(student, teacher)) == pytest.approx(np.mean(pairs), rel=1e-12)


def test_simdino_loss_passes_gradcheck() -> None:
    teacher = random_unit_rows(2 * B, 2)
    raw = torch.randn(V * B, P, dtype=torch.float64, requires_grad=True)

    def loss(x: torch.Tensor) -> torch.Tensor:
        student = normalize(x, dim=1)
        return -view_similarity(student, teacher) - 0.3 * coding_rate(student[: 2 * B].unflatten(0, (2, B)), 0.5)

    assert torch.autograd.gradcheck(loss, raw)


def test_coding_rate_and_gradient_on_two_ranks_match_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP averages the gradients over ranks, so the average must equal the gradient of the whole batch."""
    whole = random_unit_rows(2 * B, 3).reshape(1, 2 * B, P).requires_grad_()
    expected = coding_rate(whole, 0.5)
    expected.backward()
    halves = [half.detach().clone().requires_grad_() for half in whole.chunk(2, dim=1)]
    covariances = [half.detach().mT @ half.detach() for half in halves]
    monkeypatch.setattr("dino_xcit.methods.simdino.distributed.world_size", lambda: 2)
    assert whole.grad is not None
    # Each rank holds half of the rows, so the average over ranks is half of its own gradient.
    for half, other, part in zip(halves, reversed(covariances), whole.grad.chunk(2, dim=1), strict=True):
        add_the_other = partial(lambda other, tensors: tensors[0].add_(other), other)
        monkeypatch.setattr("dino_xcit.methods.simdino.distributed.all_reduce_sum", add_the_other)
        rate = coding_rate(half, 0.5)
        torch.testing.assert_close(rate, expected)
        torch.testing.assert_close(torch.autograd.grad(rate, half)[0] / 2, part)


def test_simdino_run_trains_and_resumes_exactly() -> None:
    config = tiny_config(method="simdino", lr=1e-3)
    state, results = run(config, 12)
    assert all(bool(result.accepted) for result in results)
    metrics = [result.metrics(state.method) for result in results]
    assert metrics[-1]["cosine"] > metrics[0]["cosine"]
    rows, dim = config.batch_size_per_gpu, config.head_bottleneck_dim
    gamma = (dim + rows) / (dim * rows)
    for row in metrics:
        assert row["loss"] == pytest.approx(-row["cosine"] - gamma * row["coding_rate"], rel=1e-5)
    halfway, _ = run(config, 6)
    resumed = build_state(config, CPU)
    resumed.method.load_state_dict(halfway.method.state_dict())
    resumed.optimizer.load_state_dict(halfway.optimizer.state_dict())
    resumed.step = 6
    assert differing_bits(learnt(run(config, 12, resumed)[0]), learnt(state)) == []
