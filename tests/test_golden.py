"""The code reproduces the results of version 0.1 in tests/golden (written by golden_runs.py).

The golden files come from one CPU thread. Another processor model changes the last digits, and 20 steps amplify that.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_runs as runs
import numpy as np
import pytest
import torch
from golden_runs import GOLDEN

Metrics = dict[tuple[object, ...], Any]

# ---- metrics of the result files, without confidence intervals: 0.1 had bootstrap intervals, now they are Wilson
# intervals.


def knn_metrics(result: dict[str, Any]) -> Metrics:
    metrics: Metrics = {}
    for row in result["results"]:
        of = row["model"], row["k"], row["temperature"]
        metrics |= {(*of, name): row[name] for name in ("top1", "top5")}
    for row in result["few_shot"]["results"]:
        of = row["model"], row["shots"], row["k"], row["temperature"]
        metrics |= {(*of, number): top1 for number, top1 in enumerate(row["top1_draws"])}
    return metrics


def linear_metrics(result: dict[str, Any]) -> Metrics:
    found = result["results"]
    paper, grid, logreg = found["paper"], found["grid"], found["logreg"]
    metrics: Metrics = {("last", name): paper["last_epoch"][name] for name in ("top1", "top5")}
    metrics |= {("best", name): paper["best_epoch"][name] for name in ("epoch", "loss", "top1", "top5")}
    chosen = ("features", "held_out_top1", "top1", "top5")
    metrics |= {("grid", name): grid[name] for name in ("lr", *chosen)}
    return metrics | {("logreg", name): logreg[name] for name in ("c", *chosen)}


METRICS: dict[str, Callable[[dict[str, Any]], Metrics]] = {
    "knn": knn_metrics,
    "linear": linear_metrics,
    "extract": lambda result: {(name,): result[name] for name in ("count", "dimension")},
    "query": lambda result: {
        (row["rank"], key): row[key] for row in result["results"] for key in ("row", "path", "score")
    },
    "retrieval": lambda result: {(name,): value for name, value in result["results"][0].items()},
}


def probe_weights(file: Path) -> dict[str, torch.Tensor]:
    """Return the weights and biases of the classifiers in linear.pth or logreg.pth."""
    content = torch.load(file, weights_only=True)
    learnt = {path: tensor for path, tensor in runs.tensors(content, "") if path.endswith(("/weight", "/bias"))}
    assert len(learnt) >= 2
    return learnt


def networks(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of teacher and loss in checkpoint.pth; the golden checkpoint has no student."""
    content = torch.load(file, weights_only=True)
    return dict(runs.tensors({"teacher": content["teacher"], "dino_loss": content["dino_loss"]}, ""))


# ---- the comparisons


@pytest.fixture(autouse=True)
def _beside_the_golden_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in a folder with the images in photos/ and the weights of 0.1 in run/."""
    monkeypatch.chdir(tmp_path)
    runs.write_photos(Path("photos"))
    runs.unpack_weights(Path("run"))


def assert_close(new: Metrics, old: Metrics, tolerance: float = 1e-5) -> None:
    assert new.keys() == old.keys()
    for name in old:
        number = old[name] is not None and not isinstance(old[name], str)
        assert new[name] == (pytest.approx(old[name], rel=tolerance, abs=tolerance) if number else old[name]), name


@pytest.mark.parametrize(
    ("number", "count"),
    [(0, 12), (1, 3), (2, 3), (3, 3), (4, 3), (5, 3), *(pytest.param(n, 20, marks=pytest.mark.slow) for n in range(6))],
)
def test_training_reproduces_golden_metrics(number: int, count: int) -> None:
    """Run 0 trains one epoch and evaluates k-NN; the others train three steps. Slow cases train all 20 steps."""
    flags = runs.LOSSES[number]
    golden = {name: values[:count] for name, values in runs.read_json(GOLDEN / "losses.json")[" ".join(flags)].items()}
    new = runs.losses(flags, "new", count)
    assert len(new["loss"]) == len(golden["loss"]) == count
    if count < 20:  # shorter runs evaluate k-NN at their end, the golden run did not
        golden["knn_top1"], new["knn_top1"] = golden["knn_top1"][: count // 12], new["knn_top1"][: count // 12]
    # 0.1 computed the entropy with the updated center, so loss = entropy + KL did not hold.
    assert np.add(new["teacher_entropy"], new["kl"]) == pytest.approx(new["loss"], rel=1e-5)
    compared = set(golden) - ({"teacher_entropy", "kl"} if "sinkhorn_knopp" not in flags else set())
    if "--accumulation-steps" in flags:  # 0.1 used the last forward pass, now it is the mean over all
        compared.remove("feature_std")
    chosen = [{name: metrics[name] for name in compared} for metrics in (new, golden)]
    assert_close(*chosen, 1e-3 if "bf16" in flags else 1e-5)


def test_two_training_steps_reproduce_golden_checkpoint() -> None:
    runs.run(*runs.TWO_STEPS, "--output-dir", "new")
    assert_close(runs.parameters(Path("new/checkpoint.pth")), runs.read_json(GOLDEN / "parameters.json"), 1e-6)
    assert_tensors(networks(Path("new/checkpoint.pth")), networks(Path(runs.WEIGHTS)), 1e-6)
    np.testing.assert_allclose(runs.ten_features("new/backbone.pth"), np.load(GOLDEN / "features.npy"), 1e-5, 1e-5)


def test_resume_from_version_0_1_checkpoint_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="code 2"):
        runs.run(*runs.TWO_STEPS, "--output-dir", "run")
    assert "--init-weights run/checkpoint.pth" in capsys.readouterr().err.splitlines()[-1]


def assert_tensors(new: dict[str, torch.Tensor], old: dict[str, torch.Tensor], tolerance: float) -> None:
    assert new.keys() == old.keys()
    for name in old:
        torch.testing.assert_close(new[name], old[name], rtol=tolerance, atol=tolerance, msg=name)


def test_stored_weights_reproduce_golden_features() -> None:
    for name in ("checkpoint.pth", "backbone.pth"):
        np.testing.assert_allclose(runs.ten_features(f"run/{name}"), np.load(GOLDEN / "features.npy"), 1e-5, 1e-5)


@pytest.mark.parametrize("name", METRICS)
def test_runner_reproduces_golden_results(name: str) -> None:
    if name == "query":  # search the collection written by 0.1
        shutil.copytree(GOLDEN / "collection", "collection")
    metrics = METRICS[name]
    assert_close(metrics(runs.measure(name)), metrics(runs.read_json(GOLDEN / f"{name}.json")))
    if name == "linear":
        for file in ("linear.pth", "logreg.pth"):
            assert_tensors(probe_weights(Path("probe", file)), probe_weights(GOLDEN / "probe" / file), 1e-5)
    if name == "extract":
        assert Path("collection/paths.txt").read_bytes() == (GOLDEN / "collection/paths.txt").read_bytes()
        new, old = (np.load(folder / "vectors.npy") for folder in (Path("collection"), GOLDEN / "collection"))
        np.testing.assert_allclose(new, old, 1e-5, 1e-5)
