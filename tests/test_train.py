"""One training step: what it computes, what it leaves alone, what it rejects."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from tiny_run import CPU, IMAGES, differing_bits, learnt, run, schedules_of, steps, tensors_of, tiny_config
from torch import Tensor, nn

from dino_xcit.data.loader import Batch
from dino_xcit.methods.dino import entropy
from dino_xcit.methods.student_teacher import choose_precision, feature_std
from dino_xcit.optim import OPTIMIZERS
from dino_xcit.train import TrainState, build_state, train_step
from dino_xcit.transform import normalise

# Regenerate (only when the mathematics is meant to change, and say so in the commit), with PYTHONPATH=.:tests
#   python -c "from tiny_run import *; print([round(float(r.loss), 5) for r in run(tiny_config(), 10)[1]])"
GOLDEN = [2.56046, 3.38142, 2.45692, 2.23663, 2.14314, 2.17795, 2.11824, 1.89464, 2.14661, 1.99153]


def test_ten_steps_give_the_golden_losses() -> None:
    _, results = run(tiny_config(), 10)
    assert [float(result.loss) for result in results] == pytest.approx(GOLDEN, abs=1e-4)


def test_the_same_seed_gives_the_same_bits_and_another_seed_other_weights() -> None:
    first, second = (learnt(run(tiny_config(), 2)[0]) for _ in range(2))
    assert differing_bits(first, second) == []
    other, _ = run(tiny_config(seed=1), 2)
    assert len(differing_bits(first, learnt(other))) > 100


def test_nothing_in_a_step_depends_on_torchs_global_generator() -> None:
    """Drop-path's masks and the crops follow from (seed, epoch, image), so a resumed run needs no stored generator."""
    config = tiny_config(drop_path_rate=0.5)
    first = build_state(config, CPU)
    second = build_state(config, CPU)
    run(config, 2, first)
    torch.manual_seed(1234)
    torch.rand(10)
    run(config, 2, second)
    assert differing_bits(learnt(first), learnt(second)) == []


