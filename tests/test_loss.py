"""The DINO loss against the paper's double sum, in float64."""

from __future__ import annotations

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
    terms = []
    for g in range(teachers):
        for v in range(views):
            if v == g:
                continue
            for sample in range(B):
                t = (teacher[g * B + sample] - center[0]) / teacher_temp
                s = student[v * B + sample] / student_temp
                p_teacher = torch.exp(t - torch.logsumexp(t, dim=0))
                log_p_student = s - torch.logsumexp(s, dim=0)
                terms.append(-(p_teacher * log_p_student).sum())
    return torch.stack(terms).mean()


def case(views: int) -> tuple[DINOLoss, Tensor, Tensor]:
    loss = DINOLoss(K).double()
    loss.center.copy_(0.1 * torch.randn(1, K))
    student = torch.randn(views * B, K, dtype=torch.float64, requires_grad=True)
    return loss, student, 0.2 * torch.randn(2 * B, K, dtype=torch.float64)


@pytest.mark.parametrize("views", [2, 3, 6, 10])
@pytest.mark.parametrize("teacher_temp", [0.04, 0.07])
def test_value_and_gradient_are_those_of_the_double_sum(views: int, teacher_temp: float) -> None:
    loss, student, teacher = case(views)
    value = loss(student, teacher, teacher_temp)
    expected = oracle(student, teacher, loss.center, teacher_temp)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(value, student)
    (oracle_gradient,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(gradient, oracle_gradient, rtol=1e-10, atol=1e-14)
    assert float(gradient.abs().min()) > 0


def test_the_gradient_passes_gradcheck() -> None:
    loss, student, teacher = case(4)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher, 0.05), (student,))


@pytest.mark.parametrize("student_temp", [0.1, 0.3])
def test_the_student_has_its_own_temperature(student_temp: float) -> None:
    _, student, teacher = case(4)
    loss = DINOLoss(K, student_temp=student_temp).double()
    torch.testing.assert_close(
        loss(student, teacher, 0.05), oracle(student, teacher, loss.center, 0.05, student_temp), rtol=1e-12, atol=0
    )


def test_other_numbers_of_global_views_follow_the_same_sum() -> None:
    for teachers, views in ((1, 2), (1, 5), (3, 4)):
        loss = DINOLoss(K, global_views=teachers).double()
        student = torch.randn(views * B, K, dtype=torch.float64)
        teacher = 0.2 * torch.randn(teachers * B, K, dtype=torch.float64)
        torch.testing.assert_close(loss(student, teacher, 0.05), oracle(student, teacher, loss.center, 0.05))


def test_no_gradient_reaches_the_teacher_or_the_centre() -> None:
    loss, student, teacher = case(4)
    teacher.requires_grad_()
    loss(student, teacher, 0.04).backward()
    assert teacher.grad is None
    assert not loss.center.requires_grad
    assert not loss.teacher_probabilities(teacher, 0.04).requires_grad


def test_the_centre_moves_only_when_told_and_then_as_a_moving_average() -> None:
    loss, student, teacher = case(4)
    before = loss.center.clone()
    first = loss(student, teacher, 0.04)
    assert torch.equal(loss.center, before)  # forward is pure
    assert torch.equal(loss(student, teacher, 0.04), first)
    mean = teacher.mean(dim=0, keepdim=True)
    loss.update_center(mean)
    torch.testing.assert_close(loss.center, 0.9 * before + 0.1 * mean, rtol=1e-14, atol=0)
    # and what comes next uses the new one
    torch.testing.assert_close(loss(student, teacher, 0.04), oracle(student, teacher, loss.center, 0.04))
    assert not torch.equal(loss(student, teacher, 0.04), first)


def test_the_centre_s_momentum_is_a_setting() -> None:
    loss = DINOLoss(K, center_momentum=0.5)
    loss.update_center(torch.ones(1, K))
    loss.update_center(torch.ones(1, K))
    assert torch.equal(loss.center, torch.full((1, K), 0.75))


