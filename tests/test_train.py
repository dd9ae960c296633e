"""One training step: results, skipped steps, frozen last layer, clipping, precision and metrics."""

from __future__ import annotations

import cProfile
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_run import CPU, IMAGES, differing_bits, learnt, run, schedules_of, steps, tensors_of, tiny_config
from torch import Tensor, nn

from dino_xcit.data.loader import Batch
from dino_xcit.methods.dino import entropy
from dino_xcit.methods.student_teacher import feature_std
from dino_xcit.train import TrainState, build_state, train_step
from dino_xcit.transform import normalise

# Regenerate only for an intended change of the mathematics, and mention it in the commit. With PYTHONPATH=.:tests
#   python -c "from tiny_run import *; print([round(float(r.loss), 5) for r in run(tiny_config(), 10)[1]])"
GOLDEN = [2.56046, 3.38142, 2.45692, 2.23663, 2.14314, 2.17795, 2.11824, 1.89464, 2.14661, 1.99153]


def test_ten_steps_reproduce_golden_losses() -> None:
    _, results = run(tiny_config(), 10)
    assert [float(result.loss) for result in results] == pytest.approx(GOLDEN, abs=1e-4)


def test_same_seed_gives_same_bits_and_other_seed_other_weights() -> None:
    first, second = (learnt(run(tiny_config(), 2)[0]) for _ in range(2))
    assert differing_bits(first, second) == []
    other, _ = run(tiny_config(seed=1), 2)
    assert len(differing_bits(first, learnt(other))) > 100


def test_train_step_equals_manual_computation() -> None:
    """Teacher on the global views, student on all views, loss, gradient, one SGD step, moving averages."""
    config = tiny_config(
        optimizer="sgd", lr=0.1, clip_grad=0.0, freeze_last_layer=0, drop_path_rate=0.0, weight_decay=0.02,
        weight_decay_end=0.02, momentum_teacher=0.9, teacher_temp=0.06, warmup_teacher_temp=0.06,
    )  # fmt: skip
    state, reference = build_state(config, CPU), build_state(config, CPU)
    (batch,) = next(steps(config, 0, 1))
    result = train_step(state, [batch], schedules_of(config), config)

    small, large = (normalise(crop, config.mean, config.std) for crop in reversed(batch.crops))
    with torch.no_grad():
        teacher_logits = reference.method.teacher.head(reference.method.teacher.backbone(large).cls_token)
    student = reference.method.student
    features = torch.cat([student.backbone(large).cls_token, student.backbone(small).cls_token])
    student_logits = student.head(features)
    targets = (teacher_logits / 0.06).softmax(dim=1).chunk(2)
    log_p = (student_logits / 0.1).log_softmax(dim=1).chunk(4)
    pairs = [-(targets[g] * log_p[v]).sum(dim=1).mean() for g in range(2) for v in range(4) if g != v]
    loss = torch.stack(pairs).mean()
    loss.backward()
    torch.testing.assert_close(result.loss, loss.detach())
    torch.testing.assert_close(
        result.gradient_norm, torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]).norm()
    )
    after = dict(state.method.student.named_parameters())
    for name, p in student.named_parameters():
        decay = 0.02 if p.ndim > 1 and p.requires_grad else 0.0
        expected = p if p.grad is None else p - 0.1 * (p.grad + decay * p)
        torch.testing.assert_close(after[name].detach(), expected.detach(), rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(state.method.loss.center, 0.1 * teacher_logits.mean(dim=0, keepdim=True))
    old = dict(reference.method.teacher.named_parameters())
    for name, p in state.method.teacher.named_parameters():
        torch.testing.assert_close(p, 0.9 * old[name] + 0.1 * after[name].detach(), rtol=1e-5, atol=1e-6, msg=name)
    assert state.step == 1
    assert int(state.skipped_steps) == 0


def frozen_statistics(state: TrainState) -> TrainState:
    """Fix the statistics of BatchNorm, as batch statistics differ between a batch and its halves."""
    for module in (*state.method.student.modules(), *state.method.teacher.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return state


def test_accumulated_halves_equal_whole_batch_with_frozen_batch_norm() -> None:
    whole = tiny_config(batch_size_per_gpu=8, optimizer="sgd", lr=0.05, drop_path_rate=0.2)
    halves = dataclasses.replace(whole, batch_size_per_gpu=4, accumulation_steps=2)
    states = []
    for config in (whole, halves):
        state, results = run(config, 3, frozen_statistics(build_state(config, CPU)))
        states.append((state, [float(result.loss) for result in results]))
    assert states[0][1] == pytest.approx(states[1][1], rel=1e-5)
    start = dict(build_state(whole, CPU).method.student.named_parameters())
    other = states[1][0].method.student
    for name, parameter in states[0][0].method.student.named_parameters():
        torch.testing.assert_close(parameter, other.get_parameter(name), rtol=1e-4, atol=2e-6, msg=name)
        if name.endswith("qkv.weight"):
            assert float((parameter - start[name]).detach().abs().max()) > 1e-3  # training changed the weights
    torch.testing.assert_close(states[0][0].method.loss.center, states[1][0].method.loss.center, rtol=1e-4, atol=1e-7)


# ---- skipped steps


def poison(what: str, state: TrainState, batch: Batch) -> tuple[Batch, Any]:
    """Make one value of the next step non-finite; return the batch and a hook to remove afterwards, or None."""
    student = state.method.student
    if what == "global view":
        return dataclasses.replace(batch, crops=[spoilt(batch.crops[0], float("nan")), *batch.crops[1:]]), None
    if what == "local view":
        return dataclasses.replace(batch, crops=[batch.crops[0], spoilt(batch.crops[1], float("inf"))]), None
    if what == "gradient":
        weight = student.backbone.get_parameter("blocks.1.mlp.fc1.weight")
        return batch, weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([2]), float("nan")))
    if what == "frozen gradient":
        return batch, student.head.last_layer.weight_v.register_hook(lambda gradient: gradient * float("inf"))
    assert what == "teacher logits"  # softmax maps -inf to zero, so the loss stays finite
    return batch, state.method.teacher.head.register_forward_hook(lambda _, __, out: spoilt(out, -float("inf")))