def test_the_step_is_the_algorithm_written_out() -> None:
    """Teacher on the global views, student on all, loss, gradient, one SGD step, moving averages: by hand."""
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
    """BatchNorm with fixed statistics: where a batch's mean enters, no split of the batch can be equal."""
    for module in (*state.method.student.modules(), *state.method.teacher.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return state


def test_two_accumulated_halves_equal_the_whole_batch_where_batchnorm_does_not_mix() -> None:
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
            assert float((parameter - start[name]).detach().abs().max()) > 1e-3  # it did learn
    torch.testing.assert_close(states[0][0].method.loss.center, states[1][0].method.loss.center, rtol=1e-4, atol=1e-7)


def test_accumulation_updates_centre_teacher_and_optimizer_once_a_step() -> None:
    config = tiny_config(batch_size_per_gpu=4, accumulation_steps=2)
    state, _ = run(config, 1)
    assert state.step == 1
    assert {float(s["step"]) for s in state.optimizer.state_dict()["state"].values()} == {1.0}


# ---- rejected steps


def poisoned_batch(batch: Batch) -> Batch:
    crops = [crop.float() for crop in batch.crops]
    crops[0][3, 1, 5, 5] = float("nan")
    return dataclasses.replace(batch, crops=crops)


class Poison:
    """Ways in which one number of a step stops being finite."""

    @staticmethod
    def image(state: TrainState, batch: Batch) -> tuple[Batch, Any]:
        return poisoned_batch(batch), None

    @staticmethod
    def local_view_only(state: TrainState, batch: Batch) -> tuple[Batch, Any]:
        crops = [batch.crops[0], batch.crops[1].float()]
        crops[1][0, 0, 0, 0] = float("inf")
        return dataclasses.replace(batch, crops=crops), None

    @staticmethod
    def gradient(state: TrainState, batch: Batch) -> tuple[Batch, Any]:
        weight = state.method.student.backbone.get_parameter("blocks.1.mlp.fc1.weight")
        return batch, weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([2]), float("nan")))

    @staticmethod
    def frozen_gradient(state: TrainState, batch: Batch) -> tuple[Batch, Any]:
        weight = state.method.student.head.last_layer.weight_v
        return batch, weight.register_hook(lambda gradient: gradient * float("inf"))

    @staticmethod
    def teacher_logits(state: TrainState, batch: Batch) -> tuple[Batch, Any]:
        def poison(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            output = output.clone()
            output[0, 0] = -float("inf")  # whose softmax is a clean zero: the loss alone would not show it
            return output

        return batch, state.method.teacher.head.register_forward_hook(poison)


POISONS = ["image", "local_view_only", "gradient", "frozen_gradient", "teacher_logits"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("poison", POISONS)
def test_a_step_with_a_number_that_is_not_finite_leaves_every_bit(poison: str, optimizer: str) -> None:
    config = tiny_config(optimizer=optimizer, drop_path_rate=0.0)
    state, _ = run(config, 2)
    before = learnt(state)
    (batch,) = next(steps(config, 2, 3))
    batch, hook = getattr(Poison, poison)(state, batch)
    result = train_step(state, [batch], schedules_of(config), config)
    assert not bool(result.accepted)
    assert differing_bits(before, learnt(state)) == []
    assert int(state.skipped_steps) == 1
    assert state.step == 3
    if hook:
        hook.remove()
    _, results = run(config, 4, state)
    assert bool(results[0].accepted)
    assert math.isfinite(float(results[0].loss))
    assert int(state.skipped_steps) == 1
    changed = set(differing_bits(before, learnt(state)))
    assert {
        "/method/dino_loss/center",
        "/method/student/backbone.cls_token",
        "/method/teacher/backbone.cls_token",
    } <= changed


def test_a_bad_microbatch_rejects_the_whole_accumulated_step() -> None:
    config = tiny_config(batch_size_per_gpu=4, accumulation_steps=3)
    state, _ = run(config, 1)
    before = learnt(state)
    microbatches = next(steps(config, 1, 2))
    microbatches[1] = poisoned_batch(microbatches[1])
    assert not bool(train_step(state, microbatches, schedules_of(config), config).accepted)
    assert differing_bits(before, learnt(state)) == []


def test_a_rejected_first_step_leaves_networks_and_centre() -> None:
    config = tiny_config()
    state = build_state(config, CPU)
    before = {path: value for path, value in learnt(state).items() if not path.startswith("/optimizer")}
    (batch,) = next(steps(config, 0, 1))
    train_step(state, [poisoned_batch(batch)], schedules_of(config), config)
    after = {path: value for path, value in learnt(state).items() if not path.startswith("/optimizer")}
    assert differing_bits(before, after) == []


# ---- frozen last layer, clipping


def test_the_last_layer_does_not_move_in_its_frozen_epochs_and_moves_afterwards() -> None:
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
    assert len(differing_bits(start, last_layers())) == 4  # length and direction, student and teacher


def test_a_last_layer_that_is_not_frozen_moves_at_once() -> None:
    config = tiny_config(freeze_last_layer=0)
    state = build_state(config, CPU)
    start = state.method.student.head.last_layer.weight_v.detach().clone()
    run(config, 1, state)
    assert not torch.equal(start, state.method.student.head.last_layer.weight_v)


@pytest.mark.parametrize("mode", ["per-parameter", "global"])
def test_the_clip_limit_bounds_what_a_step_changes(mode: str) -> None:
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


# ---- views, precision, figures


def test_local_crops_of_the_global_size_share_the_pass_but_not_the_teacher() -> None:
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


@pytest.mark.parametrize("views", [0, 1])
def test_few_local_crops_train(views: int) -> None:
    _, results = run(tiny_config(local_crops_number=views), 2)
    assert all(bool(result.accepted) for result in results)


@pytest.mark.parametrize("seed", [1, 2, 3])  # AdamW's first step is a sign: a tiny gradient's may differ, as for seed 0
def test_a_bf16_step_stays_near_fp32(seed: int) -> None:
    config = tiny_config(lr=1e-4, seed=seed)
    _, exact = run(config, 3)
    state, low = run(dataclasses.replace(config, precision="bf16"), 3)
    assert all(bool(result.accepted) for result in low)
    assert float(low[0].loss) == pytest.approx(float(exact[0].loss), rel=0.01)
    assert [float(r.loss) for r in low] == pytest.approx([float(r.loss) for r in exact], rel=0.015)
    assert float(low[0].loss) != float(exact[0].loss)
    assert all(p.dtype is torch.float32 for p in state.method.student.parameters())
    assert state.method.loss.center.dtype is torch.float32


def with_scale(state: TrainState, scale: float) -> TrainState:
    """The first steps of a run search for a scale; start from one that fits (so narrow a head has steep gradients)."""
    state.scaler.scale(torch.zeros(()))
    state.scaler.update(scale)
    return state


def test_fp16_scales_the_loss_and_not_the_step() -> None:
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


def test_an_fp16_overflow_is_rejected_and_lowers_the_scale() -> None:
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


def test_precision_auto_is_fp32_on_a_cpu() -> None:
    assert choose_precision("auto", CPU) is torch.float32
    assert choose_precision("bf16", CPU) is torch.bfloat16
    assert choose_precision("fp16", CPU) is torch.float16


def test_the_logged_figures_are_what_they_are_called() -> None:
    config = tiny_config(warmup_teacher_temp=0.04, teacher_temp=0.07, warmup_teacher_temp_epochs=2, warmup_epochs=1.0)
    state = build_state(config, CPU)
    center = state.method.loss.center.clone()
    _, (result,) = run(config, 1, state)
    figures = result.metrics(state.method)
    (batch,) = next(steps(config, 0, 1))
    fresh = build_state(config, CPU).method
    with torch.no_grad():
        logits, features = fresh.teacher([normalise(batch.crops[0], config.mean, config.std)])
    assert figures["loss"] == pytest.approx(float(result.loss))
    assert figures["gradient_norm"] == pytest.approx(float(result.gradient_norm))
    assert figures["skipped_steps"] == 0
    assert figures["feature_std"] == pytest.approx(float(feature_std(features)))
    assert figures["lr"] == 0.0  # the first step of a warm-up
    assert figures["weight_decay"] == pytest.approx(0.04)
    assert figures["momentum"] == pytest.approx(0.996)
    assert figures["teacher_temp"] == pytest.approx(0.04)
    # The identity loss = entropy + divergence holds with the centre that the loss used.
    used = entropy(((logits - center) / 0.04).softmax(dim=1))
    assert figures["teacher_entropy"] == pytest.approx(float(used), rel=1e-5)
    assert figures["kl"] == pytest.approx(figures["loss"] - figures["teacher_entropy"])


def test_a_student_learns_to_predict_a_teacher_that_stands_still() -> None:
    """With momentum 1 the targets of an epoch come again in the next: the divergence must fall."""
    config = tiny_config(momentum_teacher=1.0, drop_path_rate=0.0, center_momentum=1.0, freeze_last_layer=0)
    state, results = run(config, 24)
    divergences = [r.metrics(state.method)["kl"] for r in results]
    assert sum(divergences[-6:]) < 0.8 * sum(divergences[1:7])
    assert (
        differing_bits(
            tensors_of(dict(state.method.teacher.named_parameters())),
            tensors_of(dict(build_state(config, CPU).method.teacher.named_parameters())),
        )
        == []
    )
