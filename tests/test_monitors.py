"""Monitors of pretraining steps against float64 oracles in NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_run import CPU, schedules_of, steps, tiny_config

from dino_xcit.methods.student_teacher import StudentTeacher
from dino_xcit.monitors import StepMonitors, feature_metrics, prototype_metrics, teacher_distance
from dino_xcit.train import StepResult, build_state, train_step

STEPS = 3


def monitored(**changes: Any) -> tuple[StudentTeacher, list[StepResult], dict[str, float]]:
    """Train :data:`STEPS` steps with monitors; return the method, the results and the last metrics."""
    config = tiny_config(**changes)
    state, schedules = build_state(config, CPU), schedules_of(config)
    monitors, results = StepMonitors(state.method), []
    for batches in steps(config, 0, STEPS):
        results.append(train_step(state, batches, schedules, config))
        monitors.on_step(results[-1], batches[-1])
        found = dict(monitors.metrics())
    assert isinstance(state.method, StudentTeacher)
    return state.method, results, found


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def entropy(p: NDArray[np.float64]) -> NDArray[np.float64]:
    return -(p * np.log(np.maximum(p, 1e-300))).sum(axis=-1)


def prototype_oracle(logits: list[NDArray[np.float64]], temperature: float) -> dict[str, float]:
    """Compute the prototype metrics from the logits of each step."""
    rows = softmax(logits[-1] / temperature)
    mean = entropy(rows.mean(axis=0))
    return {
        "prototype_perplexity": np.exp(mean),
        "mutual_information": mean - entropy(rows).mean(),
        "distinct_prototypes": len({int(one) for step in logits for one in step.argmax(axis=1)}),
    }


def feature_oracle(features: NDArray[np.float64]) -> dict[str, float]:
    """Compute the feature metrics of [2, B, D]."""
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    eigenvalues = np.linalg.eigvalsh(np.cov(unit.reshape(-1, unit.shape[-1]).T, bias=True))
    return {
        "feature_dimensions": eigenvalues.sum() ** 2 / (eigenvalues**2).sum(),
        "view_agreement": (unit[0] * unit[1]).sum(axis=-1).mean(),
    }


def norm(values: Mapping[str, torch.Tensor]) -> float:
    return float(torch.cat([value.detach().double().flatten() for value in values.values()]).norm())


def oracle(method: StudentTeacher, results: list[StepResult]) -> dict[str, float]:
    """Compute the metrics after the last step."""
    logits = [one.prototype_logits.double().numpy() for one in results]
    features = results[-1].features.unflatten(0, (2, -1)).double().numpy()
    student, teacher = (dict(network.named_parameters()) for network in (method.student, method.teacher))
    matrices = {name: value for name, value in student.items() if value.ndim > 1}
    distance = norm({name: teacher[name] - student[name] for name in matrices}) / norm(matrices)
    prototypes = prototype_oracle(logits, results[-1].rates.teacher_temp)
    return prototypes | feature_oracle(features) | {"teacher_distance": distance}


def test_monitors_equal_float64_oracle() -> None:
    method, results, found = monitored()
    expected = oracle(method, results)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert found["memory_gb"] > 0
    assert expected["mutual_information"] > 0.01
    assert 1 < expected["distinct_prototypes"] <= 48


def test_gradient_norms_of_parts_add_up_to_norm_before_clipping() -> None:
    _, results, found = monitored(clip_grad=1e-6, freeze_last_layer=0)
    parts = {name: found[f"gradient_norm_{name}"] for name in ("stem", "blocks", "head")}
    assert min(parts.values()) > 0
    assert sum(one**2 for one in parts.values()) ** 0.5 == pytest.approx(float(results[-1].gradient_norm), rel=1e-5)
    names = [name for name in results[-1].gradient_names if name.startswith("head.")]
    head = [float(results[-1].gradient_norms[results[-1].gradient_names.index(name)]) for name in names]
    assert parts["head"] == pytest.approx(np.linalg.norm(head), rel=1e-5)


@pytest.mark.parametrize(
    ("logits", "perplexity", "information", "distinct"),
    [
        (torch.zeros(32, 16), 16.0, 0.0, 1),  # uniform
        (50 * torch.eye(16)[:1].repeat(32, 1), 1.0, 0.0, 1),  # one prototype
        (50 * torch.eye(16).repeat(2, 1), 16.0, np.log(16), 16),  # even assignments
    ],
)  # fmt: skip
def test_mutual_information_is_zero_in_both_collapses_and_ln_k_for_even_assignments(
    logits: torch.Tensor, perplexity: float, information: float, distinct: int
) -> None:
    found = prototype_metrics(logits, 0.04, logits.argmax(dim=1))
    assert float(found["prototype_perplexity"]) == pytest.approx(perplexity, rel=1e-4)
    assert float(found["mutual_information"]) == pytest.approx(information, abs=1e-4)
    assert int(found["distinct_prototypes"]) == distinct


def test_feature_dimensions_count_directions_of_variation() -> None:
    flat = torch.randn(64, 3) @ torch.linalg.qr(torch.randn(32, 32)).Q[:3]
    assert float(feature_metrics(flat, 32)["feature_dimensions"]) <= 3.001
    nearly_equal = 1 + 1e-4 * torch.randn(256, 32, dtype=torch.float64)
    found = feature_metrics(nearly_equal.float(), 128)["feature_dimensions"]
    unit = torch.nn.functional.normalize(nearly_equal.float().double(), dim=1).numpy()
    assert float(found) == pytest.approx(feature_oracle(unit.reshape(2, 128, 32))["feature_dimensions"], rel=0.02)
    assert "view_agreement" not in feature_metrics(torch.randn(64, 32), 16)


def test_method_without_prototypes_lacks_their_monitors() -> None:
    _, _, found = monitored(method="simdino", use_bn_in_head=True)
    assert not found.keys() & {"prototype_perplexity", "mutual_information", "distinct_prototypes"}
    assert {"feature_dimensions", "view_agreement", "teacher_distance", "gradient_norm_blocks"} <= found.keys()


def test_teacher_of_another_structure_is_compared_where_it_is_equal() -> None:
    student = torch.nn.ModuleDict({"backbone": torch.nn.Linear(3, 4), "predictor": torch.nn.Linear(4, 4)})
    teacher = torch.nn.ModuleDict({"backbone": torch.nn.Linear(3, 4)})
    expected = (teacher["backbone"].weight - student["backbone"].weight).norm() / student["backbone"].weight.norm()
    found = float(teacher_distance(teacher, student)["teacher_distance"])
    assert found == pytest.approx(float(expected.detach()), rel=1e-5)
    assert teacher_distance(torch.nn.Linear(2, 2), student) == {}


def test_no_metrics_before_first_accepted_step() -> None:
    assert StepMonitors(build_state(tiny_config(), CPU).method).metrics() == {}
