"""Few-shot k-NN: the drawn images and the records over the draws."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from dino_xcit.errors import InputError
from eval.features import Features
from eval.knn import knn_predict
from eval.knn.few_shot import draw, few_shot
from eval.results import few_shot_metric
from eval.stats import accuracy

LABELS = np.array([4, 9, 4, 9, 9, 4, -1, 9, 4, 4, 9, 4])


def clouds(images: int, classes: int, seed: int, spread: float = 1.5) -> Features:
    centres = np.random.default_rng(99).normal(size=(classes, 12))
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=images)
    return Features((centres[labels] + spread * rng.normal(size=(images, 12))).astype(np.float32), labels)


@pytest.mark.parametrize("shots", [1, 2, 5])
def test_draw_takes_n_images_per_class_or_all_of_a_smaller_class(shots: int) -> None:
    rows = draw(LABELS, shots, seed=0, number=0)
    assert (np.diff(rows) > 0).all()
    counts = {label: int((LABELS[rows] == label).sum()) for label in (-1, 4, 9)}
    assert counts == {-1: 1, 4: shots, 9: shots}


def test_draws_are_nested_uniform_and_vary_with_seed_and_number() -> None:
    one, two, five = (set(draw(LABELS, shots, 7, 3).tolist()) for shots in (1, 2, 5))
    assert one < two < five
    assert len({tuple(draw(LABELS, 2, seed, number)) for seed in (7, 8) for number in range(5)}) > 5
    counts = np.bincount(np.concatenate([draw(LABELS, 2, 0, number) for number in range(1500)]))
    for label, images in ((-1, 2), (4, 6), (9, 5)):
        assert counts[label == LABELS] == pytest.approx(1500 * 2 / images, rel=0.1)


def test_few_shot_records_mean_and_std_over_draws() -> None:
    train, test = clouds(400, 8, seed=1), clouds(90, 8, seed=2)
    assert train.labels is not None
    records = few_shot(train, test, [1, 3], 4, [2, 10, 20], [0.07, 0.5], seed=5)
    keys = [(record["shots"], record["k"], record["temperature"]) for record in records]
    # One image of each of eight classes is drawn, so k = 10 and k = 20 are both clamped to 8.
    assert keys == [(n, k, t) for n, ks in ((1, (2, 8)), (3, (2, 10, 20))) for k in ks for t in (0.07, 0.5)]
    for record in records:
        expected = []
        for number in range(4):
            rows, key = draw(train.labels, record["shots"], 5, number), (record["k"], record["temperature"])
            guesses = knn_predict(train.features[rows], train.labels[rows], test.features, [key[0]], [key[1]])[key]
            expected.append([accuracy(guesses, test.labels, top) for top in (1, 5)])
        top1, top5 = zip(*expected, strict=True)
        assert record["top1_draws"] == list(top1)
        assert record["top1"] == pytest.approx(statistics.mean(top1))
        assert record["top1_deviation"] == pytest.approx(statistics.stdev(top1))
        # Two neighbours have at most two classes, so top-5 is undefined.
        assert record["top5"] == (None if record["k"] == 2 else pytest.approx(statistics.mean(top5)))
        assert record["classes_with_fewer"] == 0


def test_few_shot_above_class_size_uses_whole_training_set_once() -> None:
    train = clouds(60, 3, seed=1)
    assert train.labels is not None
    train.labels[train.labels == 2] = 700  # a gap in the label numbers
    (record,) = few_shot(train, train, [500], 3, [5], [0.07])
    guesses = knn_predict(train.features, train.labels, train.features, [5], [0.07])[5, 0.07]
    assert record["top1_draws"] == [accuracy(guesses, train.labels, 1)], "identical draws must be measured once"
    assert (record["top1_deviation"], record["takes_all"], record["classes_with_fewer"]) == (None, True, 3)
    assert record["top5"] is None, "top-5 is undefined for three classes"
    metrics = [few_shot_metric("trained", record, 3, seed) for seed in (0, 1)]
    assert metrics[0].settings == metrics[1].settings, "the seed must not matter if all images are drawn"
    most = int(np.unique(train.labels, return_counts=True)[1].max())
    records = few_shot(train, train, [most - 1, most], 3, [5], [0.07])
    assert [len(record["top1_draws"]) for record in records] == [3, 1]


def test_few_shot_counts_unseen_classes_as_errors_and_requires_labels() -> None:
    train = clouds(30, 1, seed=1)
    (record,) = few_shot(train, Features(train.features, np.array([0] * 20 + [5] * 10)), [2], 2, [10], [0.07])
    assert record["top1_draws"] == [pytest.approx(100 * 20 / 30)] * 2
    assert record["k"] == 2
    unlabelled = Features(train.features, None)
    for pair in ((unlabelled, train), (train, unlabelled)):
        with pytest.raises(InputError, match="have no labels"):
            few_shot(*pair, [1], 1, [1], [0.07])
