"""The DINO loss against the double sum of the paper in float64; Sinkhorn-Knopp, entropy, feature std and KoLeo."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from dino_xcit.errors import InputError
from dino_xcit.methods.dino import DINOLoss, entropy, koleo, sinkhorn_knopp
from dino_xcit.methods.student_teacher import feature_std

B, K = 3, 7


def oracle(student: Tensor, teacher: Tensor, center: Tensor, teacher_temp: float, student_temp: float = 0.1) -> Tensor:
    """Mean over all pairs (g, v) of different views, and over samples, of -sum_k P_g[k] log P_v[k]."""
    views, teachers = len(student) // B, len(teacher) // B
    pairs = [(g, v) for g in range(teachers) for v in range(views) if v != g]
    terms = []
    for (g, v), sample in itertools.product(pairs, range(B)):
        t = (teacher[g * B + sample] - center[0]) / teacher_temp
        s = student[v * B + sample] / student_temp
        terms.append(-(torch.exp(t - torch.logsumexp(t, dim=0)) * (s - torch.logsumexp(s, dim=0))).sum())
    return torch.stack(terms).mean()


def case(views: int, teachers: int = 2, student_temp: float = 0.1) -> tuple[DINOLoss, Tensor, Tensor]:
    loss = DINOLoss(K, student_temp=student_temp, global_views=teachers).double()
    loss.center.copy_(0.1 * torch.randn(1, K))
    student = torch.randn(views * B, K, dtype=torch.float64, requires_grad=True)
    return loss, student, 0.2 * torch.randn(teachers * B, K, dtype=torch.float64)


@pytest.mark.parametrize(
    ("teachers", "views", "teacher_temp", "student_temp"),
    [(2, 2, 0.04, 0.1), (2, 3, 0.07, 0.1), (2, 10, 0.04, 0.1), (2, 4, 0.05, 0.3), (1, 2, 0.05, 0.1), (1, 5, 0.05, 0.1),
     (3, 4, 0.05, 0.1)],
)  # fmt: skip
def test_loss_and_gradient_equal_double_sum(
    teachers: int, views: int, teacher_temp: float, student_temp: float
) -> None:
    loss, student, teacher = case(views, teachers, student_temp)
    value = loss(student, teacher, teacher_temp)
    expected = oracle(student, teacher, loss.center, teacher_temp, student_temp)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(value, student)
    (oracle_gradient,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(gradient, oracle_gradient, rtol=1e-10, atol=1e-14)
    in_pairs = gradient[B:] if teachers == 1 else gradient  # the view of a single teacher is in no pair
    assert float(in_pairs.abs().min()) > 0


def test_no_gradient_reaches_teacher_or_center() -> None:
    loss, student, teacher = case(4)
    teacher.requires_grad_()
    loss(student, teacher, 0.04).backward()
    assert teacher.grad is None
    assert not loss.center.requires_grad
    assert not loss.teacher_probabilities(teacher, 0.04).requires_grad


def test_center_is_moving_average_and_changes_only_in_update_center() -> None:
    loss, student, teacher = case(4)
    before = loss.center.clone()
    first = loss(student, teacher, 0.04)
    assert torch.equal(loss.center, before)  # forward has no side effects
    assert torch.equal(loss(student, teacher, 0.04), first)
    mean = teacher.mean(dim=0, keepdim=True)
    loss.update_center(mean)
    torch.testing.assert_close(loss.center, 0.9 * before + 0.1 * mean, rtol=1e-14, atol=0)
    # The next loss uses the new center.
    torch.testing.assert_close(loss(student, teacher, 0.04), oracle(student, teacher, loss.center, 0.04))
    assert not torch.equal(loss(student, teacher, 0.04), first)


def test_skipped_step_keeps_center_bitwise() -> None:
    loss = DINOLoss(K, center_momentum=0.5)
    loss.center.copy_(torch.randn(1, K))
    before = loss.center.clone()
    loss.update_center(torch.full((1, K), float("nan")), accepted=torch.tensor(False))
    assert torch.equal(loss.center, before)
    loss.update_center(torch.ones(1, K), accepted=torch.tensor(True))
    torch.testing.assert_close(loss.center, 0.5 * before + 0.5)


def sinkhorn_oracle(scores: Tensor, iterations: int) -> Tensor:
    """Return softmax rows, with columns scaled to equal sums and rows scaled to 1 alternately."""
    table = torch.exp(scores) / torch.exp(scores).sum(dim=1, keepdim=True)
    rows, columns = table.shape
    for _ in range(iterations):
        table = table / table.sum(dim=0, keepdim=True) * (rows / columns)
        table = table / table.sum(dim=1, keepdim=True)
    return table


@pytest.mark.parametrize("iterations", [0, 1, 7])
def test_sinkhorn_knopp_equals_alternating_scaling_of_softmax(iterations: int) -> None:
    scores = 3 * torch.randn(6, K, dtype=torch.float64)
    expected = sinkhorn_oracle(scores, iterations)
    torch.testing.assert_close(sinkhorn_knopp(scores, iterations), expected, rtol=1e-12, atol=0)


def test_sinkhorn_knopp_is_finite_for_scores_beyond_float32_exp() -> None:
    shared = sinkhorn_knopp(1e3 * torch.randn(20, K))
    assert bool(torch.isfinite(shared).all())
    torch.testing.assert_close(shared.sum(dim=1), torch.ones(20))
    assert bool(sinkhorn_knopp(torch.full((4, K), float("nan"))).isnan().all())  # so that the step is skipped


def test_loss_with_sinkhorn_knopp_uses_its_targets_and_ignores_center() -> None:
    loss, student, teacher = case(4)
    loss.centering = "sinkhorn_knopp"
    targets = sinkhorn_oracle(teacher / 0.05, 3).chunk(2)
    log_p = (student / 0.1).log_softmax(dim=1).chunk(4)
    terms = [-(targets[g] * log_p[v]).sum(dim=1).mean() for g in range(2) for v in range(4) if v != g]
    value = loss(student, teacher, 0.05)
    torch.testing.assert_close(value, torch.stack(terms).mean(), rtol=1e-12, atol=0)
    loss.center.fill_(3.0)
    assert torch.equal(loss(student, teacher, 0.05), value)


def test_unknown_centering_is_refused() -> None:
    with pytest.raises(InputError, match="sinkhorn_knopp"):
        DINOLoss(K, centering="sinkhorn")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_logits_give_float32_loss(dtype: torch.dtype) -> None:
    loss = DINOLoss(K)
    student, teacher = torch.randn(4 * B, K).to(dtype), torch.randn(2 * B, K).to(dtype)
    value = loss(student, teacher, 0.04)
    assert value.dtype is torch.float32
    expected = oracle(student.double(), teacher.double(), loss.center.double(), 0.04)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert loss.teacher_probabilities(teacher, 0.04).dtype is torch.float32


def test_large_logits_do_not_overflow() -> None:
    loss = DINOLoss(K)
    assert math.isfinite(float(loss(1e4 * torch.randn(4 * B, K), 1e4 * torch.randn(2 * B, K), 0.04)))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((B, K), (2 * B, K)),  # fewer student views than teacher views
        ((7, K), (2 * B, K)),  # not a multiple of the batch size
        ((4 * B, K), (5, K)),
        ((0, K), (0, K)),
        ((4 * B, K), (2 * B, K - 1)),  # different numbers of prototypes
        ((4 * B, 1), (2 * B, K)),  # must not broadcast
        ((4 * B, K), (2 * B, 1)),
        ((4 * B, K + 1), (2 * B, K + 1)),  # not the size of the center
        ((4 * B, K, 1), (2 * B, K)),
    ],
)
def test_inconsistent_shapes_are_refused(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"do not form 2 global views|expected \d+ prototypes"):
        DINOLoss(K)(torch.randn(student), torch.randn(teacher), 0.04)


def test_single_global_view_without_other_view_is_refused() -> None:
    with pytest.raises(InputError, match="do not form 1 global views"):
        DINOLoss(K, global_views=1)(torch.randn(B, K), torch.randn(B, K), 0.04)


def test_entropy_of_one_hot_rows_is_zero() -> None:
    assert float(entropy(torch.eye(K))) == 0


def test_loss_equals_teacher_entropy_plus_kl_divergence() -> None:
    """The logged metrics rely on loss = H(teacher) + KL(teacher, student), averaged over the pairs."""
    loss, student, teacher = case(5)
    targets = loss.teacher_probabilities(teacher, 0.06)
    log_p, views = (student.detach() / 0.1).log_softmax(dim=1).chunk(5), targets.chunk(2)
    pairs = [(log_p[v], views[g]) for g in range(2) for v in range(5) if v != g]
    divergences = [torch.nn.functional.kl_div(*pair, reduction="batchmean") for pair in pairs]
    expected = entropy(targets) + torch.stack(divergences).mean()
    torch.testing.assert_close(loss(student, teacher, 0.06).detach(), expected)


def test_feature_std_is_one_for_spread_and_zero_for_collapsed_features() -> None:
    assert float(feature_std(torch.randn(20_000, 32))) == pytest.approx(1.0, abs=0.01)
    assert float(feature_std(torch.ones(100, 32))) == pytest.approx(0.0, abs=1e-5)
    spread = torch.randn(500, 16)
    stretched = spread * torch.rand(500, 1).add(0.1)  # norms do not matter
    torch.testing.assert_close(feature_std(stretched), feature_std(spread), rtol=1e-5, atol=0)


def test_koleo_equals_mean_negative_log_distance_to_nearest_neighbour() -> None:
    features = torch.randn(2 * 6, 5, dtype=torch.float64, requires_grad=True)
    terms = []
    for view in features.view(2, 6, 5):
        unit = view / view.norm(dim=1, keepdim=True)
        for i in range(6):
            distances = torch.stack([(unit[i] - unit[j]).norm() for j in range(6) if j != i])
            terms.append(-distances.min().log())
    expected = torch.stack(terms).mean()
    value = koleo(features, 2)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(x, features)[0] for x in (value, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-9)


def test_koleo_is_finite_for_equal_features() -> None:
    features = torch.ones(4, 5, requires_grad=True)
    value = koleo(features, 1)
    value.backward()
    assert math.isfinite(float(value.detach()))
    assert bool(torch.isfinite(features.grad).all())  # type: ignore[arg-type]
