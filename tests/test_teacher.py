"""The teacher: EMA of the student, skipped steps, and BatchNorm statistics."""

from __future__ import annotations

import pytest
import torch
from tiny_run import CPU, differing_bits, run, steps, tensors_of, tiny_config

from dino_xcit.methods.student_teacher import flattened, update_ema
from dino_xcit.train import build_state


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((4, 5), (7,), (1, 1, 3), (2, 3, 3, 3))]


def flat(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.detach().flatten() for part in parts])


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99999, 1.0])
@pytest.mark.parametrize("accepted", [None, True])
def test_update_ema_equals_exponential_moving_average(momentum: float, accepted: bool | None) -> None:
    student = tensors(2)
    for teacher in (tensors(1), [flat(tensors(1))]):
        expected = momentum * flat(teacher).double() + (1 - momentum) * flat(student).double()
        update_ema(teacher, student, momentum, None if accepted is None else torch.tensor(accepted))
        torch.testing.assert_close(flat(teacher).double(), expected, rtol=1e-6, atol=1e-7)
    assert differing_bits(tensors_of(tensors(2)), tensors_of(student)) == []


def test_update_ema_keeps_teacher_bits_after_skipped_step() -> None:
    for teacher in (tensors(1), [flat(tensors(1))]):
        before = tensors_of(teacher)
        update_ema(teacher, tensors(2), 0.9, torch.tensor(False))
        assert differing_bits(before, tensors_of(teacher)) == []


def test_flattened_parameters_are_views_of_one_vector() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(5, 2))
    before = tensors_of(network.state_dict())
    vector = flattened(network)
    assert differing_bits(before, tensors_of(network.state_dict())) == []
    vector += 1
    assert all((network.state_dict()[name[1:]] == value + 1).all() for name, value in before.items())
    network.load_state_dict({name[1:]: value for name, value in before.items()})
    assert (vector == flat(list(network.parameters()))).all()


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