def test_a_rejected_step_leaves_the_centre_s_bits() -> None:
    loss = DINOLoss(K)
    loss.center.copy_(torch.randn(1, K))
    before = loss.center.clone()
    loss.update_center(torch.full((1, K), float("nan")), accepted=torch.tensor(False))
    assert torch.equal(loss.center, before)
    loss.update_center(torch.ones(1, K), accepted=torch.tensor(True))
    torch.testing.assert_close(loss.center, 0.9 * before + 0.1)


def test_the_centre_is_part_of_the_state_under_dinos_name() -> None:
    assert list(DINOLoss(K).state_dict()) == ["center"]
    assert DINOLoss(K).state_dict()["center"].shape == (1, K)
    assert bool((DINOLoss(K).center == 0).all())


def sinkhorn_oracle(scores: Tensor, iterations: int) -> Tensor:
    """Softmax rows; then, in turn, columns scaled to the same sum and rows to 1."""
    table = torch.exp(scores) / torch.exp(scores).sum(dim=1, keepdim=True)
    rows, columns = table.shape
    for _ in range(iterations):
        table = table / table.sum(dim=0, keepdim=True) * (rows / columns)
        table = table / table.sum(dim=1, keepdim=True)
    return table


@pytest.mark.parametrize("iterations", [0, 1, 3, 7])
def test_sinkhorn_knopp_is_the_softmax_scaled_in_turn(iterations: int) -> None:
    scores = 3 * torch.randn(6, K, dtype=torch.float64)
    torch.testing.assert_close(
        sinkhorn_knopp(scores, iterations), sinkhorn_oracle(scores, iterations), rtol=1e-12, atol=0
    )


