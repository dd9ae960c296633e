"""Verdicts on synthetic signals, and on runs that are made to collapse. benchmarks/collapse.py has long runs."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from pathlib import Path
from typing import Any

import pytest
from ranks import Start
from run_here import Here
from tiny_run import CPU, tiny_config

import run_pretrain
from dino_xcit import verdict
from dino_xcit.config import PretrainConfig
from dino_xcit.metrics import read_metrics
from dino_xcit.verdict import Judge

K = 1024
LEARNING: dict[str, Callable[[int], float]] = {
    "loss": lambda step: log(K) - step / 500,
    "teacher_entropy": lambda step: 0.8 * log(K) - step / 500,
    "kl": lambda step: 0.6,
    "mutual_information": lambda step: 0.3 + step / 200,
    "prototype_perplexity": lambda step: 200 + step,
    "distinct_prototypes": lambda step: 20 + step / 2,
    "feature_std": lambda step: min(0.98, 0.3 + step / 100),
    "feature_dimensions": lambda step: 5 + step / 50,
    "view_agreement": lambda step: 0.5,
    "gradient_norm": lambda step: 2.0,
    "teacher_distance": lambda step: 0.02,
    "lr": lambda step: 1e-3 * (step / 50 if step < 50 else 1 - step / 2000),
}
"""Signals of a run that learns, by step."""
TURN = 200
"""Step at which a run goes wrong."""


def falling(start: float, end: float, steps: int = 40) -> Callable[[int], float]:
    """Return a signal that moves from ``start`` to ``end`` within some steps after :data:`TURN`."""
    return lambda step: start + (end - start) * min(1.0, max(0, step - TURN) / steps)


GONE_WRONG: dict[str, dict[str, Callable[[int], float]]] = {
    "uniform": {"mutual_information": falling(1.3, 0.01), "teacher_entropy": falling(5.0, log(K))},
    "one prototype": {
        "mutual_information": falling(1.3, 0.0),
        "teacher_entropy": falling(5.0, 0.0),
        "prototype_perplexity": falling(400, 1),
        "distinct_prototypes": falling(100, 1),
    },
    "dimensional collapse": {"feature_dimensions": falling(9, 2), "view_agreement": falling(0.5, 0.995)},
    "diverging": {
        "kl": falling(0.6, 4.0),
        "gradient_norm": falling(2.0, 50.0),
        "loss": falling(6.5, 9.0),
    },
}


def judged(signals: dict[str, Callable[[int], float]], steps: int = 500, **settings: Any) -> list[tuple[int, str, str]]:
    """Return (step, state, remedy) of each verdict on the signals at every tenth step."""
    judge = Judge(PretrainConfig(**({"out_dim": K, "norm_last_layer": True} | settings)))
    found = []
    for step in (1, *range(10, steps + 1, 10)):
        if judge.add(step, {name: signal(step) for name, signal in signals.items()}):
            found.append((step, judge.verdict.state, judge.verdict.remedy))
    return found


def test_learning_run_is_healthy_and_nothing_is_said_before_first_step() -> None:
    assert judged(LEARNING, steps=50) == []
    assert judged(LEARNING) == [(60, "healthy", "")]


def test_information_that_rises_again_is_no_collapse() -> None:
    """A random start can have more information than the first steps; benchmarks/auto.py had such a run."""
    dip = {
        "mutual_information": lambda step: 0.2 + (0.03 * max(0, 30 - step) if step < 50 else 0.004 * (step - 50)),
        "teacher_entropy": lambda step: 0.96 * log(K),
    }
    assert [state for _, state, _ in judged(LEARNING | dip)] == ["healthy"]
    deep = {"mutual_information": lambda step: 1.3 if step < TURN else 0.1 if step < TURN + 50 else 0.4}
    assert judged(LEARNING | dip | deep)[-1][1] == "uniform"  # risen once is not enough
    stays_low = dip | {"mutual_information": lambda step: 0.2 + 0.03 * max(0, 30 - step)}
    assert [state for _, state, _ in judged(LEARNING | stays_low)] == ["uniform"]


@pytest.mark.parametrize("state", GONE_WRONG)
def test_state_is_named_within_200_steps_with_a_remedy(state: str) -> None:
    healthy, wrong = judged(LEARNING | GONE_WRONG[state])
    assert healthy[1] == "healthy"
    assert wrong[1] == state
    assert TURN + verdict.PERSISTENCE <= wrong[0] <= TURN + 200
    assert wrong[2].startswith("try --")


def test_one_prototype_is_named_although_sinkhorn_knopp_keeps_the_targets_even() -> None:
    even = GONE_WRONG["one prototype"] | {"teacher_entropy": lambda step: 0.97 * log(K)}
    assert judged(LEARNING | even)[-1][1] == "one prototype"


def test_resumed_collapse_is_named_although_it_does_not_fall_further() -> None:
    faint = {"mutual_information": lambda step: 0.02 + step / 1e5, "teacher_entropy": lambda step: 0.995 * log(K)}
    assert [state for _, state, _ in judged(LEARNING | faint)] == ["uniform"]


def test_collapse_keeps_its_first_name() -> None:
    wandering = GONE_WRONG["uniform"] | {"prototype_perplexity": lambda step: 2.0 if step % 200 > 100 else 90.0}
    assert [state for _, state, _ in judged(LEARNING | wandering, 1000)] == ["healthy", "uniform"]


@pytest.mark.parametrize("state", GONE_WRONG)
def test_one_signal_alone_is_no_alarm(state: str) -> None:
    name, signal = next(iter(GONE_WRONG[state].items()))
    assert judged(LEARNING | {name: signal}) == [(60, "healthy", "")]


def test_few_logged_steps_are_no_verdict() -> None:
    judge = Judge(PretrainConfig(out_dim=K))
    assert not any(judge.add(step, {name: one(step) for name, one in LEARNING.items()}) for step in (1, 100, 200, 300))
    assert judge.add(400, {name: one(400) for name, one in LEARNING.items()})


def test_no_signals_are_no_verdict() -> None:
    assert judged({"loss": LEARNING["loss"], "lr": LEARNING["lr"]}) == []


def test_run_that_starts_near_uniform_and_learns_is_healthy() -> None:
    slow = {"mutual_information": lambda step: 0.01 + step / 1e5, "teacher_entropy": lambda step: 0.99 * log(K)}
    assert judged(LEARNING | slow) == [(60, "healthy", "")]


def test_diverging_without_prototypes_is_named() -> None:
    prototypes = ("teacher_entropy", "kl", "mutual_information", "prototype_perplexity", "distinct_prototypes")
    features = {name: signal for name, signal in LEARNING.items() if name not in prototypes}
    wrong = {"loss": falling(-0.9, 0.1), "gradient_norm": falling(2.0, 50.0)}
    features |= {
        "loss": lambda step: -0.5 if step < 60 else wrong["loss"](step),
        "gradient_norm": wrong["gradient_norm"],
    }
    assert [state for _, state, _ in judged(features, method="simdino")] == ["healthy", "diverging"]


def test_short_dip_is_no_alarm() -> None:
    dip = {
        name: lambda step, signal=signal, name=name: signal(300) if 200 < step <= 230 else LEARNING[name](step)
        for name, signal in GONE_WRONG["one prototype"].items()
    }
    assert judged(LEARNING | dip) == [(60, "healthy", "")]


def test_recovery_is_named() -> None:
    def brief(name: str) -> Callable[[int], float]:
        return lambda step: GONE_WRONG["uniform"][name](step) if step < 320 else LEARNING[name](step)

    states = [state for _, state, _ in judged(LEARNING | {name: brief(name) for name in GONE_WRONG["uniform"]})]
    assert states == ["healthy", "uniform", "healthy"]


def test_run_that_never_leaves_its_start_is_on_a_plateau() -> None:
    still = {name: (lambda _, signal=signal: signal(60)) for name, signal in LEARNING.items()} | {"lr": LEARNING["lr"]}
    (_, first, _), (step, state, remedy) = judged(still)
    assert (first, state, remedy) == ("healthy", "plateau", "try --lr 0.005")
    assert step <= verdict.PLATEAU_STEPS + 100
    warming_up = still | {"lr": lambda step: 1e-6 * step}
    assert judged(warming_up) == [(60, "healthy", "")]


def test_method_without_prototypes_is_judged_by_its_features() -> None:
    prototypes = ("teacher_entropy", "kl", "mutual_information", "prototype_perplexity", "distinct_prototypes")
    features = {name: signal for name, signal in LEARNING.items() if name not in prototypes}
    assert judged(features, method="simdino") == [(60, "healthy", "")]
    found = judged(features | GONE_WRONG["dimensional collapse"], method="simdino", coding_rate_weight=0.1)
    assert found[-1][1:] == ("dimensional collapse", "try --coding-rate-weight 1 --resume never")


@pytest.mark.parametrize(
    ("settings", "signals", "remedy"),
    [
        ({"teacher_temp": 0.1}, {}, "try --teacher-temp 0.04 --warmup-teacher-temp 0.04 --resume never"),
        ({"center_momentum": 1.0}, {}, "try --center-momentum 0.9 --resume never"),
        ({"momentum_teacher": 0.0}, {}, "try --momentum-teacher 0.99 --resume never"),
        ({"lr": 0.02}, {"teacher_distance": lambda step: 0.5 if step < 100 else 0.01}, "try --lr 0.002 --resume never"),
        ({}, {}, "try --centering sinkhorn_knopp --resume never"),
        ({"centering": "sinkhorn_knopp"}, {}, "try --koleo-weight 0.1 --resume never"),
    ],
)
def test_remedy_names_the_setting_at_fault(
    settings: dict[str, Any], signals: dict[str, Callable[[int], float]], remedy: str
) -> None:
    assert judged(LEARNING | GONE_WRONG["uniform"] | signals, **settings)[-1][2] == remedy


# ---- real runs


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge after a few steps."""
    monkeypatch.setattr(verdict, "FIRST_STEP", 6)
    monkeypatch.setattr(verdict, "PERSISTENCE", 4)


