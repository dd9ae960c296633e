"""k-NN with a few images a class: what is drawn, and what is reported about the draws."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from dino_xcit.errors import InputError
from eval.knn import knn_predict
from eval.knn.few_shot import draw, few_shot, short_classes
from eval.knn.report import few_shot_table, short_classes_notices
from eval.results import few_shot_figure
from eval.stats import accuracy

LABELS = np.array([4, 9, 4, 9, 9, 4, -1, 9, 4, 4, 9, 4])


def clouds(images: int, classes: int, seed: int, spread: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    centres = np.random.default_rng(99).normal(size=(classes, 12))
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=images)
    return (centres[labels] + spread * rng.normal(size=(images, 12))).astype(np.float32), labels


@pytest.mark.parametrize("shots", [1, 2, 5])
def test_so_many_images_of_each_class_are_drawn_and_all_where_there_are_fewer(shots: int) -> None:
    rows = draw(LABELS, shots, seed=0, number=0)
    assert len(set(rows.tolist())) == len(rows)
    assert (np.diff(rows) > 0).all()
    counts = {label: int((LABELS[rows] == label).sum()) for label in (-1, 4, 9)}
    assert counts == {-1: 1, 4: shots, 9: shots}


def test_a_draw_depends_on_seed_and_number_alone_and_grows_with_the_shots() -> None:
    one, two, five = (set(draw(LABELS, shots, 7, 3).tolist()) for shots in (1, 2, 5))
    assert one < two < five
    assert one == set(draw(LABELS, 1, 7, 3).tolist())
    draws = {tuple(draw(LABELS, 2, seed, number)) for seed in (7, 8) for number in range(5)}
    assert len(draws) > 5


def test_every_image_is_drawn_equally_often() -> None:
    counts = np.zeros(len(LABELS))
    for number in range(3000):
        counts[draw(LABELS, 2, 0, number)] += 1
    assert counts[LABELS == -1].tolist() == [3000]
    for label, images in ((4, 6), (9, 5)):
        assert counts[label == LABELS] == pytest.approx(3000 * 2 / images, rel=0.1)


def test_the_records_are_mean_and_deviation_over_the_draws() -> None:
    train, labels = clouds(400, 8, seed=1)
    test, answers = clouds(90, 8, seed=2)
    records = few_shot(train, labels, test, answers, [1, 3], 4, [2, 10, 20], [0.07, 0.5], seed=5)
    keys = [(record["shots"], record["k"], record["temperature"]) for record in records]
    # Eight images are drawn at one a class, so that 10 and 20 are the same eight neighbours.
    assert keys == [(n, k, t) for n, ks in ((1, (2, 8)), (3, (2, 10, 20))) for k in ks for t in (0.07, 0.5)]
    for record in records:
        assert isinstance(record["shots"], int)
        expected = []
        for number in range(4):
            rows = draw(labels, record["shots"], 5, number)
            key = (record["k"], record["temperature"])
            guesses = knn_predict(train[rows], labels[rows], test, [key[0]], [key[1]])[key]  # type: ignore[list-item, index]
            expected.append([accuracy(guesses, answers, top) for top in (1, 5)])
        top1, top5 = zip(*expected, strict=True)
        assert record["top1_draws"] == list(top1)
        assert record["top1"] == pytest.approx(statistics.mean(top1))
        assert record["top1_deviation"] == pytest.approx(statistics.stdev(top1))
        if record["k"] == 2:  # two neighbours name two classes
            assert record["top5"] is None
        else:
            assert record["top5"] == pytest.approx(statistics.mean(top5))
        assert record["classes_with_fewer"] == 0


def test_one_draw_has_no_deviation() -> None:
    train, labels = clouds(60, 3, seed=1)
    (record,) = few_shot(train, labels, train, labels, [2], 1, [3], [0.07])
    assert record["top1_deviation"] is None
    assert record["top5"] is None, "three classes: top-5 means nothing"
    assert "±" not in few_shot_table([{"model": "trained", **record}], 1)


def test_more_images_a_class_than_there_are_is_the_whole_training_set_once_and_said() -> None:
    train, labels = clouds(60, 3, seed=1)
    labels[labels == 2] = 700  # a gap in the numbers
    kept = np.concatenate([np.flatnonzero(labels != 700), np.flatnonzero(labels == 700)[:4]])
    train, labels = train[kept], labels[kept]
    (record,) = few_shot(train, labels, train[::3], labels[::3], [500], 3, [5], [0.07])
    whole = accuracy(knn_predict(train, labels, train[::3], [5], [0.07])[5, 0.07], labels[::3], 1)
    assert record["top1_draws"] == [whole], "every draw is the same"
    assert (record["top1_deviation"], record["takes_all"], record["classes_with_fewer"]) == (None, True, 3)
    figures = [few_shot_figure("trained", record, 3, seed) for seed in (0, 1)]
    assert figures[0].name == "trained 500 a class, all images, k=5 T=0.07 top-1"
    assert figures[0].settings == figures[1].settings, "the seed decides nothing"
    assert short_classes(labels, 5) == [(700, 4)]
    most = int(np.unique(labels, return_counts=True)[1].max())
    records = few_shot(train, labels, train[::3], labels[::3], [most - 1, most], 3, [5], [0.07])
    assert [len(record["top1_draws"]) for record in records] == [3, 1]  # type: ignore[arg-type]
    assert short_classes_notices(labels, ("a", "b", "c"), [4, 5, most]) == [
        "1 class has fewer than 5 training images (the least: 700 with 4): all that there are were used",
        f"2 classes have fewer than {most} training images (the least: 700 with 4): all that there are were used",
        f"few-shot {most} takes all {len(labels)} training images, as no class has more: every draw is the same, so it "
        "was measured once, and has no deviation",
    ]


def test_one_class_and_classes_without_a_training_image() -> None:
    train, labels = clouds(30, 1, seed=1)
    answers = np.array([0] * 20 + [5] * 10)
    (record,) = few_shot(train, labels, train, answers, [2], 2, [10], [0.07])
    assert record["top1_draws"] == [pytest.approx(100 * 20 / 30)] * 2
    assert record["k"] == 2


def test_without_labels_there_is_nothing_to_draw_from() -> None:
    train, labels = clouds(30, 3, seed=1)
    with pytest.raises(InputError, match="have no labels"):
        few_shot(train, None, train, labels, [1], 1, [1], [0.07])
    with pytest.raises(InputError, match="test images have no labels"):
        few_shot(train, labels, train, None, [1], 1, [1], [0.07])
