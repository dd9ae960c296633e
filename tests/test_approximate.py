"""Approximate search: neighbours, recall and warnings."""

from __future__ import annotations

from typing import get_args

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from dino_xcit.errors import InputError
from eval.knn import knn_predict
from eval.knn.classify import Kind, approximate_index, refuse_few
from eval.search_index import build_index, l2_normalised, search

KINDS = get_args(Kind)
ROWS, DIM = 1500, 20


def clouds(rows: int, seed: int) -> NDArray[np.float32]:
    """Return points of varying length around 30 centres that lie far from zero, as features do."""
    centres = 4 + np.random.default_rng(99).normal(size=(30, DIM))
    rng = np.random.default_rng(seed)
    points = centres[rng.integers(30, size=rows)] + 0.5 * rng.normal(size=(rows, DIM))
    return (points * rng.uniform(0.1, 10, (rows, 1))).astype(np.float32)


TRAIN, QUERIES = clouds(ROWS, 1), clouds(200, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_approximate_index_recall_equals_brute_force_recall(kind: Kind) -> None:
    index, record = approximate_index(TRAIN, QUERIES, kind, [5, 20])
    similarity = l2_normalised(QUERIES).astype(np.float64) @ l2_normalised(TRAIN).astype(np.float64).T
    ours = np.concatenate([rows for _, rows in search(index, QUERIES, 20)])
    for k in (5, 20):
        exact = np.argsort(-similarity, axis=1)[:, :k]
        shares = [len(set(one) & set(other)) / k for one, other in zip(exact, ours[:, :k], strict=True)]
        assert record["recall_percent"][str(k)] == pytest.approx(100 * np.mean(shares), abs=0.05)
        assert record["recall_percent"][str(k)] > 90
    assert record["recall_queries"] == 200


@pytest.mark.parametrize("kind", KINDS)
def test_approximate_neighbours_have_exact_similarities(kind: Kind) -> None:
    index, _ = approximate_index(TRAIN, QUERIES, kind, [10], ROWS)
    ((similarities, rows),) = search(index, QUERIES, 10)
    ((exact, _),) = search(build_index(TRAIN), QUERIES, 10)
    own = (l2_normalised(QUERIES)[:, None] * l2_normalised(TRAIN)[rows]).sum(axis=2)
    assert similarities == pytest.approx(own, abs=1e-5)
    assert (np.diff(similarities, axis=1) <= 0).all()
    assert similarities == pytest.approx(exact, abs=1e-5)


def test_ivf_index_with_all_lists_equals_exact_classifier(capsys: pytest.CaptureFixture[str]) -> None:
    labels = np.random.default_rng(0).integers(0, 7, ROWS)
    index, record = approximate_index(TRAIN, QUERIES, "ivf", [5, 20], 10**6)
    assert record["probes"] == 77, "probes must be clamped to the number of lists"
    assert "probes is 1000000" in capsys.readouterr().out
    exact = knn_predict(TRAIN, labels, QUERIES, [5, 20], [0.07])
    approximate = knn_predict(TRAIN, labels, QUERIES, [5, 20], [0.07], index=index)
    assert all((approximate[key] == exact[key]).all() for key in exact)


def test_missing_neighbours_have_no_vote() -> None:
    """There is one list per axis, and each query searches one list."""
    train = l2_normalised(np.array([[1, 0], [1, 0.1], [0.1, 1]], dtype=np.float32))
    queries, labels = np.eye(2, dtype=np.float32), np.array([3, 3, 8])
    for chosen, counts, voted in (
        ([0, 1, 2], [2, 1], [[3, 8], [8, 3]]),
        ([0, 1, 1], [3, 0], [[3, 8], [3, 8]]),  # no votes for the second query: classes in ascending order
    ):
        centres = faiss.IndexFlatL2(2)
        centres.add(np.eye(2, dtype=np.float32))
        index = faiss.IndexIVFFlat(centres, 2, 2, faiss.METRIC_INNER_PRODUCT)
        index.is_trained = True
        index.add(train[chosen])
        assert [(found >= 0).sum(axis=1).tolist() for _, found in search(index, queries, 3)] == [counts]
        assert knn_predict(train, labels, queries, [3], [1e30], index=index)[3, 1e30].tolist() == voted


@pytest.mark.parametrize("kind", KINDS)
def test_approximate_recall_is_high_for_nearly_equal_features(kind: Kind) -> None:
    """All pairs have a cosine similarity of about 0.999."""
    rng = np.random.default_rng(0)
    alike = (1 + 0.003 * clouds(2000, 3) + 0.001 * rng.normal(size=(2000, DIM))).astype(np.float32)
    assert approximate_index(alike[100:], alike[:100], kind, [20])[1]["recall_percent"]["20"] > 90


def test_low_probes_are_raised_for_hnsw_and_warned_about_for_ivf(capsys: pytest.CaptureFixture[str]) -> None:
    graph = approximate_index(TRAIN, QUERIES, "hnsw", [20, 200], probes=3)[1]
    assert (graph["probes"], graph["queries_with_fewer_than_k"]) == (200, 0), "HNSW must visit at least k candidates"
    assert "probes is 3" in capsys.readouterr().out
    index, lists = approximate_index(TRAIN, QUERIES, "ivf", [5, 200], probes=1)
    ((_, rows),) = search(index, QUERIES, 200)
    assert lists["queries_with_fewer_than_k"] == (rows < 0).any(axis=1).sum() > 100
    assert "fewer than 200 neighbours" in capsys.readouterr().out
    assert lists["recall_percent"]["200"] < 90
    with pytest.raises(InputError, match="999 training images"):
        refuse_few("hnsw", 999)
