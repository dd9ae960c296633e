"""k-NN classifier against its definition in float64 and the formulation of the reference."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_fixtures import unit
from numpy.typing import NDArray

import eval.search_index
from dino_xcit.errors import InputError
from eval.knn.classify import clamp_ks, knn_predict
from eval.search_index import build_index
from eval.stats import accuracy, correct

Data = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]


def clusters(train: int = 300, test: int = 80, classes: int = 8, dim: int = 16, spread: float = 1.5) -> Data:
    """Return overlapping clusters of vectors of varying norm: train features and labels, test features and labels."""
    rng = np.random.default_rng(3)
    centres = rng.normal(size=(classes, dim))

    def draw(count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        labels = rng.integers(0, classes, count)
        points = centres[labels] + spread * rng.normal(size=(count, dim))
        return (points * rng.uniform(0.1, 10, (count, 1))).astype(np.float32), labels

    return (*draw(train), *draw(test))


def by_definition(data: Data, k: int, temperature: float) -> list[list[int]]:
    """Predict one query at a time, adding one vote at a time, in float64."""
    train, labels, test, _ = data
    out = []
    for query in unit(test):
        similarity = unit(train) @ query
        votes = {int(label): 0.0 for label in labels}
        for row in np.argsort(-similarity)[:k]:
            votes[int(labels[row])] += math.exp(similarity[row] / temperature)
        out.append(sorted(votes, key=lambda label: (-votes[label], label))[:5])
    return out


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.02), (20, 0.07), (20, 1.0), (300, 0.07), (300, 1.0)])
def test_knn_predict_equals_definition_in_float64(k: int, temperature: float) -> None:
    data = clusters()
    train, labels, test, _ = data
    found = knn_predict(train, labels, test, [k], [temperature])[k, temperature]
    assert found.tolist() == by_definition(data, k, temperature)


@pytest.mark.parametrize("spread", [0.3, 1.5, 4.0])
def test_top1_and_top5_equal_reference_for_every_k(spread: float) -> None:
    """Includes queries with votes for fewer than five classes. The reference's sort is not stable, so its order of
    classes without votes is arbitrary. Here the lower number comes first, as in a stable sort of the same votes."""
    train, labels, test, answers = clusters(train=1500, test=400, classes=40, spread=spread)
    ks = [5, 10, 20, 100, 200]
    found = knn_predict(train, labels, test, ks, [0.07])
    similarity = torch.from_numpy(unit(test)) @ torch.from_numpy(unit(train)).t()
    truth = torch.from_numpy(answers)[:, None]
    for k in ks:
        nearest, rows = similarity.topk(k)
        one_hot = torch.zeros(rows.numel(), 40, dtype=torch.float64)
        one_hot.scatter_(1, torch.from_numpy(labels)[rows].reshape(-1, 1), 1)
        votes = (one_hot.view(len(test), k, 40) * (nearest / 0.07).exp().unsqueeze(2)).sum(1)
        enough = ((votes > 0).sum(1) >= 5).numpy()
        for top in (1, 5):
            right = votes.sort(dim=1, descending=True, stable=True)[1][:, :top] == truth
            assert (correct(found[k, 0.07], answers, top) == right.any(1).numpy()).all()
            as_it_is = (votes.sort(1, True)[1][:, :top] == truth).any(1).numpy()
            assert (correct(found[k, 0.07], answers, top) == as_it_is)[enough | (top == 1)].all()


def test_predictions_do_not_depend_on_number_of_test_images() -> None:
    train, labels, test, _ = clusters(test=2500)
    whole = knn_predict(train, labels, test, [7], [0.07])[7, 0.07]
    assert (knn_predict(train, labels, test[:1], [7], [0.07])[7, 0.07] == whole[:1]).all()
    assert (knn_predict(train, labels, test[1500:], [7], [0.07])[7, 0.07] == whole[1500:]).all()
    assert knn_predict(train, labels, test[:0], [7], [0.07])[7, 0.07].shape == (0, 5)


def test_knn_predict_supports_arbitrary_class_numbers() -> None:
    train, labels, test, _ = clusters()
    names = np.array([0, 3, 4, 900_000_000_000, 7, -2, 1000, 12])
    plain = knn_predict(train, labels, test, [20], [0.07])[20, 0.07]
    renamed = knn_predict(train, names[labels], test, [20], [0.07])[20, 0.07]
    assert (names[plain[:, 0]] == renamed[:, 0]).all()
    assert np.isin(renamed, names).all()


def test_classes_without_votes_come_last_in_ascending_order() -> None:
    train, labels = np.eye(7, dtype=np.float32), np.array([6, 5, 4, 3, 2, 1, 0])
    query = np.array([[0, 0, 1, 0.5, 0, 0, 0]], dtype=np.float32)
    assert knn_predict(train, labels, query, [2], [0.07])[2, 0.07].tolist() == [[4, 3, 0, 1, 2]]
    equal = np.array([[1, 0], [1, 0]], dtype=np.float32)
    assert knn_predict(equal, np.array([1, 0]), equal[:1], [2], [0.07])[2, 0.07].tolist() == [[0, 1]]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e-4, 1e-320])
def test_very_low_temperature_predicts_nearest_without_overflow(temperature: float) -> None:
    train, labels, test, _ = clusters()
    cold = knn_predict(train, labels, test, [20], [temperature])[20, temperature]
    assert (cold[:, 0] == knn_predict(train, labels, test, [1], [0.07])[1, 0.07][:, 0]).all()


def test_k_above_training_set_size_is_clamped() -> None:
    train, labels, test, _ = clusters(train=30)
    found = knn_predict(train, labels, test, [200, 10, 10], [0.5, 0.07, 0.07])
    assert list(found) == [(200, 0.5), (200, 0.07), (10, 0.5), (10, 0.07)]
    for (k, temperature), together in found.items():
        alone = knn_predict(train, labels, test, [min(k, 30)], [temperature])
        assert (together == alone[min(k, 30), temperature]).all(), "a joint search differs from separate ones"
    assert clamp_ks([10, 200, 100], 30) == ([10, 30], "k = 100, 200 exceeds the 30 training images: using 30")
    assert clamp_ks([20, 10], 30) == ([10, 20], "")


def test_invalid_inputs_are_refused() -> None:
    train, labels, test, _ = clusters(train=30)
    broken = train.copy()
    broken[4, 2] = np.nan
    cases = [
        ((train, None, test, [10], [0.07]), "30 training features but 0 labels"),
        ((train, labels, test[:, :4], [10], [0.07]), "cannot be compared"),
        ((train, labels, test, [0, 10], [0.07]), "k is 0, expected 1 or more"),
        ((train, labels, test, [], [0.07]), "k is missing"),
        ((train, labels, test, [10], [0.0]), "temperature is 0.0, expected more than 0"),
        ((train[:0], labels[:0], test, [10], [0.07]), "no training image"),
        ((broken, labels, test, [10], [0.07]), "features are not finite"),
        ((train, labels, broken, [10], [0.07]), "features are not finite"),
    ]
    for arguments, word in cases:
        with pytest.raises(InputError, match=word):
            knn_predict(*arguments)  # type: ignore[arg-type]


def test_memory_mapped_features_are_not_copied_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 1.28 M x 384 the index (2 GB) must be the only copy. Here NumPy may allocate a tenth of the file."""
    rows, dim = 100_000, 32
    features = np.lib.format.open_memmap(tmp_path / "features.npy", mode="w+", dtype=np.float32, shape=(rows, dim))
    features[:] = np.random.default_rng(0).normal(size=(rows, dim))
    labels = np.arange(rows) % 10
    features.flush()
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    queries = np.array(mapped[:40])
    monkeypatch.setattr(eval.search_index, "_ROWS_AT_ONCE", 1000)
    tracemalloc.start()
    index = build_index(mapped)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert index.ntotal == rows
    assert peak < rows * dim * 4 / 10
    predicted = knn_predict(mapped, labels, mapped[:40], [20], [0.07])[20, 0.07]
    assert (predicted == knn_predict(np.array(mapped), labels, queries, [20], [0.07])[20, 0.07]).all()


def test_accuracy_counts_label_among_first_guesses() -> None:
    guesses = np.array([[1, 2, 3], [2, 1, 3], [3, 1, 2], [1, 3, 2]])
    truth = np.array([1, 1, 1, 7])
    assert (accuracy(guesses, truth, 1), accuracy(guesses, truth, 2)) == (25.0, 75.0)
    assert math.isnan(accuracy(guesses[:0], truth[:0], 1))
    for labels, said in ((None, "no labels"), (truth[:3], "4 predictions but 3 labels")):
        with pytest.raises(InputError, match=said):
            accuracy(guesses, labels, 1)