def spoilt(values: Tensor, number: float) -> Tensor:
    values = values.float().clone()
    values.view(-1)[0] = number
    return values


@pytest.mark.parametrize(
    ("what", "optimizer", "first", "passes"),
    [
        ("global view", "adamw", 2, 1),
        ("global view", "adamw", 0, 1),  # the optimizer has no state yet
        ("global view", "adamw", 1, 3),  # the second of three passes
        ("local view", "adamw", 2, 1),
        ("gradient", "adamw", 2, 1),
        ("gradient", "lars", 2, 1),
        ("frozen gradient", "adamw", 2, 1),
        ("teacher logits", "adamw", 2, 1),
    ],
)
def test_step_with_non_finite_value_is_skipped_and_changes_no_bit(
    what: str, optimizer: str, first: int, passes: int
) -> None:
    config = tiny_config(optimizer=optimizer, drop_path_rate=0.0, batch_size_per_gpu=4, accumulation_steps=passes)
    state, _ = run(config, first)
    before = learnt(state)
    (batches,) = steps(config, first, first + 1)
    batches[passes // 2], hook = poison(what, state, batches[passes // 2])
    assert not bool(train_step(state, batches, schedules_of(config), config).accepted)
    assert [path for path in differing_bits(before, learnt(state)) if path in before] == []
    assert (state.step, int(state.skipped_steps)) == (first + 1, 1)
    if hook:
        hook.remove()
    _, (result,) = run(config, first + 2, state)
    assert bool(result.accepted)
    assert math.isfinite(float(result.loss))
    assert int(state.skipped_steps) == 1
    assert {
        "/method/dino_loss/center",
        "/method/student/backbone.cls_token",
        "/method/teacher/backbone.cls_token",
    } <= set(differing_bits(before, learnt(state)))


# ---- frozen last layer, clipping


def test_last_layer_is_fixed_during_frozen_epochs_and_trains_afterwards() -> None:
    config = tiny_config(freeze_last_layer=1, norm_last_layer=False)
    state = build_state(config, CPU)
    epoch = IMAGES // config.batch_size_per_gpu

    method = state.method

    def last_layers() -> dict[str, Tensor]:
        return tensors_of([dict(net.head.last_layer.state_dict()) for net in (method.student, method.teacher)])

    start = last_layers()
    run(config, epoch, state)
    assert differing_bits(start, last_layers()) == []
    run(config, epoch + 1, state)
    assert len(differing_bits(start, last_layers())) == 4  # weight_g and weight_v of student and teacher


@pytest.mark.parametrize("mode", ["per-parameter", "global"])
def test_clip_grad_bounds_parameter_change(mode: str) -> None:
    config = tiny_config(
        optimizer="sgd", lr=1.0, clip_grad=0.01, clip_mode=mode, weight_decay=0.0, weight_decay_end=0.0,
        freeze_last_layer=0,
    )  # fmt: skip
    state = build_state(config, CPU)
    student = state.method.student
    before = [p.detach().clone() for p in student.parameters()]
    _, results = run(config, 1, state)
    moved = torch.stack([(p.detach() - old).norm() for p, old in zip(student.parameters(), before, strict=True)])
    assert float(results[0].gradient_norm) > 0.02  # before clipping
    if mode == "global":
        assert float(moved.norm()) == pytest.approx(0.01, rel=1e-2)
    else:
        assert float(moved.max()) == pytest.approx(0.01, rel=1e-2)
        assert float(moved.norm()) > 0.02


# ---- views, precision, metrics


def test_local_crops_of_global_size_share_batch_but_skip_teacher() -> None:
    config = tiny_config(local_crops_size=28, local_crops_scale=(0.4, 1.0))
    (batch,) = next(steps(config, 0, 1))
    assert batch.views == [4]
    _, results = run(config, 1)
    assert float(results[0].stats["rows"]) == 2 * config.batch_size_per_gpu
    reference = build_state(config, CPU).method.teacher
    with torch.no_grad():
        expected = reference([normalise(batch.crops[0][:16], config.mean, config.std)])
    torch.testing.assert_close(results[0].stats["teacher_logits"], expected.logits.sum(dim=0, keepdim=True))
    torch.testing.assert_close(results[0].features, expected.features)


def test_step_without_local_crops_is_accepted() -> None:
    _, (result,) = run(tiny_config(local_crops_number=0), 1)
    assert bool(result.accepted)


def test_bf16_steps_stay_close_to_fp32() -> None:
    config = tiny_config(lr=1e-4, seed=1)  # AdamW's first step is a sign; with some seeds tiny gradients flip it
    _, exact = run(config, 3)
    state, low = run(dataclasses.replace(config, precision="bf16"), 3)
    assert all(bool(result.accepted) for result in low)
    assert float(low[0].loss) == pytest.approx(float(exact[0].loss), rel=0.01)
    assert [float(r.loss) for r in low] == pytest.approx([float(r.loss) for r in exact], rel=0.015)
    assert float(low[0].loss) != float(exact[0].loss)
    assert {p.dtype for p in state.method.student.parameters()} == {torch.float32}
    assert state.method.loss.center.dtype is torch.float32


def with_scale(state: TrainState, scale: float) -> TrainState:
    """Set a fitting loss scale, which a run finds only in its first steps. This narrow head has large gradients."""
    state.scaler.scale(torch.zeros(()))
    state.scaler.update(scale)
    return state


def test_fp16_loss_scale_does_not_change_step() -> None:
    config = tiny_config(optimizer="sgd", lr=1e-4, clip_grad=0.0, drop_path_rate=0.0)
    plain, exact = run(config, 1)
    half = dataclasses.replace(config, precision="fp16")
    state = with_scale(build_state(half, CPU), 8.0)
    _, low = run(half, 1, state)
    assert bool(low[0].accepted)
    assert float(low[0].loss) == pytest.approx(float(exact[0].loss), rel=0.01)
    assert float(low[0].gradient_norm) == pytest.approx(float(exact[0].gradient_norm), rel=0.05)
    start = build_state(config, CPU)
    half_way, whole_way, origin = (
        torch.cat([p.detach().flatten() for p in s.method.trained.parameters()]) for s in (state, plain, start)
    )
    assert float((half_way - whole_way).norm()) < 0.1 * float((whole_way - origin).norm())


def test_fp16_overflow_skips_step_and_lowers_scale() -> None:
    config = tiny_config(precision="fp16")
    state = with_scale(build_state(config, CPU), 8.0)
    run(config, 1, state)
    assert int(state.skipped_steps) == 0
    assert state.scaler.get_scale() == 8.0
    before = learnt(state)
    state.scaler.update(2.0**100)
    run(config, 2, state)
    assert int(state.skipped_steps) == 1
    assert differing_bits(before, learnt(state)) == []
    assert state.scaler.get_scale() == 2.0**99
    state.scaler.update(8.0)
    run(config, 3, state)
    assert int(state.skipped_steps) == 1
    assert differing_bits(before, learnt(state)) != []


def test_step_calls_few_functions_around_forward_backward_and_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host must stay ahead of a GPU, and its time grows with the calls."""
    config, profile = tiny_config(), cProfile.Profile()
    state, _ = run(config, 1)
    (batches,) = steps(config, 1, 2)

    def unseen(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            profile.disable()
            try:
                return function(*args, **options)
            finally:
                profile.enable()

        return call

    monkeypatch.setattr(state.method, "forward_backward", unseen(state.method.forward_backward))
    for name in ("step", "zero_grad"):
        monkeypatch.setattr(state.optimizer, name, unseen(getattr(state.optimizer, name)))
    profile.enable()
    train_step(state, batches, schedules_of(config), config)
    profile.disable()
    calls = sum(entry.callcount for entry in profile.getstats())
    assert calls < 300 + len(state.parameters), calls


def test_step_metrics_equal_their_definitions() -> None:
    config = tiny_config(warmup_teacher_temp=0.04, teacher_temp=0.07, warmup_teacher_temp_epochs=2, warmup_epochs=1.0)
    state = build_state(config, CPU)
    center = state.method.loss.center.clone()
    _, (result,) = run(config, 1, state)
    metrics = result.metrics(state.method)
    (batch,) = next(steps(config, 0, 1))
    fresh = build_state(config, CPU).method
    with torch.no_grad():
        logits, features = fresh.teacher([normalise(batch.crops[0], config.mean, config.std)])
    assert metrics["loss"] == pytest.approx(float(result.loss))
    assert metrics["gradient_norm"] == pytest.approx(float(result.gradient_norm))
    assert metrics["feature_std"] == pytest.approx(float(feature_std(features)))
    assert metrics["lr"] == 0.0  # first step of the warm-up
    assert metrics["weight_decay"] == pytest.approx(0.04)
    assert metrics["momentum"] == pytest.approx(0.996)
    assert metrics["teacher_temp"] == pytest.approx(0.04)
    # loss = entropy + divergence holds for the center that the loss used.
    used = entropy(((logits - center) / 0.04).softmax(dim=1))
    assert metrics["teacher_entropy"] == pytest.approx(float(used), rel=1e-5)
    assert metrics["kl"] == pytest.approx(metrics["loss"] - metrics["teacher_entropy"])
