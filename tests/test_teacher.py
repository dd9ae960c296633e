"""The teacher: EMA of the student, skipped steps, and BatchNorm statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_run import CPU, differing_bits, run, steps, tiny_config
from torch import nn

from dino_xcit.methods.student_teacher import Ema, flattened
from dino_xcit.train import build_state


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(5, 2))


def flat(module: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("as_vector", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99999, 1.0])
@pytest.mark.parametrize("accepted", [None, True])
def test_ema_equals_exponential_moving_average(momentum: float, accepted: bool | None, as_vector: bool) -> None:
    teacher, student = network(1), network(2)
    expected = momentum * flat(teacher).double() + (1 - momentum) * flat(student).double()
    Ema(teacher, student, as_vector)(momentum, None if accepted is None else torch.tensor(accepted))
    torch.testing.assert_close(flat(teacher).double(), expected, rtol=1e-6, atol=1e-7)
    assert differing_bits(network(2).state_dict(), student.state_dict()) == []


@pytest.mark.parametrize("as_vector", [False, True])
def test_ema_of_a_copy_updates_the_copied_teacher(as_vector: bool) -> None:
    teacher, student = network(1), network(2)
    same, _, ema = copy.deepcopy((teacher, student, Ema(teacher, student, as_vector)))
    ema(0.0)
    assert (flat(same) == flat(student)).all()
    assert differing_bits(network(1).state_dict(), teacher.state_dict()) == []


@pytest.mark.parametrize("as_vector", [False, True])
def test_ema_keeps_teacher_bits_after_skipped_step(as_vector: bool) -> None:
    teacher = network(1)
    Ema(teacher, network(2), as_vector)(0.9, torch.tensor(False))
    assert differing_bits(network(1).state_dict(), teacher.state_dict()) == []


def test_flattened_parameters_are_views_of_one_vector() -> None:
    module, before = network(1), network(1)
    vector = flattened(module)
    assert differing_bits(before.state_dict(), module.state_dict()) == []
    vector += 1
    assert all((one == other + 1).all() for one, other in zip(module.parameters(), before.parameters(), strict=True))
    module.load_state_dict(before.state_dict())
    assert (vector == flat(module)).all()


def test_teacher_starts_equal_to_student_without_gradients() -> None:
    state = build_state(tiny_config(), CPU)
    assert differing_bits(state.method.student.state_dict(), state.method.teacher.state_dict()) == []
    assert state.method.teacher.training
    assert not any(parameter.requires_grad for parameter in state.method.teacher.parameters())


def test_teacher_averages_parameters_but_not_batch_norm_statistics() -> None:
    """After a step, teacher parameters are m * old + (1 - m) * student. The teacher's BatchNorm statistics are those of
    its own global crops, not an average with the student's."""
    config = tiny_config(momentum_teacher=0.9)
    state, _ = run(config, 0)
    old = {name: value.double() for name, value in state.method.teacher.named_parameters()}
    (batch,) = next(steps(config, 0, 1))
    with torch.no_grad():
        own = build_state(config, CPU).method.teacher
        own([(batch.crops[0] / 255 - 0.286) / 0.353])
    run(config, 1, state)
    student = dict(state.method.student.named_parameters())
    for name, value in state.method.teacher.named_parameters():
        expected = 0.9 * old[name] + 0.1 * student[name].detach().double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7, msg=name)
    student_buffers, own_buffers = dict(state.method.student.named_buffers()), dict(own.named_buffers())
    for name, buffer in state.method.teacher.named_buffers():
        torch.testing.assert_close(buffer, own_buffers[name], rtol=1e-4, atol=1e-5, msg=name)
        if name.endswith("running_mean"):
            assert not torch.allclose(buffer, student_buffers[name], rtol=1e-4, atol=1e-5), name
