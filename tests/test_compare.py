"""python -m eval.compare: comparisons against manual calculations, and refusals."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import result_fixtures
from eval_fixtures import image_tree, noise_source, tiny_checkpoint
from result_fixtures import IMAGES, KNN, change, hits, knn_metric, refusal, write_result
from run_here import Here

import eval.compare
import run_knn
import run_linear
import run_retrieval
from dino_xcit.data import Subset
from dino_xcit.transform import EvalTransform
from eval.compare import CLASSES, TRAIN, VAL
from eval.results import Metric, few_shot_metric, metric, query_metric, read_result
from eval.stats import mcnemar

Compared = Callable[..., tuple[str, list[dict[str, Any]]]]
LARGER = EvalTransform(resize=32, crop=28, interpolation="bilinear")


@pytest.fixture
def compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Compared:
    return functools.partial(result_fixtures.compared, tmp_path, capsys)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_result(tmp_path / "a.json", knn_metric(20, hits(300)))


def flipped(found: np.ndarray, lost: int, won: int) -> np.ndarray:
    """Return a copy of ``found`` with ``lost`` hits turned into misses and ``won`` misses into hits."""
    out = found.copy()
    out[np.flatnonzero(found)[:lost]] = False
    out[np.flatnonzero(~found)[:won]] = True
    return out


# ---- images


def test_compare_pairs_two_results_by_image(tmp_path: Path, base: Path, compared: Compared) -> None:
    other = write_result(tmp_path / "b.json", knn_metric(20, flipped(hits(300), lost=5, won=21)))
    text, (first, second) = compared(base, other)
    assert (first["percent"], first["difference"]) == (75.0, None)
    assert (second["percent"], second["difference"]) == (79.0, 4.0)
    assert (second["only_first"], second["only_this"]) == (5, 21)
    assert second["p"] == second["p_holm"] == mcnemar(5, 21)
    # 4 +- 1.96 * sqrt(26 - 16**2 / 400) / 4
    assert second["difference_interval"] == pytest.approx((1.53, 6.47), abs=0.15)
    row = next(line for line in text.splitlines() if "b.json" in line and "+4.0" in line)
    assert row.split()[-4:] == ["5", "21", "0.0025", "0.0025"]
    assert "McNemar" in text


def test_compare_corrects_p_values_of_several_results_by_holm(tmp_path: Path, compared: Compared) -> None:
    a = write_result(tmp_path / "a.json", *(knn_metric(k, hits(300)) for k in (20, 10)))
    others = [
        write_result(tmp_path / f"{name}.json", *(knn_metric(k, flipped(hits(300), *change)) for k in (20, 10)))
        for name, change in {"b": (5, 21), "c": (10, 11)}.items()
    ]
    text, found = compared(a, *others)
    assert [(Path(row["file"]).stem, row["metric"].split()[1]) for row in found] == [
        (name, k) for k in ("k=20", "k=10") for name in ("a", "b", "c")
    ]
    corrected = [row["p_holm"] for row in found if row["p"] is not None]
    assert corrected == pytest.approx([4 * mcnemar(5, 21), 1.0, 4 * mcnemar(5, 21), 1.0])
    assert "corrected for the 4 tests" in text
    assert "corrected for the 2 tests" in compared(a, *others, "--metric", "k=10")[0]


def test_metric_words_select_metrics_but_baselines_only_by_name(tmp_path: Path, compared: Compared) -> None:
    metrics = (*(knn_metric(k, hits(300)) for k in (20, 200)), knn_metric(20, hits(310), model="pixels"), few([50, 51]))
    a, b = (write_result(tmp_path / f"{name}.json", *metrics) for name in "ab")
    cases = {"": 3, "top-1 k=20": 2, "trained k=20 T=0.07 top-1": 1, "k=200": 1, "pixels k=20": 1}
    for words, count in cases.items():
        assert len(compared(a, b, "--metric", words)[1]) == 2 * count, words


def test_markdown_table_has_header_rule_and_escaped_cells(tmp_path: Path, compared: Compared) -> None:
    metrics = [metric("k_1 a|b", {"k": 1}, hits(right)) for right in (300, 0)]
    a, b = (write_result(tmp_path / f"{name}.json", one) for name, one in zip("ab", metrics, strict=True))
    lines = compared(a, b, "--table", "markdown")[0].splitlines()
    header = next(place for place, line in enumerate(lines) if line.startswith("| metric | file | % [95%] |"))
    assert lines[header + 1].startswith("| --- | --- | ---: |")
    assert lines[header + 2].startswith(r"| k\_1 a\|b |")


# ---- differing protocols and data

UNLIKE = {
    "transform": ({"transform": LARGER}, "transform: crop 8 -> 28, resize 8 -> 32"),
    "protocol": ({"protocol": KNN | {"name": "approximate"}}, "-> approximate"),
    "search": ({"protocol": KNN | {"search": {"probes": 16}}}, "search not set -> "),
    "train": ({"train": noise_source(31, seed=1)}, "30 of 3 classes -> 31 of 3 classes"),
    "val": (
        {"val": Subset(noise_source(IMAGES), np.arange(IMAGES)[::-1].copy())},
        "different val images: same number, but",
    ),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_compare_refuses_differing_protocols_and_data_unless_allowed(
    tmp_path: Path, base: Path, compared: Compared, name: str
) -> None:
    changed, clause = UNLIKE[name]
    b = write_result(tmp_path / "b.json", knn_metric(20, hits(320)), **changed)  # type: ignore[arg-type]
    sentence, advice = refusal(base, b)
    assert sentence.startswith(f"{b} cannot be compared with {base}: ")
    assert clause in sentence
    assert advice.endswith(f"--allow {name}")
    text, (_, row) = compared(base, b, "--allow", name)
    assert text.startswith(f"allowed difference of {b} from {base}: ")
    assert row["difference"] == 5.0
    assert (row["p"] is None) == (name == "val"), "other validation images must not be paired"


def test_compare_refuses_other_image_contents_labels_or_names(tmp_path: Path, base: Path, compared: Compared) -> None:
    for what in ("contents", "labels", "names"):
        b = change(write_result(tmp_path / "b.json", knn_metric(20, hits(320))), "0", "data", "val", what)
        sentence, advice = refusal(base, b)
        assert f"but other {what} or order" in sentence
        assert advice.endswith("--allow val")
    _, (_, row) = compared(base, b, "--allow", "val")
    assert row["p"] is not None, "renamed images must be paired"
    assert compared(base, change(b, "", "data", "val", "names"))[1][1]["p"] is not None


def test_compare_refusal_has_one_line_per_difference_and_file(tmp_path: Path, base: Path) -> None:
    train = noise_source(31, seed=1)
    b = write_result(tmp_path / "b.json", knn_metric(20, hits(300)), transform=LARGER, train=train)
    c = write_result(tmp_path / "c.json", metric("paper", {"classifier": "paper"}, hits(300)), measure="linear")
    sentences = refusal(base, b, c)
    assert [sentence.split(" cannot")[0] for sentence in sentences] == [str(b), str(b), str(c)]
    assert len(sentences) == 3, "the message offers --allow, which cannot compare these measures"
    assert sentences[2].endswith("measure knn -> linear")
    assert len(refusal(base, b, "--allow", "train")) == 2


def test_compare_refuses_other_k_or_temperature_unless_allowed(tmp_path: Path, base: Path, compared: Compared) -> None:
    b = write_result(tmp_path / "b.json", knn_metric(10, hits(320), 0.1), knn_metric(5, hits(320), 0.1))
    temperature, k, advice = refusal(base, b)
    assert "T 0.07 -> 0.1" in temperature
    assert "k 20 -> 10" in k
    assert advice.endswith("--allow T k")
    remaining, advice = refusal(base, b, "--allow", "k")
    assert "T 0.07 -> 0.1" in remaining
    assert advice.endswith("--allow k T"), "the advice must be complete"
    _, rows = compared(base, b, "--allow", "k", "T")
    assert [row["metric"].split()[1] for row in rows] == ["k=20", "k=10", "k=5"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "expected at least 2 values"),
        (("a.json",), "given more than once"),
        (("b.json", "--allow", "tranform"), "did you mean transform"),
        (("b.json", "--metric", "k=7"), "no metric with 'k=7'"),
        (("c.json",), "cannot be read"),
    ],
)
def test_compare_refuses_invalid_arguments(
    base: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], sentence: str
) -> None:
    monkeypatch.chdir(base.parent)
    write_result(Path("b.json"), knn_metric(20, hits(300)))
    assert sentence in refusal("a.json", *words)[0]


def test_compare_refusal_exits_with_code_2(tmp_path: Path, base: Path, here: Here) -> None:
    b = write_result(tmp_path / "b.json", knn_metric(20, hits(300)), transform=LARGER)
    ended = here(eval.compare, base, b)
    assert (ended.code, ended.out) == (2, ""), "a refusal must not print a table"
    assert ended.err.startswith(f"error: {b} cannot be compared")


# ---- few shots


def few(top1: list[float], drawn: str = "d", seed: int = 0, takes_all: bool = False) -> Metric:
    record = {"shots": 5, "k": 20, "temperature": 0.07, "top1_draws": top1, "drawn": drawn, "takes_all": takes_all}
    return few_shot_metric("trained", record, len(top1), seed)


def test_few_shot_results_are_paired_by_draw_if_draws_are_equal(tmp_path: Path, compared: Compared) -> None:
    percents = [52.0, 55.0, 49.0]
    a = write_result(tmp_path / "a.json", few([50.0, 54.0, 46.0]))
    text, (first, second) = compared(a, write_result(tmp_path / "b.json", few(percents)))
    assert (first["percent"], second["difference"], second["only_first"]) == (50.0, 2.0, None)
    assert second["difference_interval"] == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert second["p"] == pytest.approx(0.0741799, abs=1e-6)
    assert "paired t-test" in text
    assert "McNemar" not in text
    text, (_, row) = compared(a, write_result(tmp_path / "c.json", few(percents, drawn="other rows")))
    assert (row["difference_interval"], row["p"], row["p_holm"]) == (None, None, None)
    assert "no p: " in text


def test_few_shot_results_of_other_image_order_or_seed_are_refused(tmp_path: Path) -> None:
    a = write_result(tmp_path / "a.json", few([50.0, 54.0]))
    turned = Subset(noise_source(30, seed=1), np.arange(30)[::-1].copy())
    assert "different train images" in refusal(a, write_result(tmp_path / "b.json", few([50.0, 55.0]), train=turned))[0]
    (sentence,) = refusal(a, write_result(tmp_path / "c.json", few([50.0, 54.0], seed=1)))
    assert sentence.endswith("seed 0 -> 1"), "message offers --allow"


# ---- searches


def searched(path: Path, found: np.ndarray, rows: np.ndarray | None = None, **changed: object) -> Path:
    """Write a result in the format of run_retrieval.py folder."""
    asked = np.arange(len(found)) if rows is None else rows
    one = query_metric("mAP@R", {"metric": "mAP@R"}, found, asked)
    protocol = {"name": "leave-one-out", "whitening": None, **changed}
    return write_result(path, one, measure="retrieval folder", protocol=protocol)


APS = np.random.default_rng(0).uniform(0, 100, 60)


def test_retrieval_results_are_paired_by_query(tmp_path: Path, compared: Compared) -> None:
    gains = np.random.default_rng(1).normal(1, 2, 60)
    a, b = searched(tmp_path / "a.json", APS), searched(tmp_path / "b.json", np.clip(APS + gains, 0, 100))
    _, (first, second) = compared(a, b)
    assert first["percent"] == pytest.approx(APS.mean())
    low, high = second["difference_interval"]
    assert low < second["difference"] < high < low + 1.5, "the interval must be paired: that of each mean is +- 7"
    assert second["p"] < 0.01
    assert (second["unit"], second["units"]) == ("query", 60)
    _, (_, second) = compared(a, searched(tmp_path / "c.json", APS, np.arange(60) + 1))
    assert (second["difference_interval"], second["p"]) == (None, None)


# ---- linear probes

LOGREG: dict[str, object] = {"name": "L-BFGS", "cs": [1.0], "iterations": 100}
PROBE: dict[str, object] = {"name": "SGD", "epochs": 8, "lr": 0.001, "lrs": [0.1, 1.0], "holdout": 0.1, "seed": 0}


def probe(path: Path, kinds: str, **changed: object) -> Path:
    """Write a result with metrics of these classifiers, each 5 points better than the previous one."""
    metrics = [
        metric(f"{kind}, top-1", {"classifier": kind}, hits(300 + 20 * n)) for n, kind in enumerate(kinds.split())
    ]
    return write_result(path, *metrics, measure="linear", protocol=PROBE | {"logreg": LOGREG} | changed)


@pytest.mark.parametrize(
    ("kinds", "changed", "clause"),
    [
        ("paper", {"lrs": [], "holdout": 0, "features": ["last4"]}, ""),
        ("grid", {"lr": 0.5}, ""),
        ("grid paper", {"logreg": LOGREG | {"cs": [1.0, 10.0]}}, ""),
        ("logreg", {"lr": 0.5, "lrs": [3.0], "epochs": 9}, ""),
        ("paper grid logreg", {"lr": 0.5}, "lr 0.001 -> 0.5"),
        ("grid", {"holdout": 0.2}, "holdout 0.1 -> 0.2"),
        ("paper", {"momentum": 0.5}, "momentum not set -> 0.5"),
        ("logreg", {"logreg": LOGREG | {"cs": [10.0]}}, "cs [1.0] -> [10.0]"),
    ],
)
def test_compare_checks_only_settings_that_affect_each_classifier(
    tmp_path: Path, compared: Compared, kinds: str, changed: dict[str, object], clause: str
) -> None:
    a, b = probe(tmp_path / "a.json", "paper grid logreg"), probe(tmp_path / "b.json", kinds, **changed)
    if clause:
        assert [sentence for sentence in refusal(a, b) if clause in sentence]
    else:
        assert len(compared(a, b)[1]) == 2 * len(kinds.split())


def test_compare_refuses_other_classifier_unless_allowed(tmp_path: Path, compared: Compared) -> None:
    a, b = probe(tmp_path / "a.json", "grid logreg"), probe(tmp_path / "b.json", "logreg", epochs=9)
    words = ("--metric", "grid", "logreg")
    sentence, advice = refusal(a, b, *words)
    assert "classifier grid -> logreg" in sentence
    assert advice.endswith("--allow classifier")
    assert compared(a, b, *words, "--allow", "classifier")[1][1]["p"] is not None
    c = probe(tmp_path / "c.json", "logreg", holdout=0.2)
    assert "holdout 0.1 -> 0.2" in refusal(a, c, *words, "--allow", "classifier")[0], "ignores a shared setting"


# ---- published results

NAME = "published:xcit_small_12_p16"
RIGHT = np.arange(VAL) < 38_250  # 76.5%
BEST = Metric("paper, best epoch, top-1", {"classifier": "paper", "epoch": "best"}, 78.0, None)
AS_PUBLISHED = {"name": "linear", "epochs": 100, "lr": 0.001, "crop_scale": [0.08, 1.0], "batch": 1024, "seed": 0}


def on_imagenet(path: Path, *metrics: Metric, transform: EvalTransform | None = None, **more: Any) -> Path:
    """Write a result with the numbers of images and classes of ImageNet-1k."""
    write_result(path, *(metrics or (knn_metric(20, RIGHT),)), transform=transform or EvalTransform(), **more)
    for part, images in (("train", TRAIN), ("val", VAL)):
        change(change(path, images, "data", part, "images"), CLASSES, "data", part, "classes")
    return path


def test_published_results_are_compared_without_significance_test(tmp_path: Path, compared: Compared) -> None:
    a = on_imagenet(tmp_path / "a.json", knn_metric(10, RIGHT), knn_metric(20, RIGHT))
    b = on_imagenet(tmp_path / "b.json")
    text, rows = compared(NAME, a, b)
    assert f"{NAME}: published, not measured here" in text
    assert [(row["percent"], row["p"]) for row in rows] == [(76.0, None), (76.5, None), (76.5, None)]
    assert [row["difference_interval"] for row in rows] == [None] * 3
    assert compared(a, NAME)[1][1]["difference"] == -0.5
    linear = on_imagenet(tmp_path / "c.json", BEST, measure="linear", protocol=AS_PUBLISHED)
    assert compared(NAME, linear)[1][1]["difference"] == pytest.approx(0.2)


def test_published_results_refuse_results_of_other_protocols(tmp_path: Path) -> None:
    linear: dict[str, Any] = {"measure": "linear", "protocol": AS_PUBLISHED | {"cached": "4 epochs"}}
    for metrics, changed, clause in (
        ((), {"transform": LARGER}, "transform: crop 224 -> 28"),
        ((knn_metric(10, RIGHT),), {}, "k 20 -> 10"),
        ((BEST,), linear, "cached not set -> 4"),
    ):
        assert clause in refusal(NAME, on_imagenet(tmp_path / "a.json", *metrics, **changed))[0]


def test_published_results_refuse_other_data_and_unknown_names(tmp_path: Path) -> None:
    mine = write_result(tmp_path / "a.json", knn_metric(20, hits(300)), transform=EvalTransform())
    train, val = refusal(NAME, mine)
    assert "different train images: 1,281,167 of 1000 classes -> 30" in train
    assert val.endswith("different val images: 50,000 of 1000 classes -> 400 of 3 classes"), "message offers --allow"
    mine = on_imagenet(tmp_path / "b.json")
    assert "did you mean xcit_small_12_p16" in refusal("published:xcit_small_12_p61", mine)[0]
    assert "only published results" in refusal(NAME, "published:xcit_small_12_p8")[0]
    assert "no retrieval result" in refusal(NAME, write_result(tmp_path / "c.json", BEST, measure="retrieval"))[0]


# ---- results of the runners


def test_compare_accepts_results_of_the_runners(tmp_path: Path, here: Here, compared: Compared) -> None:
    """Each result is compared with a copy of itself that has another hash of weights."""
    tree = image_tree(tmp_path / "photos")
    weights = tiny_checkpoint(tmp_path / "run", tree)

    def measured(name: str, runner: ModuleType, *words: object) -> tuple[Path, Path]:
        first, second = tmp_path / f"{name}.json", tmp_path / f"{name}-2.json"
        ended = here(runner, *words, "--weights", weights, "--json", first)
        assert ended.code == 0, ended.err
        shutil.copy(first, second)
        return first, change(second, "other", "weights", "hash")

    knn = measured("knn", run_knn, "--few-shot", 1, 2, "--ks", 1, 3, "--draws", 3)
    result, metrics = json.loads(knn[0].read_text()), read_result(str(knn[0])).metrics
    by_k = {row["k"]: row["top1"] for row in result["results"]}
    assert {one.settings["k"]: one.percent for one in metrics if one.unit == "image"} == by_k
    drawn = [row["top1"] for row in result["few_shot"]["results"]]
    assert [one.percent for one in metrics if one.unit == "draw"] == drawn
    assert {row["units"] for row in compared(*knn)[1] if row["unit"] == "draw"} == {3}

    sgd = ("--epochs", 2, "--batch-size", 4, "--holdout", 0.25, "--lrs", 0.5, "--num-workers", 0, "--logreg")
    linear = measured("linear", run_linear, *sgd, "--logreg-cs", 1)
    rows = compared(*linear)[1]
    assert {row["metric"] for row in rows} == {
        "paper, last epoch, top-1", "paper, best epoch, top-1", "grid, last epoch, top-1", "logreg, top-1"
    }  # fmt: skip
    assert all(row["p"] is not None for row in rows[1::2])
    assert "epochs 2 -> 3" in refusal(linear[0], change(linear[1], 3, "protocol", "epochs"))[0]

    rows = compared(*measured("folder", run_retrieval, "folder", "--data-path", tree / "val", "--no-cache"))[1]
    assert "mAP@R" in {row["metric"] for row in rows}
    assert all(row["units"] for row in rows)