COLLAPSING = [
    "--warmup-teacher-temp", 1, "--teacher-temp", 1, "--centering", "centering", "--koleo-weight", 0, "--device", "cpu",
    "--log-every", 1, "--knn-every", 0, "--knn-holdout", 0, "--num-workers", 0, "--batch-size-per-gpu", 8,
    "--lr", 3, "--warmup-epochs", 0, "--no-report-pictures",
]  # fmt: skip


@pytest.mark.usefixtures("soon")
def test_collapsed_run_stops_with_code_3_and_keeps_its_verdict(here: Here, tmp_path: Path) -> None:
    done = here(run_pretrain, *COLLAPSING, "--max-steps", 40, "--on-collapse", "stop", "--output-dir", tmp_path / "run")
    assert done.code == 3
    assert "uniform" in done.err
    assert "--teacher-temp 0.04" in done.err
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    (row,) = [row for row in rows if row["kind"] == "verdict"]
    assert (row["state"], row["remedy"]) == (
        "uniform",
        "try --teacher-temp 0.04 --warmup-teacher-temp 0.04 --resume never",
    )
    assert rows[-1]["step"] < 40
    assert '"state":"uniform"' in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.process
def test_both_ranks_stop_at_a_collapse(start: Start) -> None:
    flags = ("--warmup-teacher-temp", "1", "--teacher-temp", "1", "--lr", "3", "--batch-size-per-gpu", "2")
    run = start(*flags, "--epochs", "200", "--on-collapse", "stop")
    assert run.wait() == [3, 3], run.err()
    assert "the run collapsed" in run.err(0)
    assert "collapsed" not in run.err(1)