def test_sinkhorn_knopp_uses_every_prototype_alike_and_keeps_rows_distributions() -> None:
    scores = torch.randn(40, K, dtype=torch.float64)
    scores[:, 0] += 5  # a prototype that every image prefers
    assert float(scores.softmax(dim=1)[:, 0].mean()) > 0.8
    shared = sinkhorn_knopp(scores, 50)
    torch.testing.assert_close(shared.sum(dim=1), torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(shared.mean(dim=0), torch.full((K,), 1 / K, dtype=torch.float64), rtol=1e-6, atol=0)
    after_three = sinkhorn_knopp(scores)
    torch.testing.assert_close(after_three.sum(dim=1), torch.ones(40, dtype=torch.float64))
    assert float(after_three.mean(dim=0).max()) < 1.05 / K


def test_sinkhorn_knopp_goes_where_swav_s_start_on_a_common_scale_goes() -> None:
    scores = 2 * torch.randn(9, K, dtype=torch.float64)
    table = scores.exp()
    for _ in range(200):
        table = table / table.sum(dim=0, keepdim=True)
        table = table / table.sum(dim=1, keepdim=True)
    torch.testing.assert_close(sinkhorn_knopp(scores, 200), table, rtol=1e-8, atol=0)


def test_sinkhorn_knopp_survives_scores_beyond_float32_s_exponentials() -> None:
    shared = sinkhorn_knopp(1e3 * torch.randn(20, K))
    assert bool(torch.isfinite(shared).all())
    torch.testing.assert_close(shared.sum(dim=1), torch.ones(20))
    assert bool(sinkhorn_knopp(torch.full((4, K), float("nan"))).isnan().all())  # so that the step is rejected


def test_the_loss_with_sinkhorn_knopp_has_its_targets_and_ignores_the_centre() -> None:
    loss, student, teacher = case(4)
    loss.centering = "sinkhorn_knopp"
    targets = sinkhorn_oracle(teacher / 0.05, 3)
    terms = []
    for g in range(2):
        for v in range(4):
            if v != g:
                log_p = (student[v * B : v * B + B] / 0.1).log_softmax(dim=1)
                terms.append(-(targets[g * B : g * B + B] * log_p).sum(dim=1).mean())
    value = loss(student, teacher, 0.05)
    torch.testing.assert_close(value, torch.stack(terms).mean(), rtol=1e-12, atol=0)
    loss.center.fill_(3.0)
    assert torch.equal(loss(student, teacher, 0.05), value)


def test_another_centering_is_refused() -> None:
    with pytest.raises(InputError, match="sinkhorn_knopp"):
        DINOLoss(K, centering="sinkhorn")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_logits_give_a_float32_loss(dtype: torch.dtype) -> None:
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
        ((B, K), (2 * B, K)),  # fewer views than global ones
        ((7, K), (2 * B, K)),  # rows that do not divide
        ((4 * B, K), (5, K)),
        ((0, K), (0, K)),
        ((4 * B, K), (2 * B, K - 1)),  # other prototypes
        ((4 * B, K - 1), (2 * B, K)),
        ((4 * B, 1), (2 * B, K)),  # broadcasting must not hide it
        ((4 * B, K), (2 * B, 1)),
        ((4 * B, K + 1), (2 * B, K + 1)),  # not the centre's
        ((4 * B, K, 1), (2 * B, K)),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    with pytest.raises(InputError):
        DINOLoss(K)(torch.randn(student), torch.randn(teacher), 0.04)


def test_one_global_view_needs_a_second_view() -> None:
    with pytest.raises(InputError):
        DINOLoss(K, global_views=1)(torch.randn(B, K), torch.randn(B, K), 0.04)


def test_entropy_of_uniform_certain_and_mixed_rows() -> None:
    assert float(entropy(torch.full((5, K), 1 / K, dtype=torch.float64))) == pytest.approx(math.log(K))
    assert float(entropy(torch.eye(K))) == 0
    mixed = torch.softmax(torch.randn(6, K, dtype=torch.float64), dim=1)
    assert float(entropy(mixed)) == pytest.approx(float(-(mixed * mixed.log()).sum(dim=1).mean()))


def test_cross_entropy_is_entropy_plus_divergence() -> None:
    """loss = H(teacher) + KL(teacher, student) on average over the pairs: the identity the log relies on."""
    loss, student, teacher = case(5)
    targets = loss.teacher_probabilities(teacher, 0.06)
    log_p = (student.detach() / 0.1).log_softmax(dim=1)
    divergences = [
        torch.nn.functional.kl_div(log_p[v * B : v * B + B], targets[g * B : g * B + B], reduction="batchmean")
        for g in range(2)
        for v in range(5)
        if v != g
    ]
    expected = entropy(targets) + torch.stack(divergences).mean()
    torch.testing.assert_close(loss(student, teacher, 0.06).detach(), expected)


def test_a_student_that_equals_its_teachers_has_no_divergence() -> None:
    logits = torch.randn(1, K, dtype=torch.float64).expand(2 * B, K)
    loss = DINOLoss(K, student_temp=0.1).double()
    assert float(loss(logits, logits, 0.1)) == pytest.approx(float(entropy(loss.teacher_probabilities(logits, 0.1))))


def test_feature_std_is_one_when_spread_and_zero_when_collapsed() -> None:
    assert float(feature_std(torch.randn(20_000, 32))) == pytest.approx(1.0, abs=0.01)
    assert float(feature_std(torch.ones(100, 32))) == pytest.approx(0.0, abs=1e-5)
    # lengths do not matter
    spread = torch.randn(500, 16)
    assert float(feature_std(spread * torch.rand(500, 1).add(0.1))) == pytest.approx(
        float(feature_std(spread)), rel=1e-5
    )


@pytest.mark.parametrize("views", [1, 2])
def test_koleo_is_minus_the_log_distance_to_the_nearest_other_image_of_the_view(views: int) -> None:
    features = torch.randn(views * 6, 5, dtype=torch.float64, requires_grad=True)
    terms = []
    for view in features.view(views, 6, 5):
        unit = view / view.norm(dim=1, keepdim=True)
        for i in range(6):
            distances = torch.stack([(unit[i] - unit[j]).norm() for j in range(6) if j != i])
            terms.append(-distances.min().log())
    expected = torch.stack(terms).mean()
    value = koleo(features, views)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(x, features)[0] for x in (value, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-9)


def test_koleo_stays_finite_where_two_images_have_the_same_feature() -> None:
    features = torch.ones(4, 5, requires_grad=True)
    value = koleo(features, 1)
    value.backward()
    assert math.isfinite(float(value.detach()))
    assert features.grad is not None
    assert bool(torch.isfinite(features.grad).all())