@pytest.mark.usefixtures("soon")
def test_resumed_run_continues_the_verdict_and_a_warning_does_not_stop_it(tmp_path: Path) -> None:
    settings = {"teacher_temp": 1.0, "warmup_teacher_temp": 1.0, "log_every": 1, "num_workers": 0, "save_every": 1}
    for folder, stops in (("whole", [20]), ("resumed", [8, 20])):
        for steps in stops:
            config = tiny_config(output_dir=str(tmp_path / folder), max_steps=steps, **settings)
            assert run_pretrain.train(config, CPU).step == steps
    whole, resumed = (
        [(row["step"], row["state"]) for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "verdict"]
        for folder in (tmp_path / "whole", tmp_path / "resumed")
    )
    assert whole
    assert whole == resumed


@pytest.mark.usefixtures("soon")
def test_resume_after_changed_settings_replays_only_the_steps_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(Judge, "add", lambda self, step, metrics: bool(seen.append(step)))
    settings = {"log_every": 1, "num_workers": 0, "save_every": 1, "output_dir": str(tmp_path / "run")}
    for stop, resume in ((3, "auto"), (5, "changed"), (6, "auto")):
        seen.clear()
        run_pretrain.train(tiny_config(max_steps=stop, resume=resume, **settings), CPU)
    assert seen == [4, 5, 6]
